"""Look for mistakes that raise no error: in the installation, in lists, features and truth, in a run."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.errors import UserError, nearest

# The rest is imported after the command line is parsed: the checks need torch, --help does not.
if TYPE_CHECKING:
    from clipfusionvad.engine.config import Settings
    from clipfusionvad.tools.doctor import Check, Finding

EXIT_ERRORS_FOUND = 1
_RENAMED = {"calibration-file": "normal-centroid-file"}


def main(argv: list[str]) -> int:
    args, rest = make_parser().parse_known_args(argv)
    from clipfusionvad.io.files import check_writable, write_json
    from clipfusionvad.tools.doctor import ERROR, LEVELS, lines, run_checks

    known = groups()
    if args.list:
        named = [(group, name, check) for group, checks in known.items() for name, check in checks.items()]
        width = max(len(name) for _, name, _ in named)
        print("\n".join(f"{group:12}  {name:{width}}  {check.__doc__}" for group, name, check in named))
        return 0
    if args.json:
        check_writable(args.json)
    chosen = {_RENAMED.get(word, word) for word in args.only or ()}
    names = known.keys() | {name for checks in known.values() for name in checks}
    for word in chosen - names:
        raise UserError(f"--only: unknown check {word!r}{nearest(word, names)}; see --list")
    if rest and not args.dataset:
        raise UserError(f"{rest[0]} needs --dataset, one of: {', '.join(DATASETS)}, or a YAML file")
    start = time.perf_counter()
    findings: list[Finding] = []
    for title, group, read in _subjects(args, rest):
        checks = {name: check for name, check in known[group].items() if not chosen or chosen & {group, name}}
        if checks:
            print(title)
            found = run_checks(checks, read())
            print("".join(f"{line}\n" for line in lines(found)), end="")
            findings += found
    if args.json:
        write_json(args.json, {"findings": [asdict(finding) for finding in findings]})
    where = f"; all of them in {args.json}" if args.json else ""
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    text = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    print(f"{text if findings else 'nothing found'}, in {time.perf_counter() - start:.1f} s{where}")
    return EXIT_ERRORS_FOUND if counts[ERROR] else 0


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad doctor",
        description=f"{__doc__} It changes nothing.",
        epilog="With --dataset also all options of training: the data that they name is checked.",
    )
    names = f"one of {', '.join(DATASETS)}, or a YAML file (default: those with lists under list/)"
    parser.add_argument("--dataset", metavar="NAME", help=names)
    parser.add_argument("--run", type=Path, metavar="RUN", help="also check this folder of a training, or of several")
    reference = "compare the features' mean with this one's: a centroid (D,), a feature file, or a folder of them"
    parser.add_argument("--reference", type=Path, metavar="PATH", help=reference)
    parser.add_argument("--json", metavar="FILE", help="write all findings to this file")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run only these checks, by name or group")
    parser.add_argument("--list", action="store_true", help="list all checks, and run none")
    return parser


def groups() -> dict[str, dict[str, Check]]:
    """Return all checks by their subject and name."""
    from clipfusionvad.tools.doctor import checks_in, data, features, installation, run, truth

    return {"installation": checks_in(installation), "data": checks_in(data, features, truth), "run": checks_in(run)}


def _subjects(args: Namespace, rest: Sequence[str]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield what is checked: its title, the group of its checks, and a function that reads it."""
    from clipfusionvad.cli.options import option_file_of, settings_of
    from clipfusionvad.engine.run_folder import LAST, OPTIONS, runs_below, seeds_in
    from clipfusionvad.tools.doctor.installation import Installation
    from clipfusionvad.tools.doctor.run import RunFolder
    from clipfusionvad.tools.doctor.scan import DatasetScan

    yield "installation", "installation", Installation
    datasets = [find_dataset(args.dataset)] if args.dataset else [] if args.run else DATASETS.values()
    for option_file in map(option_file_of, datasets):
        options = option_file.parse_args(rest)
        if args.dataset or any(Path(path).is_file() for path in (options.train_list, options.test_list)):
            settings = settings_of(options, option_file.DATASET)
            title = f"{option_file.DATASET.title}: {options.train_list}, {options.test_list}, {options.gt_path}"
            yield title, "data", partial(DatasetScan, settings, args.reference)
    if args.run:
        if not args.run.is_dir():
            raise UserError(f"no such folder: {args.run}; give the folder of a run")
        below = [] if (args.run / OPTIONS).is_file() else runs_below(args.run, OPTIONS, LAST)
        for folder in [args.run / seed for seed in seeds_in(args.run)] or below or [args.run]:
            yield f"run {folder}", "run", partial(RunFolder, folder, parse_recorded)


def parse_recorded(path: Path) -> Settings:
    """Return the options that a run has recorded, as training would read them; ``UserError`` if it cannot."""
    from clipfusionvad.cli.options import option_file_of, settings_of
    from clipfusionvad.models import read_options

    recorded = read_options(str(path))
    if "dataset" not in recorded:
        raise UserError(f"{path} does not name its dataset")
    dataset = find_dataset(str(recorded["dataset"]))
    try:
        return settings_of(option_file_of(dataset).parse_args(["--config", str(path)]), dataset)
    except SystemExit as error:
        raise UserError(f"{path} holds a value that its option does not accept") from error
