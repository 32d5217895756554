"""Judge score files of other programs: read them, fit them to a truth, compute metrics and compare files."""
