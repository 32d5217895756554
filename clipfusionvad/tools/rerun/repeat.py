"""Repeat a run or a test into another folder, and compare the numbers."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from clipfusionvad.engine.device import deterministic
from clipfusionvad.engine.run_folder import BEST, LAST, METRICS, seeds_in
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError
from clipfusionvad.io.rank import rank_info
from clipfusionvad.report.results import TEST_SCORES
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.rerun import RerunOptions
from clipfusionvad.tools.rerun.agreement import compare_runs, compare_tests
from clipfusionvad.tools.rerun.record import (
    RunRecord,
    code_changes,
    data_changes,
    option_changes,
    read_record,
    reasons_for_other_bits,
)

EXIT_MISMATCH = 1
# Changes of a kind that are listed; the others are counted.
_LISTED = 8

#: Resolves a command line to options by name; runs it and returns its exit code.
Resolve = Callable[[list[str], RunRecord], Mapping[str, Any]]
Run = Callable[[list[str], RunRecord], int]


def rerun(run: Path, options: RerunOptions, resolve: Resolve, start: Run) -> int:
    """Repeat the run or the test in a folder, print what has changed and whether the numbers match."""
    record = read_record(run)
    with deterministic(bool(record.options.get("deterministic"))), _same_threads(record.environment.get("threads")):
        if record.options.get("demo"):
            make_demo(record.dataset)
        folder, resume = _choose_folder(options.output_dir, record)
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "options.yaml"
            config.write_text(yaml.safe_dump(dict(record.options)), encoding="utf-8")
            argv = _command_line(record, config, folder, options.device)
            _print_changes("code and machine", code_changes(record))
            _print_changes("options", option_changes(record, resolve(argv, record)))
            _check_data(record, options.anyway)
            code = start(argv + ["--use-checkpoint"] * resume, record)
        if code == EXIT_INTERRUPTED:
            print(f"continue the rerun with: python -m clipfusionvad rerun {record.folder} --output-dir {folder}")
        return code if code or rank_info().rank else _compare(record, folder, options.tolerance)


@contextlib.contextmanager
def _same_threads(count: Any) -> Iterator[None]:
    """Compute with as many threads as the run: the order of sums, and so their rounding, depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count if isinstance(count, int) and count > 0 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_folder(given: str | None, record: RunRecord) -> tuple[Path, bool]:
    """Return the folder of the repetition, and whether an interrupted one in it is to be continued."""
    if given is None:
        base = record.folder.resolve()
        number, folder = 1, base.with_name(f"{base.name}_rerun")
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}_rerun-{number}")
        return folder, False
    folder = Path(given)
    if folder.resolve() == record.folder.resolve() or any((folder / name).exists() for name in (METRICS, TEST_SCORES)):
        raise UserError(f"{folder} holds a finished run or a test: name another --output-dir for the repetition")
    return folder, (folder / LAST).is_file() or bool(seeds_in(folder))


def _command_line(record: RunRecord, config: Path, folder: Path, device: str | None) -> list[str]:
    argv = ["--config", str(config), "--output-dir", str(folder)]
    if not record.is_test:
        argv += ["--model-path", str(folder / BEST), "--checkpoint-path", str(folder / LAST)]
    return argv + (["--device", device] if device else [])


def _check_data(record: RunRecord, anyway: bool) -> None:
    """Print which files have changed; unless ``anyway``, raise ``UserError`` if there are any."""
    if record.sources is None:
        print("data: the run did not record what it read (it was made by an older version)")
        return
    sources = list({source.path: source for source in record.sources}.values())
    changes = data_changes(sources)
    sizes = sum(not source.sha256 for source in sources)
    _print_changes("data", changes, f" ({len(sources)} files{f', for {sizes} only the size is known' * (sizes > 0)})")
    if changes and not anyway:
        made_in = record.environment.get("folder")
        missing = made_in and all(change.endswith(": missing") for change in changes)
        hint = f" (the run was started in {made_in})" if missing else ""
        raise UserError(
            f"{len(changes)} of {len(sources)} files that {record.folder} was made from have changed, the first is "
            f"{changes[0]}{hint}; restore them, or repeat the run with the present files by --anyway"
        )


def _print_changes(what: str, changes: Sequence[str], more: str = "") -> None:
    print(f"{what}: {f'{len(changes)} changes' if changes else 'unchanged'}{more}")
    for change in changes[:_LISTED]:
        print(f"  {change}")
    if len(changes) > _LISTED:
        print(f"  and {len(changes) - _LISTED} more")


def _compare(record: RunRecord, folder: Path, tolerance: float) -> int:
    """Print how the repetition compares with the record; return 0 for a match."""
    agreements = (compare_tests if record.is_test else compare_runs)(record.folder, folder)
    width = max(len(one.file) for one in agreements)
    print(f"\n{folder} beside {record.folder}:")
    for one in agreements:
        print(f"  {one.file:{width}}  {one.text}")
    if all(one.exact for one in agreements):
        print("match: the same numbers, bit for bit")
        return 0
    close = all(one.distance <= tolerance for one in agreements)
    reasons = reasons_for_other_bits(record, folder)
    if not reasons:
        near = f", though within {tolerance:g}" if close else ""
        print(f"mismatch: same code, versions and device, so the same bits were expected{near}")
        return EXIT_MISMATCH
    word = "match: within" if close else "mismatch: beyond"
    print(f"{word} {tolerance:g}; the same bits cannot be expected ({reasons[0]})")
    return 0 if close else EXIT_MISMATCH
