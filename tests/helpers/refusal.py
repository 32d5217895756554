"""What it takes to refuse bad input well."""

import os
from pathlib import Path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def assert_refused(program, tiny, *flags, says=()):
    """One line, code 2, and every file below the test's folder as it was."""
    before = snapshot(tiny.folder.parent)
    outcome = program(*flags)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n"), outcome.err
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    for words in [says] if isinstance(says, str) else says:
        assert words in outcome.err, outcome.err
    assert snapshot(tiny.folder.parent) == before


class RunsCode:
    """Unpickling it makes a file, as unpickling malice could do anything."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
