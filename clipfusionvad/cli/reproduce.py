"""Repeat a paper's table from features and annotations: lists, checks, packing, training, tests, the table."""

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from clipfusionvad.cli import lists, pack, sweep
from clipfusionvad.cli.options import OptionFile, option_file_of, settings_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import Dataset, find_dataset
from clipfusionvad.engine.config import recorded
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, nearest, warn
from clipfusionvad.io.files import check_writable, write_text
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments
from clipfusionvad.models import find_method

if TYPE_CHECKING:
    from clipfusionvad.engine.config import Settings
    from clipfusionvad.tools.reproduce import Estimate

_METHODS = "which methods (default: all with published figures whose features these may be)"
_SEEDS = "how many seeds, or which ones"
TABLE = "table"


@dataclass(frozen=True)
class ReproduceOptions:
    """What is reproduced, and where."""

    features: Annotated[str, Option("folder of the .npy feature files", metavar="DIR", required=True)]
    annotations: Annotated[str, Option("folder of the benchmark's annotations", metavar="DIR", required=True)]
    methods: Annotated[tuple[str, ...], Option(_METHODS, metavar="METHOD")] = ()
    seeds: Annotated[tuple[int, ...], Option(_SEEDS, minimum=0, metavar="N", nonempty=True)] = (5,)
    output: Annotated[str | None, Option("folder of all that is written (default: runs/reproduce_NAME)")] = None
    jobs: Annotated[int, Option("trainings at a time; each takes the next GPU", minimum=1)] = 1
    dry_run: Annotated[bool, Option("check the data, print the estimates and commands, and write nothing")] = False
    ignore: Annotated[tuple[str, ...], Option("checks of doctor whose errors do not stop it", metavar="CHECK")] = ()
    test_crop: Annotated[int | None, Option("crop used for test videos (default: the dataset's)", metavar="K")] = None
    made_up: Annotated[bool, Option("the features are made up, and the table must say so")] = False


@dataclass(frozen=True)
class Group:
    """Methods that read the same inputs of the same features: they share lists and packed features."""

    methods: list[str]
    features: Path
    settings: "Settings"
    test_crop: int | None


def main(argv: list[str]) -> int:
    args, flags = make_parser().parse_known_args(argv)
    options, dataset = from_arguments(ReproduceOptions, vars(args)), find_dataset(args.dataset)
    from clipfusionvad.tools.reproduce import find_annotations

    flags = [flag for flag in flags if flag != "--"]
    files = find_annotations(options.annotations, dataset)
    option_file = option_file_of(dataset)
    groups = _group(option_file, options, flags)
    _seeds(option_file, groups[0].methods[0], options, flags)
    output = Path(options.output or f"runs/reproduce_{dataset.name}")
    if not options.dry_run:
        return _reproduce(option_file, options, args.dataset, groups, files, output, flags)
    with tempfile.TemporaryDirectory() as folder:
        _make_lists(groups, args.dataset, files, Path(folder))
        _check(option_file, options, groups, Path(folder), flags)
        _print_estimates(option_file, options, groups, Path(folder), output, flags)
    print("\nThe commands:")
    for group in groups:
        print(_shown(_lists_command(group, args.dataset, files, output)))
        print(_shown(["pack", "--dataset", args.dataset, *_data_flags(group, output, dataset), *flags]))
    print(_shown(_sweep_command(options, args.dataset, output, flags)))
    print(f"\n{output / 'plan.yaml'} will hold:\n{_plan(groups, output, dataset)}", end="")
    return 0


def make_parser() -> Parser:
    parser = Parser(
        prog="clipfusionvad reproduce",
        description=__doc__,
        usage="clipfusionvad reproduce --features DIR --annotations DIR --dataset NAME [options] [options of training]",
        epilog="All other options are those of the training, for every method: python -m clipfusionvad train --help",
    )
    parser.add_argument("--dataset", required=True, help="ucf, xd, shanghaitech or msad")
    add_arguments(parser, declared_options(ReproduceOptions).values())
    return parser


