"""Look into a test or a model: classes, alarms, latency, calibration, prompts, gates, graphs, attention, transfer."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipfusionvad.cli.load import find_source, load_model, parse_over_model, read_run_options, stored_options
from clipfusionvad.cli.options import Parser, build_parser, config_tokens
from clipfusionvad.cli.prepare import option_file_of, prepare_model, prepare_test_set
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import evaluate, score_videos
from clipfusionvad.io.argtypes import non_negative_float, non_negative_int, positive_float, positive_int
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.files import check_writable
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.models import find_method
from clipfusionvad.report.results import read_run
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.tools.analysis.alarms import alarms_insight
from clipfusionvad.tools.analysis.attention import attention_insight
from clipfusionvad.tools.analysis.calibration import BINS, calibration_insight
from clipfusionvad.tools.analysis.classes import classes_insight
from clipfusionvad.tools.analysis.confusion import confusion_insight
from clipfusionvad.tools.analysis.gates import find_gam, gates_insight
from clipfusionvad.tools.analysis.graph import graph_insight
from clipfusionvad.tools.analysis.latency import RATES, latency_insight
from clipfusionvad.tools.analysis.prompts import WORDS, prompts_insight
from clipfusionvad.tools.analysis.result import FORMATS, Insight, write_insight
from clipfusionvad.tools.analysis.transfer import Tried, transfer_insight
from clipfusionvad.tools.analysis.view import View, view
from clipfusionvad.tools.demo import make_demo

#: What of a run's options says where its test data is, and how it is read.
DATA = (
    *("test_list", "gt_path", "gt_segment_path", "gt_label_path", "feature_root", "stream_folders"),
    *("frames_per_snippet", "packed", "packed_dir", "check"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "--merge-seconds": {"type": non_negative_float, "default": 1.0, "help": "gaps in an alarm (default: %(default)s)"},
    "--min-seconds": {"type": non_negative_float, "default": 1.0, "help": "shortest alarm (default: %(default)s)"},
    "--rates": {"type": positive_float, "nargs": "+", "default": list(RATES), "help": "false alarms per hour"},
    "--bins": {"type": positive_int, "default": BINS, "help": "bins of scores (default: %(default)s)"},
    "--words": {"type": positive_int, "default": WORDS, "help": "words for each vector (default: %(default)s)"},
    "--video": {"help": "name of the test video (default: the first anomalous one)"},
    "--window": {"type": non_negative_int, "help": "which input of that video (default: the most abnormal)"},
}


@dataclass(frozen=True)
class Kind:
    """A line of help, the options that it reads, and how it is made: of scores, or of a model."""

    summary: str
    options: tuple[str, ...]
    make: Callable[..., Insight]


def _rule(own: Namespace) -> Thresholds:
    return Thresholds(min_seconds=own.min_seconds, merge_seconds=own.merge_seconds)


def _window(own: Namespace, seen: View) -> int:
    if own.window is None:
        return seen.busiest()
    if own.window >= len(seen.rows):
        raise UserError(f"--window {own.window}, but {seen.name} makes {len(seen.rows)} inputs, counted from 0")
    return own.window


FROM_SCORES: dict[str, Kind] = {
    "classes": Kind("AUC, AP and detection AP by class", (), lambda tested, own: classes_insight(tested)),
    "confusion": Kind(
        "which classes are taken for which, by frames and videos", (), lambda tested, own: confusion_insight(tested)
    ),
    "alarms": Kind(
        "false alarms per hour against recall",
        ("--merge-seconds", "--min-seconds"),
        lambda tested, own: alarms_insight(tested, _rule(own)),
    ),
    "latency": Kind(
        "seconds until an event is noticed, at fixed false alarms per hour",
        ("--rates", "--merge-seconds", "--min-seconds"),
        lambda tested, own: latency_insight(tested, _rule(own), own.rates),
    ),
    "calibration": Kind(
        "whether scores are probabilities", ("--bins",), lambda tested, own: calibration_insight(tested, own.bins)
    ),
}
FROM_VIDEO: dict[str, Kind] = {
    "gates": Kind("the gates of global attention over a video", ("--video",), lambda m, v, own: gates_insight(m, v)),
    "graph": Kind(
        "both graphs over the snippets of an input",
        ("--video", "--window"),
        lambda model, seen, own: graph_insight(model, seen, _window(own, seen)),
    ),
    "attention": Kind(
        "who attends to whom along time",
        ("--video", "--window"),
        lambda model, seen, own: attention_insight(model, seen, _window(own, seen)),
    ),
}
FROM_MODEL: dict[str, Kind] = {
    "prompts": Kind(
        "words near the learned prompts, likeness of the classes",
        ("--words",),
        lambda model, labels, own: prompts_insight(model, labels, own.words),
    ),
    **FROM_VIDEO,
}
FROM_RUNS: dict[str, Kind] = {
    "transfer": Kind("models on the test data of each other's datasets", (), lambda runs, more: transfer(runs, more)),
}
GROUPS = {
    "of the scores of a run or a test (its folder, or a scores file)": FROM_SCORES,
    "of a model and its test data (the folder of a run, or a model file with the options of a test)": FROM_MODEL,
    "of several runs (their folders)": FROM_RUNS,
}
KINDS = {name: kind for group in GROUPS.values() for name, kind in group.items()}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    what, rest = argv[0], argv[1:]
    if what not in KINDS:
        raise UserError(f"unknown insight {what!r}{nearest(what, KINDS)}; there are: {', '.join(KINDS)}")
    own, more = _parse(what, rest)
    check_writable(own.output)
    check_writable(own.output.with_suffix(".csv"))
    if what in FROM_SCORES:
        found = FROM_SCORES[what].make(_tested(own.source[0]), own)
    elif what in FROM_RUNS:
        found = FROM_RUNS[what].make(own.source, more)
    else:
        found = _of_model(what, own, more)
    print("\n\n".join(found.lines))
    files = write_insight(found, own.output, own.formats)
    print(f"\nresults: {', '.join(map(str, files))}")
    return 0


def _overview() -> str:
    lines = ["usage: python -m clipfusionvad insight WHAT RUN-OR-MODEL --output FILE.png [options]", "", str(__doc__)]
    for title, kinds in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, kind in kinds.items():
            flags = f" ({', '.join(kind.options)})" if kind.options else ""
            lines.append(f"  {name:<12} {kind.summary}{flags}")
    lines += ["", "common:", "  --output FILE    the picture; its numbers go into FILE.csv beside it"]
    lines += [f"  --formats …      further formats of the picture: {', '.join(FORMATS)}"]
    lines += ["", "--help after WHAT explains its options"]
    return "\n".join(lines)


def _parse(what: str, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options of an insight and, for those that need a model, the rest, which is for its test."""
    kind, many = KINDS[what], what in FROM_RUNS
    parser = Parser(prog=f"clipfusionvad insight {what}", description=f"Show {kind.summary}.")
    where = "folders of runs" if many else "folder of a run" + ("" if what in FROM_SCORES else ", or a model file")
    parser.add_argument("source", type=Path, nargs="+" if many else 1, help=where)
    parser.add_argument("--output", type=_picture, required=True, help="the picture; numbers go into a .csv beside it")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[], help="further formats of the picture")
    for flag in kind.options:
        parser.add_argument(flag, **OPTIONS[flag])
    if what in FROM_SCORES:
        return parser.parse_args(argv), []
    parser.epilog = "Options of a test, such as --device or --test-list, may follow."
    return parser.parse_known_args(argv)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ArgumentTypeError(f"{text!r} must end in one of: {', '.join('.' + suffix for suffix in FORMATS)}")
    return path


