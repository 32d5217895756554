"""Repeat a run from its record, and say whether the numbers match."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from clipfusionvad.cli.option_files import OptionFile, option_file_of
from clipfusionvad.cli.options import record
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.test import test
from clipfusionvad.cli.train import train
from clipfusionvad.data.packed.store import open_store
from clipfusionvad.datasets import Dataset, find_dataset
from clipfusionvad.engine.device import deterministic
from clipfusionvad.engine.run_folder import BEST, DATA, DATASET, ENVIRONMENT, LAST, METRICS, OPTIONS, seeds_in
from clipfusionvad.io.argtypes import positive_float
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError
from clipfusionvad.io.files import read_json
from clipfusionvad.io.provenance import CRC, Source, environment, read_sources, short_hash
from clipfusionvad.io.rank import rank_info
from clipfusionvad.models import current_options
from clipfusionvad.models.config import read_options
from clipfusionvad.report.results import RUN_SCORES, TEST_DATA, TEST_SCORES
from clipfusionvad.report.scores import read_scores
from clipfusionvad.tools.demo import make_demo
from clipfusionvad.tools.rerun.agreement import Finding, compare_runs, compare_tests

EXIT_MISMATCH = 1
# Files or options of a kind that are named; the others are counted.
_NAMED = 8
# What a rerun sets itself.
_OWN = {"output_dir", "model_path", "checkpoint_path", "device"}
# What must be equal for the same bits, and what else is worth a line.
_DECISIVE = ("sources", "packages", "python", "cpu", "threads", "processes", "deterministic", "gpu", "cuda", "cudnn")
_NAMED_TOO = ("version", "commit", "platform")


@dataclass(frozen=True)
class Record:
    """What a folder says of how it was made; ``sources`` is None where it does not say."""

    folder: Path
    is_test: bool
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    sources: list[Source] | None
    dataset: Dataset


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    found = read_record(args.run)
    with deterministic(bool(found.options.get("deterministic"))), _threads(found.environment):
        return _rerun(args, found)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad rerun", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run (of several seeds too), or of a test")
    parser.add_argument("--output-dir", type=Path, help="folder of the repetition (default: RUN_rerun)")
    parser.add_argument("--device", help="another device than that of the run")
    parser.add_argument("--anyway", action="store_true", help="also where the data has changed or files are missing")
    parser.add_argument(
        "--tolerance",
        type=positive_float,
        default=1e-3,
        help="how far apart numbers may be where the same bits cannot be expected (default: %(default)s)",
    )
    return parser


def read_record(folder: Path) -> Record:
    """The record of a run's or a test's folder; ``UserError`` for a folder that holds neither, or is not finished."""
    if (folder / OPTIONS).is_file():
        if not (folder / METRICS).is_file():
            raise UserError(f"the run in {folder} is not finished: go on with it by --use-checkpoint first")
        options, where = read_options(str(folder / OPTIONS)), read_json(folder / ENVIRONMENT, "environment")
        data, is_test = folder / DATA, False
    elif (folder / TEST_SCORES).is_file():
        tested = read_scores(folder / TEST_SCORES)
        options, where, data, is_test = current_options(tested.options), tested.environment, folder / TEST_DATA, True
    else:
        hint = "its seeds are not all trained yet" if seeds_in(folder) else f"no {OPTIONS} and no {TEST_SCORES}"
        raise UserError(f"{folder} holds neither a finished run nor a test ({hint})")
    sources = read_sources(data) if data.is_file() else None
    own = folder / DATASET
    dataset = find_dataset(str(own) if own.is_file() else str(options.get("dataset")))
    return Record(folder, is_test, options, where, sources, dataset)


@contextlib.contextmanager
def _threads(made: Mapping[str, Any]) -> Iterator[None]:
    """Within, torch computes by as many threads as then: sums of another number of parts round otherwise."""
    before, then = torch.get_num_threads(), made.get("threads")
    torch.set_num_threads(then if isinstance(then, int) and then > 0 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rerun(args: argparse.Namespace, found: Record) -> int:
    if found.options.get("demo"):
        make_demo(found.dataset)
    folder, resume = _folder(args.output_dir, found)
    with tempfile.TemporaryDirectory() as scratch:
        argv = _argv(args, found, folder, Path(scratch))
        option_file = option_file_of(found.dataset)
        _say_code(found)
        _say_options(found, record(option_file.parse_args(argv)))
        _check_data(found, args.anyway)
        code = _repeat(argv + ["--use-checkpoint"] * resume, option_file, found)
    if code == EXIT_INTERRUPTED:
        print(f"the rerun goes on with: python -m clipfusionvad rerun {found.folder} --output-dir {folder}")
    if code or rank_info().rank:
        return code
    findings = compare_tests(found.folder, folder) if found.is_test else compare_runs(found.folder, folder)
    return _conclude(found, folder, findings, args.tolerance)


def _folder(given: Path | None, found: Record) -> tuple[Path, bool]:
    """Where the repetition goes, and whether one that was broken off there is to be continued."""
    if given is None:
        base = found.folder.resolve()
        number, folder = 1, base.with_name(f"{base.name}_rerun")
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}_rerun-{number}")
        return folder, False
    there = any((given / name).exists() for name in (METRICS, TEST_SCORES))
    if given.resolve() == found.folder.resolve() or there:
        raise UserError(f"{given} holds a finished run or a test: name another --output-dir for the repetition")
    return given, (given / LAST).is_file() or bool(seeds_in(given))


def _argv(args: argparse.Namespace, found: Record, folder: Path, scratch: Path) -> list[str]:
    """The command line that repeats the record into another folder."""
    config = found.folder / OPTIONS
    if found.is_test:
        config = scratch / OPTIONS
        config.write_text(yaml.safe_dump(dict(found.options)), encoding="utf-8")
    argv = ["--config", str(config), "--output-dir", str(folder)]
    if not found.is_test:
        argv += ["--model-path", str(folder / BEST), "--checkpoint-path", str(folder / LAST)]
    return argv + (["--device", args.device] if args.device else [])


def _repeat(argv: list[str], option_file: OptionFile, found: Record) -> int:
    if found.is_test:
        return test(argv, option_file)
    return train(option_file.parse_args(argv), found.dataset)


def _say_code(found: Record) -> None:
    """Name what of code, packages and machine is not as it was."""
    changes = list(_changes(found.environment, environment(), (*_DECISIVE, *_NAMED_TOO)))
    _say("code and machine", changes)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        one, other = then.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, sorted(one.keys() | other.keys()))
        elif one != other:
            yield f"{key}: {one}, now {other}"


def _say_options(found: Record, now: Mapping[str, Any]) -> None:
    """Name options that were edited since, and those that mean something else to this version."""
    options, scores = found.options, found.folder / RUN_SCORES
    changes = []
    if not found.is_test and scores.is_file():
        made = read_scores(scores).options
        changes += [f"{line} in {OPTIONS}" for line in _changes(made, options, sorted(made.keys() | options.keys()))]
    changes += [f"{key}: unknown then, now {now[key]}" for key in now if key not in options and key not in _OWN]
    _say("options", changes)


def _check_data(found: Record, anyway: bool) -> None:
    """Name files that are not what they were; refuse to go on with them unless ``anyway``."""
    if found.sources is None:
        print("data: the run does not say what it read (it was made by an older version)")
        return
    known = list({source.path: source for source in found.sources}.values())
    with ThreadPoolExecutor() as pool:
        # disable=None: no bar where stderr is not a terminal.
        states = list(tqdm(pool.map(_state, known), "checking data", len(known), disable=None, leave=False))
    changes = [f"{source.path}: {state}" for source, state in zip(known, states, strict=True) if state]
    unread = sum(not source.sha256 for source in known)
    _say("data", changes, f"{len(known)} files" + (f", of {unread} only the size is known" if unread else ""))
    if changes and not anyway:
        missing = all(state == "missing" for state in states if state)
        there = found.environment.get("folder")
        hint = f" (the run was started in {there})" if missing and there else ""
        raise UserError(
            f"{len(changes)} of {len(known)} files that {found.folder} was made from are not what they were, "
            f"the first is {changes[0]}{hint}; put them back, or repeat it with what is there by --anyway"
        )


def _state(source: Source) -> str:
    """What is wrong with a file; empty where nothing is."""
    path = Path(source.path)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != source.bytes:
        return f"{source.bytes} bytes, now {path.stat().st_size}"
    if source.sha256.startswith(CRC):
        same = source.sha256 == f"{CRC}{open_store(path.parent).manifest.crc32:08x}"
    else:
        same = not source.sha256 or source.sha256 == short_hash(path)
    return "" if same else "changed"


def _say(what: str, changes: Sequence[str], more: str = "") -> None:
    print(f"{what}: " + (f"{len(changes)} not as then" if changes else "as then") + (f" ({more})" if more else ""))
    for change in changes[:_NAMED]:
        print(f"  {change}")
    if len(changes) > _NAMED:
        print(f"  and {len(changes) - _NAMED} more")


def _conclude(found: Record, folder: Path, findings: Sequence[Finding], tolerance: float) -> int:
    """Print what was found and the verdict; 0 for a match."""
    width = max(len(item.file) for item in findings)
    print(f"\n{folder} beside {found.folder}:")
    for item in findings:
        print(f"  {item.file:{width}}  {item.said}")
    if all(item.exact for item in findings):
        print("match: the same numbers, bit for bit")
        return 0
    why = list(_reasons(found, folder))
    close = all(item.apart <= tolerance for item in findings)
    if not why:
        near = f", though within {tolerance:g}" if close else ""
        print(f"mismatch: same code, versions and device, so the same bits were expected{near}")
        return EXIT_MISMATCH
    said = "match" if close else "mismatch"
    print(f"{said}: {'within' if close else 'beyond'} {tolerance:g}; the same bits cannot be expected ({why[0]})")
    return 0 if close else EXIT_MISMATCH


def _reasons(found: Record, folder: Path) -> Iterator[str]:
    """Why other bits may come out: what differs, or a GPU that was not asked for the same ones."""
    now = (
        read_scores(folder / TEST_SCORES).environment
        if found.is_test
        else read_json(folder / ENVIRONMENT, "environment")
    )
    yield from _changes(found.environment, now, ("device", *_DECISIVE))
    if now.get("device") != "cpu" and not now.get("deterministic"):
        yield "on a GPU without --deterministic"
