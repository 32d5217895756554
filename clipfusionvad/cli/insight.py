"""Analyse a test or a model: classes, alarms, latency, calibration, prompts, gates, graphs, attention, transfer."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import evaluate, score_videos
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.files import check_writable
from clipfusionvad.io.option import add_arguments
from clipfusionvad.models import find_method
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.tools.analysis.registry import ANALYSES, FROM_MODEL, FROM_RUNS, FROM_SCORES, options, summary
from clipfusionvad.tools.analysis.result import FORMATS, AnalysisResult, write_result
from clipfusionvad.tools.analysis.transfer import Source
from clipfusionvad.tools.analysis.view import LoadedModel
from clipfusionvad.tools.demo import make_demo

#: The options of a run that say where its test data is, and how it is read.
DATA = (
    *("test_list", "gt_path", "gt_segment_path", "gt_label_path", "feature_root", "stream_folders"),
    *("frames_per_snippet", "packed", "packed_dir", "check"),
)
_READS = {
    "the scores of a run or a test (its folder, or a scores file)": FROM_SCORES,
    "a model and its test data (the folder of a run, or a model file with the options of a test)": FROM_MODEL,
    "several runs (their folders)": FROM_RUNS,
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in ANALYSES:
        raise UserError(f"unknown analysis {name!r}{nearest(name, ANALYSES)}; there are: {', '.join(ANALYSES)}")
    args, test_argv = _parse(name, rest)
    for path in (args.output, args.output.with_suffix(".csv")):
        check_writable(path)
    result = _analyse(name, args, test_argv)
    print("\n\n".join(result.lines))
    files = write_result(result, args.output, args.formats)
    print(f"\nresults: {', '.join(map(str, files))}")
    return 0


def _overview() -> str:
    lines = ["usage: python -m clipfusionvad insight ANALYSIS SOURCE --output FILE.png [options]", "", str(__doc__)]
    for title, analyses in _READS.items():
        lines += ["", f"analyses of {title}:"]
        for analysis in analyses:
            flags = ", ".join(declared.flag for declared in options(analysis))
            lines.append(f"  {analysis.__name__:<12} {summary(analysis)}{f' ({flags})' if flags else ''}")
    lines += ["", "common:", "  --output FILE    the figure; its numbers are written into FILE.csv beside it"]
    lines += [f"  --formats …      further formats of the figure: {', '.join(FORMATS)}"]
    lines += ["", "--help after ANALYSIS explains its options"]
    return "\n".join(lines)


def _parse(name: str, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options of an analysis and, for an analysis of models, the rest, which are options of a test."""
    analysis = ANALYSES[name]
    parser = Parser(
        prog=f"clipfusionvad insight {name}",
        description=f"{summary(analysis)}.",
        formatter_class=HelpFormatter,
    )
    many, scores = analysis in FROM_RUNS, analysis in FROM_SCORES
    where = "folders of runs" if many else "folder of a run or a test" if scores else "folder of a run, or a model file"
    parser.add_argument("source", type=Path, nargs="+" if many else 1, help=where)
    parser.add_argument("--output", type=_figure, required=True, help="the figure; numbers go into a .csv beside it")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[], help="further formats of the figure")
    add_arguments(parser, options(analysis))
    if scores:
        return parser.parse_args(argv), []
    parser.epilog = "Options of a test, such as --device or --test-list, may follow."
    return parser.parse_known_args(argv)


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ArgumentTypeError(f"{text!r} must end in one of: {', '.join('.' + suffix for suffix in FORMATS)}")
    return path


def _analyse(name: str, args: Namespace, test_argv: Sequence[str]) -> AnalysisResult:
    analysis = ANALYSES[name]
    chosen = {declared.name: getattr(args, declared.name) for declared in options(analysis)}
    if analysis in FROM_SCORES:
        return analysis(_read_test(args.source[0]), **chosen)
    if analysis in FROM_MODEL:
        return analysis(_load(args.source[0], test_argv), **chosen)
    return analysis(*_sources(args.source, test_argv))


def _read_test(source: Path) -> TestResult:
    from clipfusionvad.report.results import read_run

    test = read_scores(source) if source.is_file() else read_run(source).tested
    if test is None or test.videos.truth is None:
        raise UserError(f"{source} holds no scores with their truth: test the model with --output-dir first")
    return test


