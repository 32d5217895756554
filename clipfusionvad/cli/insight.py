"""Analyse a test or a model: classes, alarms, latency, calibration, prompts, gates, graphs, attention, transfer."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from clipfusionvad.cli.options import option_file_of
from clipfusionvad.cli.parser import HelpFormatter, Parser
from clipfusionvad.cli.trained_model import find_source, parse_over_checkpoint
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.setup import read_test_set, restore_model
from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.files import check_writable
from clipfusionvad.io.option import add_arguments, declared_options
from clipfusionvad.report.results import read_run
from clipfusionvad.report.scores import TestResult, read_scores
from clipfusionvad.tools.analysis.alarms import alarms, latency
from clipfusionvad.tools.analysis.attention import attention
from clipfusionvad.tools.analysis.calibration import calibration
from clipfusionvad.tools.analysis.classes import classes, confusion
from clipfusionvad.tools.analysis.gates_and_graphs import gates, graph
from clipfusionvad.tools.analysis.prompts import prompts
from clipfusionvad.tools.analysis.result import FORMATS, AnalysisResult, write_result
from clipfusionvad.tools.analysis.transfer import TrainedRun, transfer
from clipfusionvad.tools.analysis.view import LoadedModel
from clipfusionvad.tools.demo import make_demo

# All analyses, by what they read. A function's name is that of the analysis, its keywords are its options.
Analysis = Callable[..., AnalysisResult]
FROM_SCORES: tuple[Analysis, ...] = (classes, confusion, alarms, latency, calibration)
FROM_MODEL: tuple[Analysis, ...] = (prompts, gates, graph, attention)
_READS: dict[str, tuple[Analysis, ...]] = {
    "the scores of a run or a test (its folder, or a scores file)": FROM_SCORES,
    "a model and its test data (the folder of a run, or a model file with the options of a test)": FROM_MODEL,
    "several runs (their folders)": (transfer,),
}
ANALYSES = {analysis.__name__: analysis for analyses in _READS.values() for analysis in analyses}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name = argv[0]
    if name not in ANALYSES:
        raise UserError(f"unknown analysis {name!r}{nearest(name, ANALYSES)}; there are: {', '.join(ANALYSES)}")
    analysis, parser = ANALYSES[name], _parser(name)
    # After an analysis of models the options of a test may follow.
    args, rest = (parser.parse_args(argv[1:]), []) if analysis in FROM_SCORES else parser.parse_known_args(argv[1:])
    for path in (args.output, args.output.with_suffix(".csv")):
        check_writable(path)
    chosen = {name: getattr(args, name) for name in declared_options(analysis)}
    if analysis in FROM_SCORES:
        result = analysis(_read_test(args.source[0]), **chosen)
    else:
        runs = [_find(source, rest) for source in args.source]
        result = analysis(_load(runs[0]) if analysis in FROM_MODEL else runs, **chosen)
    print("\n\n".join(result.lines))
    files = write_result(result, args.output, args.formats)
    print(f"\nresults: {', '.join(map(str, files))}")
    return 0


def _overview() -> str:
    lines = ["usage: python -m clipfusionvad insight ANALYSIS SOURCE --output FILE.png [options]", "", str(__doc__)]
    for title, analyses in _READS.items():
        lines += ["", f"analyses of {title}:"]
        for analysis in analyses:
            flags = ", ".join(declared.flag for declared in declared_options(analysis).values())
            lines.append(f"  {analysis.__name__:<12} {_summary(analysis)}{f' ({flags})' if flags else ''}")
    lines += ["", "common:", "  --output FILE    the figure; its numbers are written into FILE.csv beside it"]
    lines += [f"  --formats …      further formats of the figure: {', '.join(FORMATS)}"]
    return "\n".join([*lines, "", "--help after ANALYSIS explains its options"])


def _summary(analysis: Analysis) -> str:
    return (analysis.__doc__ or "").splitlines()[0].rstrip(".")


def _parser(name: str) -> Parser:
    analysis = ANALYSES[name]
    about = f"{_summary(analysis)}."
    parser = Parser(prog=f"clipfusionvad insight {name}", description=about, formatter_class=HelpFormatter)
    many, scores = analysis is transfer, analysis in FROM_SCORES
    where = "folders of runs" if many else "folder of a run or a test" if scores else "folder of a run, or a model file"
    parser.add_argument("source", type=Path, nargs="+" if many else 1, help=where)
    parser.add_argument("--output", type=_figure, required=True, help="the figure; numbers go into a .csv beside it")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[], help="further formats of the figure")
    add_arguments(parser, declared_options(analysis).values())
    if not scores:
        parser.epilog = "Options of a test, such as --device or --test-list, may follow."
    return parser


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ArgumentTypeError(f"{text!r} must end in one of: {', '.join('.' + suffix for suffix in FORMATS)}")
    return path


def _read_test(source: Path) -> TestResult:
    test = read_scores(source) if source.is_file() else read_run(source).tested
    if test is None or test.videos.truth is None:
        raise UserError(f"{source} holds no scores with their truth: test the model with --output-dir first")
    return test


def _find(source: Path, test_argv: Sequence[str]) -> TrainedRun:
    """Return the settings and the checkpoint of a run or a model file, as a test would read them."""
    dataset, argv = find_source(source, test_argv)
    return TrainedRun(source, *parse_over_checkpoint(argv, option_file_of(dataset)))


def _load(run: TrainedRun) -> LoadedModel:
    settings, dataset = run.settings, run.settings.dataset
    if settings.run.demo:
        make_demo(dataset)
    model, _ = restore_model(settings, run.file)
    model.to(pick_device(settings.device.device)).eval()
    return LoadedModel(model, dataset.prompts, partial(read_test_set, dataset, settings.model, settings.data))
