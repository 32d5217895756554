"""Repeat a run from its record, and report whether the numbers match."""

import contextlib
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml

from clipfusionvad.cli.options import option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.test import test
from clipfusionvad.cli.train import train
from clipfusionvad.engine.config import recorded
from clipfusionvad.engine.run_folder import BEST, LAST, METRICS, seeds_in
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments
from clipfusionvad.io.rank import rank_info

if TYPE_CHECKING:
    from clipfusionvad.tools.rerun.record import RunRecord

EXIT_MISMATCH = 1
_TOLERANCE = "how far apart numbers may be where equal bits cannot be expected (default: 0.001)"


@dataclass(frozen=True)
class RerunOptions:
    """How a run is repeated."""

    output_dir: Annotated[str | None, Option("folder of the repetition (default: RUN_rerun)")] = None
    device: Annotated[str | None, Option("another device than that of the run")] = None
    anyway: Annotated[bool, Option("repeat even if data has changed or files are missing")] = False
    tolerance: Annotated[float, Option(_TOLERANCE, above=0)] = 1e-3


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)

    import torch

    from clipfusionvad.engine.device import deterministic
    from clipfusionvad.tools.demo import make_demo
    from clipfusionvad.tools.rerun.record import read_record

    options, record = from_arguments(RerunOptions, vars(args)), read_record(args.run)
    option_file = option_file_of(record.dataset)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(bool(record.options.get("deterministic"))))
        # The order of sums, and so their rounding, depends on the number of threads.
        if (threads := record.environment.get("threads")) and isinstance(threads, int) and threads > 0:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        if record.options.get("demo"):
            make_demo(record.dataset)
        folder, resume = _choose_folder(options.output_dir, record)
        config = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "options.yaml"
        config.write_text(yaml.safe_dump(dict(record.options)), encoding="utf-8")
        flags = ["--config", str(config), "--output-dir", str(folder)]
        if not record.is_test:
            flags += ["--model-path", str(folder / BEST), "--checkpoint-path", str(folder / LAST)]
        flags += ["--device", options.device] if options.device else []
        _print_changes("code and machine", record.code_changes())
        _print_changes("options", record.option_changes(recorded(vars(option_file.parse_args(flags)))))
        _check_data(record, options.anyway)
        flags += ["--use-checkpoint"] * resume
        # An interrupted one continues in a folder that is named.
        argv = argv if options.output_dir else [*argv, "--output-dir", str(folder)]
        to_continue = shlex.join(["python", "-m", "clipfusionvad", "rerun", *argv])
        if record.is_test:
            code = test(flags, option_file)
        else:
            code = train(option_file.parse_args(flags), record.dataset, to_continue)
    return code if code or rank_info().rank else _compare(record, folder, options.tolerance)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad rerun", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run (of several seeds too), or of a test")
    add_arguments(parser, declared_options(RerunOptions).values())
    return parser


def _choose_folder(given: str | None, record: "RunRecord") -> tuple[Path, bool]:
    """Return the folder of the repetition, and whether an interrupted one in it is to be continued."""
    from clipfusionvad.report.results import TEST_SCORES

    base = record.folder.resolve()
    if given is None:
        names = chain([f"{base.name}_rerun"], (f"{base.name}_rerun-{number}" for number in count(2)))
        return next(folder for folder in map(base.with_name, names) if not folder.exists()), False
    folder = Path(given)
    if folder.resolve() == base or any((folder / name).exists() for name in (METRICS, TEST_SCORES)):
        raise UserError(f"{folder} holds a finished run or a test: name another --output-dir for the repetition")
    return folder, (folder / LAST).is_file() or bool(seeds_in(folder))


def _check_data(record: "RunRecord", anyway: bool) -> None:
    """Print which files have changed; unless ``anyway``, raise ``UserError`` if there are any."""
    from clipfusionvad.tools.rerun.record import data_changes

    if record.sources is None:
        print("data: the run did not record what it read (it is of an older version)")
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
            f"{changes[0]}{hint}; restore them, or give --anyway to repeat the run with the files as they are"
        )


def _print_changes(what: str, changes: Sequence[str], more: str = "") -> None:
    print(f"{what}: {f'{len(changes)} changes' if changes else 'unchanged'}{more}")
    listed = 8
    for change in [*changes[:listed], *([f"and {len(changes) - listed} more"] if len(changes) > listed else [])]:
        print(f"  {change}")


def _compare(record: "RunRecord", folder: Path, tolerance: float) -> int:
    """Print how the repetition compares with the record; return 0 for a match."""
    from clipfusionvad.tools.rerun.agreement import compare_folders

    agreements = compare_folders(record.folder, folder, record.is_test)
    width = max(map(len, agreements))
    print(f"\n{folder} compared with {record.folder}:")
    for file, one in agreements.items():
        print(f"  {file:{width}}  {one.text}")
    if all(one.exact for one in agreements.values()):
        print("match: the same numbers, bit for bit")
        return 0
    close = all(one.distance <= tolerance for one in agreements.values())
    if not (reasons := record.reasons_for_other_bits(folder)):
        near = f", though within {tolerance:g}" if close else ""
        print(f"mismatch: the same bits were expected, as code, versions and device are the same{near}")
        return EXIT_MISMATCH
    word = "match: within" if close else "mismatch: beyond"
    print(f"{word} {tolerance:g}; the same bits cannot be expected ({reasons[0]})")
    return 0 if close else EXIT_MISMATCH