def _load(source: Path, test_argv: Sequence[str]) -> LoadedModel:
    """Load a model as a test would load it."""
    from clipfusionvad.cli.load import find_source, load_model, parse_over_model
    from clipfusionvad.cli.option_files import option_file_of
    from clipfusionvad.cli.prepare import prepare_test_set

    dataset, argv = find_source(source, test_argv)
    args, file = parse_over_model(argv, option_file_of(dataset))
    if args.demo:
        make_demo(dataset)
    model, _ = load_model(args, dataset, file)
    model.to(pick_device(args.device)).eval()
    return LoadedModel(model, dataset.prompts, partial(prepare_test_set, args, dataset))


def _sources(runs: Sequence[Path], test_argv: Sequence[str]) -> tuple[list[Source], list[tuple[str, list[str]]]]:
    """Return the models of runs and their test data; runs with the same test data make one target."""
    from clipfusionvad.cli.load import find_source, parse_over_model, read_run_options
    from clipfusionvad.cli.option_files import option_file_of

    recorded = [read_run_options(run) for run in runs]
    data = {
        (dataset.name, *map(str, map(record.get, DATA))): run
        for run, (dataset, record) in zip(runs, recorded, strict=True)
    }
    targets = [read_run_options(run) for run in data.values()]
    titles = _unique([dataset.title for dataset, _ in targets], list(data.values()))
    names = _unique([f"{record.get('method')} on {dataset.title}" for dataset, record in recorded], runs)
    sources = []
    for name, run in zip(names, runs, strict=True):
        dataset, argv = find_source(run, test_argv)
        args, file = parse_over_model(argv, option_file_of(dataset))
        weight = _class_weight(args, dataset, file)
        test = partial(_test_on, targets, file, args.method, dataset, weight is not None, test_argv)
        sources.append(Source(name, dataset.labels, weight, test))
    return sources, [(title, dataset.labels) for title, (dataset, _) in zip(titles, targets, strict=True)]


def _unique(names: Sequence[str], runs: Sequence[Path]) -> list[str]:
    """Return the names of runs, with the folder where two are the same."""
    return [f"{name} ({run})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def _class_weight(args: Namespace, dataset: Dataset, file: ModelFile) -> str | None:
    """Return the first weight of the model whose shape depends on the number of classes."""
    from clipfusionvad.cli.prepare import prepare_model

    more = replace(dataset, classes={**dataset.classes, "one more": "something else"})
    here, there = (prepare_model(args, known, file)[0].state_dict() for known in (dataset, more))
    return next((name for name in here if here[name].shape != there[name].shape), None)


def _test_on(
    targets: Sequence[tuple[Dataset, Mapping[str, Any]]],
    file: ModelFile,
    method: str,
    trained_on: Dataset,
    keeps_classes: bool,
    test_argv: Sequence[str],
    index: int,
) -> dict[str, Any]:
    """Return the metrics of a model on a target; it may keep the classes that it was trained on."""
    from clipfusionvad.cli.load import load_model, stored_options
    from clipfusionvad.cli.option_files import option_file_of
    from clipfusionvad.cli.options import build_parser, config_tokens
    from clipfusionvad.cli.prepare import prepare_test_set

    target, record = targets[index]
    if record.get("demo"):
        make_demo(target)
    parser = build_parser(target, find_method(method))
    known = {action.dest for action in parser._actions}
    data = {key: record[key] for key in DATA if key in record and key in known}
    tokens = config_tokens(parser, data, "the options of the run")
    argv = [*tokens, "--method", method, "--model-path", file.path, *test_argv]
    args = option_file_of(target).parse_args(argv, stored_options(file, method))
    foreign = keeps_classes and trained_on.labels != target.labels
    model, _ = load_model(args, trained_on if foreign else target, file)
    device = pick_device(args.device)
    videos = prepare_test_set(args, target)
    scores = score_videos(model.to(device), videos.features, device, args.precision)
    if foreign:
        scores = [replace(video, classes=None) for video in scores]
    return evaluate(scores, videos, args.protocol)
