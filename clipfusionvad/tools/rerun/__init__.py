"""Repeat a run from its record: what has changed since then, and whether the numbers agree."""