def _group(option_file: OptionFile, options: ReproduceOptions, flags: Sequence[str]) -> list[Group]:
    """Return the methods to train by their inputs.

    Of those that the user did not name, the ones are left out whose features these are not, and are named.
    """
    from clipfusionvad.data.config import FRAMES_PER_SNIPPET
    from clipfusionvad.tools.reproduce import feature_folder, misfit, published_methods

    dataset, groups = option_file.DATASET, dict[Any, Group]()
    known = published_methods(dataset.name)
    for method in options.methods:
        if method not in known:
            raise UserError(f"--methods {method} has no published figure on {dataset.title}; known: {', '.join(known)}")
    for method in dict.fromkeys(options.methods or known):
        parsed = option_file.parse_args([f"--method={method}", *flags])
        settings = settings_of(parsed, dataset)
        if settings.run.demo:
            raise UserError("--demo makes its own features: use 'python -m clipfusionvad train --demo' instead")
        reason = misfit(options.features, settings)
        if not (reason or options.methods or settings.data.stride in (None, FRAMES_PER_SNIPPET)):
            stride = settings.data.stride
            reason = f"it needs a row for each {stride} frames; give --methods {method} if these features have that"
        if reason and options.methods:
            raise UserError(f"{method} cannot be trained on these features: {reason}")
        if reason:
            warn(f"{method} is left out: {reason}")
            continue
        folder, data, model = feature_folder(options.features, settings), settings.data, settings.model
        inputs = find_method(method).sampling_of(model.options)
        key = folder, data.stride, data.stream_folders, model.feature_width, repr(inputs), _single_label(settings)
        groups.setdefault(key, Group([], folder, settings, options.test_crop)).methods.append(method)
    if not groups:
        raise UserError(f"no method with published figures on {dataset.title} can be trained on {options.features}")
    return list(groups.values())


def _single_label(settings: "Settings") -> bool:
    """Whether a method's lists leave out videos of several classes."""
    return find_method(settings.model.method).single_label and settings.dataset.multi_label


def _lists_command(group: Group, dataset: str, files: tuple[list[Path], list[Path]], output: Path) -> list[str]:
    settings, (annotations, splits) = group.settings, files
    command = ["lists", "--dataset", dataset, "--features", str(group.features), "--output", str(_place(group, output))]
    command += ["--annotations", *map(str, annotations), *(["--split", *map(str, splits)] if splits else [])]
    command += ["--protocol", settings.training.protocol, *(["--single-label"] if _single_label(settings) else [])]
    command += ["--segments", settings.data.segments or "fixed"]
    command += [] if group.test_crop is None else ["--test-crop", str(group.test_crop)]
    return [*command, "--frames-per-snippet", str(settings.data.frames_per_snippet)]


def _place(group: Group, output: Path) -> Path:
    return output / "data" / group.methods[0]


def _data_options(group: Group, output: Path, dataset: Dataset) -> dict[str, str]:
    """Return the options that name the group's lists and truth."""
    place, files, truth = _place(group, output), dataset.list_files, dataset.truth_files
    # Equal parts of a video need its number of frames, which only the keyed truth holds.
    frames = files["truth"] if group.settings.data.stride is None else truth["frames"]
    named = {"train_list": files["train"], "test_list": files["test"], "gt_path": frames}
    named |= {"gt_segment_path": truth["segments"], "gt_label_path": truth["labels"]}
    return {option: str(place / name) for option, name in named.items()}


def _data_flags(group: Group, output: Path, dataset: Dataset) -> list[str]:
    named = _data_options(group, output, dataset)
    return [f"--method={group.methods[0]}", *(f"--{key.replace('_', '-')}={path}" for key, path in named.items())]


def _make_lists(groups: Sequence[Group], dataset: str, files: tuple[list[Path], list[Path]], output: Path) -> None:
    for group in groups:
        print(f"lists of {', '.join(group.methods)}")
        lists.main(_lists_command(group, dataset, files, output)[1:])


def _check(
    option_file: OptionFile, options: ReproduceOptions, groups: Sequence[Group], output: Path, flags: Sequence[str]
) -> None:
    """Print what doctor finds in the data; ``UserError`` where it finds an error that ``--ignore`` does not name."""
    from clipfusionvad.tools.doctor import ERROR, checks_in, data, features, lines, run_checks, truth
    from clipfusionvad.tools.doctor.scan import DatasetScan

    checks = checks_in(data, features, truth)
    for name in options.ignore:
        if name not in checks:
            raise UserError(f"--ignore {name} is not a check of doctor{nearest(name, checks)}")
    for group in groups:
        print(f"\nchecks of the data of {', '.join(group.methods)}")
        parsed = option_file.parse_args([*_data_flags(group, output, option_file.DATASET), *flags])
        scan = DatasetScan(settings_of(parsed, option_file.DATASET))
        findings = run_checks(checks, scan)
        print("\n".join(lines(findings)) or "nothing found")
        if errors := [one for one in findings if one.level == ERROR and one.check not in options.ignore]:
            known = " ".join(dict.fromkeys(finding.check for finding in errors))
            what = f"doctor finds {len(errors)} errors in the data, so nothing is trained"
            raise UserError(f"{what} (correct them, or continue with --ignore {known}): {errors[0]}")