def _tested(source: Path) -> TestResult:
    tested = read_scores(source) if source.is_file() else read_run(source).tested
    if tested is None or tested.videos.truth is None:
        raise UserError(f"{source} holds no scores with their truth: test the model with --output-dir first")
    return tested


def _of_model(what: str, own: Namespace, more: Sequence[str]) -> Insight:
    """An insight into a model, loaded as a test would load it."""
    dataset, argv = find_source(own.source[0], more)
    option_file = option_file_of(dataset)
    args, file = parse_over_model(argv, option_file)
    if args.demo:
        make_demo(dataset)
    model, _ = load_model(args, dataset, file)
    device = pick_device(args.device)
    model.to(device).eval()
    if what not in FROM_VIDEO:
        return FROM_MODEL[what].make(model, dataset.prompts, own)
    if what == "gates":
        # Before all features are read.
        find_gam(model)
    seen = view(model, prepare_test_set(args, dataset), own.video, device)
    return FROM_VIDEO[what].make(model, seen, own)


def transfer(runs: Sequence[Path], argv: Sequence[str]) -> Insight:
    """Test the model of every run on the test data of every run; ``argv`` is of a test and goes over all."""
    given = [read_run_options(run) for run in runs]
    # Runs with the same test data make one column.
    data = {
        (dataset.name, *map(str, map(options.get, DATA))): run
        for run, (dataset, options) in zip(runs, given, strict=True)
    }
    columns = [read_run_options(run) for run in data.values()]
    targets = _apart([dataset.title for dataset, _ in columns], list(data.values()))
    sources = _apart([f"{options.get('method')} on {dataset.title}" for dataset, options in given], runs)
    tried: list[Tried] = []
    remarks: list[str] = []
    progress = tqdm(total=len(runs) * len(columns), desc="transfer", unit="test", disable=None, leave=False)
    for source, run in zip(sources, runs, strict=True):
        own, asked = find_source(run, argv)
        args, file = parse_over_model(asked, option_file_of(own))
        bound = _bound_to_classes(args, own, file)
        for target, (dataset, options) in zip(targets, columns, strict=True):
            foreign = bool(bound) and dataset.labels != own.labels
            metrics = _try(file, args.method, own if foreign else dataset, dataset, options, argv)
            tried.append(Tried(source, target, own.labels == dataset.labels, metrics))
            progress.update()
        if bound:
            remarks.append(
                f"{source} has learned something for each of its classes ({bound[0]}): on other classes it keeps its "
                f"own, and only its anomaly score is told"
            )
    progress.close()
    return transfer_insight(tried, remarks)


