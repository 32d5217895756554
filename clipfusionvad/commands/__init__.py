"""One file per command: options → calls → where the results are."""