def _print_estimates(
    option_file: OptionFile, options: ReproduceOptions, groups: Sequence[Group], data: Path, output: Path,
    flags: Sequence[str],
) -> None:  # fmt: skip
    """Print what all runs are likely to cost, from a few steps; ``UserError`` where the disk is too small."""
    from clipfusionvad.cli.training import build_trainer, read_training_data
    from clipfusionvad.engine.device import pick_device
    from clipfusionvad.report.formatting import to_text
    from clipfusionvad.tools.reproduce import estimate, estimate_table

    found: list[Estimate] = []
    for group in groups:
        for method in group.methods:
            own = [*_data_flags(group, data, option_file.DATASET), f"--method={method}", *flags, "--no-check"]
            settings = settings_of(option_file.parse_args(own), option_file.DATASET)
            read = read_training_data(settings, pick_device(settings.device.device))
            found.append(estimate(*build_trainer(settings, read), read.test_set))
    seeds = len(_seeds(option_file, groups[0].methods[0], options, flags))
    table = estimate_table(found, seeds)
    print(f"\n{to_text(table)}\n{table.note}")
    there = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    needed, free = sum(one.packed + seeds * one.run for one in found), shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"{there} has {free / 1e9:.1f} of about {needed / 1e9:.1f} GB free: name another --output")


def _seeds(option_file: OptionFile, method: str, options: ReproduceOptions, flags: Sequence[str]) -> list[int]:
    """Return the seeds of all methods: the sweep counts from that of the first one."""
    return sweep.chosen_seeds(options.seeds, option_file.parse_args([f"--method={method}", *flags]).seed)


def _sweep_command(options: ReproduceOptions, dataset: str, output: Path, flags: Sequence[str]) -> list[str]:
    seeds = list(map(str, options.seeds))
    command = ["sweep", str(output / "plan.yaml"), "--dataset", dataset, "--no-full", "--seeds", *seeds]
    return [*command, "--output-dir", str(output / "runs"), "--jobs", str(options.jobs), *flags]


def _plan(groups: Sequence[Group], output: Path, dataset: Dataset) -> str:
    """Return the file of the sweep: a cell for each method, with its lists."""
    import yaml

    cells = {
        method: {"method": method, **_data_options(group, output, dataset)}
        for group in groups
        for method in group.methods
    }
    return yaml.safe_dump({"method": next(iter(cells)), "cells": cells}, sort_keys=False)


def _shown(command: Sequence[str]) -> str:
    return f"python -m clipfusionvad {shlex.join(command)}"


def _reproduce(
    option_file: OptionFile, options: ReproduceOptions, dataset: str, groups: Sequence[Group],
    files: tuple[list[Path], list[Path]], output: Path, flags: Sequence[str],
) -> int:  # fmt: skip
    plan, begun = output / "plan.yaml", (output / "runs").exists()
    check_writable(plan)
    _make_lists(groups, dataset, files, output)
    _check(option_file, options, groups, output, flags)
    if not begun:
        _print_estimates(option_file, options, groups, output, output, flags)
    for group in groups:
        pack.main(["--dataset", dataset, *_data_flags(group, output, option_file.DATASET), *flags])
    write_text(plan, _plan(groups, output, option_file.DATASET))
    code = sweep.main(_sweep_command(options, dataset, output, flags)[1:])
    if code != EXIT_INTERRUPTED:
        methods = [method for group in groups for method in group.methods]
        _write_tables(option_file, options, methods, output, flags)
    return code


def _write_tables(
    option_file: OptionFile, options: ReproduceOptions, methods: Sequence[str], output: Path, flags: Sequence[str]
) -> None:
    """Print the table of all methods, and write it as Markdown, LaTeX and a page."""
    from clipfusionvad.report.formatting import to_latex, to_markdown
    from clipfusionvad.report.page import table_page
    from clipfusionvad.tools.reproduce import reproduction_table
    from clipfusionvad.tools.tables.collect import collect

    settings = [setting for setting in collect([output / "runs"]) if setting.method in methods]
    seeds = _seeds(option_file, methods[0], options, flags)
    for setting in settings:
        # Others may be left of a run with more seeds.
        setting.results = [result for result in setting.results if result.seed in seeds]
    differing = partial(_differing, option_file, flags)
    changed = {method: text for method in methods if (text := differing(method))}
    table = reproduction_table(settings, option_file.DATASET, changed, options.made_up)
    print(f"\n{to_markdown(table)}")
    for suffix, text in ((".md", to_markdown(table)), (".tex", to_latex(table)), (".html", table_page(table))):
        write_text(output / f"{TABLE}{suffix}", text)
    print(f"table         {output / TABLE}.md, .tex and .html")


def _differing(option_file: OptionFile, flags: Sequence[str], method: str) -> str:
    """Return which options of a method differ from the published ones, as ``lr 0.001 (published: 1e-05)``."""
    from clipfusionvad.tools.tables.collect import PLACES

    used, published = (recorded(vars(option_file.parse_args([f"--method={method}", *more]))) for more in (flags, ()))
    keys = sorted((used.keys() | published.keys()) - PLACES)
    return ", ".join(
        f"{key} {_value(used, key)} (published: {_value(published, key)})"
        for key in keys
        if used.get(key) != published.get(key)
    )


def _value(options: Mapping[str, Any], key: str) -> str:
    return str(options.get(key, "none"))