def _apart(names: Sequence[str], runs: Sequence[Path]) -> list[str]:
    """Names of runs, with the folder where two are the same."""
    return [f"{name} ({run})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def _bound_to_classes(args: Namespace, dataset: Dataset, file: ModelFile) -> list[str]:
    """Which weights of the model have another shape where there is a class more."""
    more = replace(dataset, classes={**dataset.classes, "one more": "something else"})
    here, there = (prepare_model(args, known, file)[0].state_dict() for known in (dataset, more))
    return [name for name in here if here[name].shape != there[name].shape]


def _try(
    file: ModelFile, method: str, classes: Dataset, target: Dataset, options: Mapping[str, Any], argv: Sequence[str]
) -> dict[str, Any]:
    """The metrics of a model, with the prompts of ``classes``, on the test data that a run's options name."""
    if options.get("demo"):
        make_demo(target)
    parser = build_parser(target, find_method(method))
    known = {action.dest for action in parser._actions}
    data = {key: options[key] for key in DATA if key in options and key in known}
    tokens = config_tokens(parser, data, "the options of the run")
    asked = [*tokens, "--method", method, "--model-path", file.path, *argv]
    args = option_file_of(target).parse_args(asked, stored_options(file, method))
    model, _ = load_model(args, classes, file)
    device = pick_device(args.device)
    videos = prepare_test_set(args, target)
    scores = score_videos(model.to(device), videos.features, device, args.precision)
    if classes is not target:
        scores = [replace(video, classes=None) for video in scores]
    return evaluate(scores, videos, args.protocol)
