"""Look for what silently ruins a result: in the installation, in lists, features and truth, in a run."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipfusionvad.cli.option_files import OptionFile, option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.run_folder import seeds_in
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.files import check_writable, write_json
from clipfusionvad.models.config import read_options
from clipfusionvad.tools.doctor import features, installation, lists, model, run, truth
from clipfusionvad.tools.doctor.findings import ERROR, LEVELS, Finding, describe, examine, lines, name_of
from clipfusionvad.tools.doctor.installation import Installation
from clipfusionvad.tools.doctor.run import RunFolder
from clipfusionvad.tools.doctor.survey import take_survey

EXIT_ERRORS_FOUND = 1
#: All checks by what they look at.
GROUPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "installation": installation.CHECKS,
    "data": (*lists.CHECKS, *features.CHECKS, *truth.CHECKS, *model.CHECKS),
    "run": run.CHECKS,
}


def main(argv: list[str]) -> int:
    own, rest = make_parser().parse_known_args(argv)
    if own.list:
        print(_list())
        return 0
    if own.json:
        check_writable(own.json)
    chosen = _choose(own.only)
    start, findings = time.perf_counter(), []
    if rest and not own.dataset:
        raise UserError(f"--dataset is needed beside {rest[0]}, one of: {', '.join(DATASETS)}, or a YAML file")
    if chosen["installation"]:
        print("installation")
        findings += _told(examine(chosen["installation"], Installation()))
    if chosen["data"]:
        for option_file, options in _data(own.dataset, rest, own.run is not None):
            print(f"{option_file.DATASET.title}: {options.train_list}, {options.test_list}, {options.gt_path}")
            findings += _told(examine(chosen["data"], take_survey(options, option_file.DATASET)))
    if chosen["run"] and own.run:
        for folder in _run_folders(own.run):
            print(f"run {folder}")
            findings += _told(examine(chosen["run"], RunFolder(folder, parse_recorded)))
    if own.json:
        write_json(own.json, {"findings": [asdict(finding) for finding in findings]})
    print(_summary(findings, time.perf_counter() - start, own.json))
    return EXIT_ERRORS_FOUND if any(finding.level == ERROR for finding in findings) else 0


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad doctor",
        description=f"{__doc__} It changes nothing.",
        epilog="With --dataset also all options of training: what they name is what is looked at.",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help=f"one of {', '.join(DATASETS)}, or a YAML file (default: what is under list/)"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="also look at this folder of a training")
    parser.add_argument("--json", metavar="FILE", help="write all findings to this file")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="make these checks only, by name or group")
    parser.add_argument("--list", action="store_true", help="list all checks, and look at nothing")
    return parser


def _choose(only: Sequence[str] | None) -> dict[str, list[Callable[..., Any]]]:
    known = {name_of(check) for checks in GROUPS.values() for check in checks} | GROUPS.keys()
    for word in only or ():
        if word not in known:
            raise UserError(f"--only: unknown check {word!r}{nearest(word, known)}; see --list")
    return {
        group: [check for check in checks if not only or {group, name_of(check)} & {*only}]
        for group, checks in GROUPS.items()
    }


def _data(dataset: str | None, rest: Sequence[str], has_run: bool) -> Iterator[tuple[OptionFile, Namespace]]:
    """The options of the dataset that was named, else of those whose lists are where the options look for them."""
    if dataset:
        option_file = option_file_of(find_dataset(dataset))
        yield option_file, option_file.parse_args(rest)
        return
    for known in () if has_run else DATASETS.values():
        option_file = option_file_of(known)
        options = option_file.parse_args([])
        if any(Path(path).is_file() for path in (options.train_list, options.test_list)):
            yield option_file, options


def parse_recorded(path: Path) -> tuple[Namespace, Dataset]:
    """The options that a run has recorded, as training would take them; ``UserError`` where it would not."""
    recorded = read_options(str(path))
    if "dataset" not in recorded:
        raise UserError(f"{path} does not say of which dataset it is")
    dataset = find_dataset(str(recorded["dataset"]))
    try:
        return option_file_of(dataset).parse_args(["--config", str(path)]), dataset
    except SystemExit as error:
        raise UserError(f"{path} holds a value that its option does not take") from error


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder of a run")
    return [folder / seed for seed in seeds_in(folder)] or [folder]


def _told(findings: list[Finding]) -> list[Finding]:
    for line in lines(findings):
        print(line)
    return findings


def _summary(findings: Sequence[Finding], seconds: float, json: str | None) -> str:
    counts = [sum(finding.level == level for finding in findings) for level in LEVELS]
    counted = ", ".join(
        f"{count} {level}{'' if count == 1 else 's'}" for level, count in zip(LEVELS, counts, strict=True)
    )
    where = f"; all of them in {json}" if json else ""
    return f"{counted}, in {seconds:.1f} s{where}" if findings else f"nothing found, in {seconds:.1f} s{where}"


def _list() -> str:
    width = max(len(name_of(check)) for checks in GROUPS.values() for check in checks)
    return "\n".join(
        f"{group:12}  {name_of(check):{width}}  {describe(check)}"
        for group, checks in GROUPS.items()
        for check in checks
    )
