"""Judge score files of any program on a benchmark: metrics, intervals over test videos, paired differences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, find_dataset
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.files import check_text, check_writable, write_json
from clipfusionvad.io.option import Option, add_arguments, declared_options, from_arguments
from clipfusionvad.tools.tables import MOST_RESAMPLES, RESAMPLES

_TRUTH = "frame truth: 0 or 1 per frame of all videos joined (.npy), or a keyed annotation file"
_LENGTHS = "frames of each test video, in the order of joined scores: CSV video,frames, or numbers (.npy)"
_CONVENTION = "which frames are judged, such as floor16, ceil16, all-frames (default: the first that fits)"
_FRAMES = "frames per score: 16, 1, or equal for equal parts of each video (default: what fits the truth)"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The truth that scores are judged by, and what is computed."""

    truth: Annotated[str | None, Option(_TRUTH, metavar="FILE")] = None
    lengths: Annotated[str | None, Option(_LENGTHS, metavar="FILE")] = None
    annotations: Annotated[
        tuple[str, ...], Option("official annotation files, as for 'lists'", metavar="FILE", nonempty=True)
    ] = ()
    convention: Annotated[str | None, Option(_CONVENTION, metavar="NAME")] = None
    frames_per_score: Annotated[str | None, Option(_FRAMES, metavar="N")] = None
    smooth: Annotated[
        tuple[float, ...],
        Option(
            "smooth each video's scores: sigma of a Gaussian in snippets", minimum=0, metavar="SIGMA", nonempty=True
        ),
    ] = (0.0,)
    reference: Annotated[str | None, Option("file that others are compared with (default: the first)")] = None
    resamples: Annotated[int, Option("resamples of the test videos; 0: none", minimum=0, maximum=MOST_RESAMPLES)] = (
        RESAMPLES
    )
    seed: Annotated[int, Option("seed of the resamples", minimum=0)] = 0


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    options = from_arguments(EvaluateOptions, vars(args))
    dataset = find_dataset(args.dataset)
    paths = list(dict.fromkeys(args.scores))
    stride = options.frames_per_score
    if stride not in (None, "equal") and not (stride.isdigit() and int(stride) > 0):
        raise UserError(f"--frames-per-score {stride!r}: give 16, 1, another number of frames, or equal")
    if options.reference:
        paths = list(dict.fromkeys([options.reference, *paths]))
    if args.json:
        read = [*paths, *options.annotations, *filter(None, (options.truth, options.lengths))]
        if args.json.resolve() in {Path(path).resolve() for path in read}:
            raise UserError(f"--json {args.json} would replace a file that is read: name another one")
        check_writable(args.json)
        check_text(args.json)

    from clipfusionvad.report.formatting import to_text
    from clipfusionvad.tools.evaluate.metrics import difference_table, doubts, evaluate_files, metrics_table, record
    from clipfusionvad.tools.evaluate.truth import read_known_truth

    known = None
    if options.truth or options.annotations or options.lengths:
        known = read_known_truth(options.truth, options.annotations, options.lengths, dataset)
    sigmas = tuple(dict.fromkeys(options.smooth))
    results = evaluate_files(paths, known, dataset, sigmas, options.convention, stride, options.resamples, options.seed)
    reference = results[0] if len(results) > 1 else None
    records = [record(result, reference) for result in results]
    for result in results:
        for note in result.judged.notes:
            print(note)
        for doubt in doubts(result) if result.smooth == sigmas[0] else ():
            warn(doubt)
    for result, about in zip(results, records, strict=True):
        if result.smooth == sigmas[0]:
            size = about["frames_per_score"]
            covered = "equal parts of each video" if size == "equal" else f"{size} frames per score"
            videos = f"{about['videos']} videos" if about["videos"] else "all videos as one"
            print(f"{result.path}: {videos}, {about['frames']} frames ({about['convention']}), {covered}")
    print(f"\n{to_text(metrics_table(results))}")
    if reference:
        print(f"\n{to_text(difference_table(results, reference))}")
    print(
        f"\nin percent; [95 % interval over {options.resamples} resamples of the test videos]; false alarms: frames of "
        f"normal videos with a score above 0.5; AUC of videos ranks whole videos and cannot be compared with AUC"
    )
    if args.json:
        whole: dict[str, Any] = {}
        for result, about in zip(results, records, strict=True):
            first = whole.setdefault(result.path, about)
            if len(sigmas) > 1:
                first.setdefault("by_smooth", {})[f"{result.smooth:g}"] = {
                    k: v for k, v in about.items() if k != "by_smooth"
                }
        write_json(args.json, whole)
        print(f"json          {args.json}")
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad evaluate", description=__doc__)
    parser.add_argument(
        "scores", nargs="+", metavar="SCORES", help=".npy, .csv, .json or .npz files, or folders with NAME.npy"
    )
    names = f"one of {', '.join(DATASETS)}, or a YAML file of your own"
    parser.add_argument("--dataset", required=True, metavar="NAME", help=names)
    add_arguments(parser, declared_options(EvaluateOptions).values())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    return parser
