"""Score videos with a trained model: anomaly over time, classes, segments; files, folders or a live stream."""

from __future__ import annotations

import argparse
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from clipfusionvad.cli.load import load_model, parse_over_model
from clipfusionvad.cli.option_files import option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.prepare import prepare_model
from clipfusionvad.datasets import Dataset, find_dataset
from clipfusionvad.engine.checkpoint import ModelFile, dataset_of, read_model_file
from clipfusionvad.engine.device import pick_device
from clipfusionvad.extraction.decode import VideoInfo, is_address
from clipfusionvad.extraction.encoder import ImageEncoder
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.argtypes import non_negative_float, non_negative_int, positive_float, share
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, warn
from clipfusionvad.io.files import CannotWrite, atomic_write, check_inside, check_writable, link_or_copy, read_text
from clipfusionvad.io.locks import hold
from clipfusionvad.io.signals import stop_on_signals
from clipfusionvad.metrics.segments import Thresholds
from clipfusionvad.models import Method, find_method, method_names
from clipfusionvad.models.clip import TOY, ClipWeights, load_clip
from clipfusionvad.tools.detect.annotate import write_annotated
from clipfusionvad.tools.detect.detect import Detection, Detector, FrameFeatures, Scorer
from clipfusionvad.tools.detect.page import failed_row, index_row, read_description, write_detection, write_index
from clipfusionvad.tools.detect.sources import Source
from clipfusionvad.tools.detect.watch import watch

EXIT_SOME_FAILED = 1
# The CLIP that features of a width come from, for methods whose files do not say.
CLIP_OF_WIDTH = {512: "ViT-B/16", 768: "ViT-L/14"}


def main(argv: list[str]) -> int:
    own = make_parser().parse_args(argv)
    if bool(own.videos) == bool(own.stream):
        raise UserError("give videos or folders to score, or --stream and a source")
    thresholds = Thresholds(own.threshold, own.low_threshold, own.min_seconds, own.merge_seconds)
    folder = Path(own.output)
    check_writable(folder / "index.html")
    videos = list_videos(own.videos, folder) if own.videos else {}
    loaded = load(own)
    if not own.stream:
        return _detect_files(videos, folder, own, loaded, thresholds)
    stop = Event()
    with stop_on_signals(stop):
        source = Source(own.stream, own.timeout, own.input_format, lambda line: tqdm.write(line, sys.stderr), stop)
        features = FrameFeatures(loaded.encoders, loaded.options, live=True)
        watch(source, features, loaded.scorer, loaded.labels, thresholds, loaded.frames, folder, own.every, own.fps)
    return EXIT_INTERRUPTED if stop.is_set() else 0


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad detect", description=__doc__)
    add = parser.add_argument
    add("videos", nargs="*", metavar="VIDEO|DIR", help="video files, and folders of them")
    add("--checkpoint", required=True, help="model file: ours, or a released one with --method and --dataset")
    add("--output", required=True, help="folder for the results")
    add("--overwrite", action="store_true", help="score finished videos again")
    model = parser.add_argument_group("model")
    model.add_argument("--method", choices=method_names(), help="of a file that does not say")
    model.add_argument("--dataset", metavar="NAME", help="of a file that does not say: its classes and options")
    model.add_argument("--config", help="YAML file of model options, for a released file with others than published")
    model.add_argument(
        "--classes", nargs="+", metavar="NAME[=PROMPT]", help="own classes, the normal one first; or a file"
    )
    model.add_argument("--clip", help="CLIP model name, local file, or 'toy' (default: the one it was trained with)")
    model.add_argument("--event-clip", help="event-CLIP file, for methods that read event images")
    model.add_argument(
        "--normal-centroid", "--calibration", help="calibration.pt of a run, for a released file that lacks it"
    )
    model.add_argument("--train-list", help="training list instead, whose normal videos' features are read")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    model.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of CLIP and the model")
    features = parser.add_argument_group("features")
    features.add_argument(
        "--crop", type=non_negative_int, default=0, help="which of the ten crops, 0 to 9 (default: 0)"
    )
    features.add_argument("--event-threshold", type=positive_float, default=10, help="change of grey that counts")
    features.add_argument(
        "--event-scope", choices=["block", "chunk"], default="block", help="what event images are normalised over"
    )
    _add_segments(parser.add_argument_group("segments"))
    pages = parser.add_argument_group("pages")
    pages.add_argument("--video", choices=["link", "copy", "none"], default="link", help="the video beside its page")
    pages.add_argument("--annotated", action="store_true", help="an mp4 with the scores drawn in, for the page too")
    _add_stream(parser.add_argument_group("stream"))
    return parser


def _add_segments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--threshold", type=share, default=0.5, help="score that starts a segment (default: 0.5)")
    group.add_argument("--low-threshold", type=share, default=0.4, help="score that carries it on (default: 0.4)")
    group.add_argument("--min-seconds", type=non_negative_float, default=1.0, help="shorter ones do not count")
    group.add_argument("--merge-seconds", type=non_negative_float, default=1.0, help="gaps that are merged over")


def _add_stream(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stream", metavar="SOURCE", help="a growing file, a camera, an RTSP or other address, or -")
    group.add_argument(
        "--every", type=non_negative_float, default=0.0, help="seconds between scorings; 0: each snippet"
    )
    group.add_argument(
        "--timeout", type=non_negative_float, default=30.0, help="seconds of silence that end it; 0: none"
    )
    group.add_argument("--fps", type=positive_float, help="frames a second, where the source tells a wrong rate")
    group.add_argument("--input-format", help="ffmpeg's name of a device's format, e.g. v4l2, dshow, avfoundation")


@dataclass(frozen=True)
class Loaded:
    """A model ready to score frames; ``settings`` say what it is, as results record it."""

    scorer: Scorer
    encoders: list[tuple[str, ImageEncoder]]
    options: ExtractOptions
    frames: int
    labels: list[str]
    settings: dict[str, Any]


def load(own: Namespace) -> Loaded:
    """Everything that the command line says of the model."""
    known = read_model_file(own.checkpoint)
    method = own.method or known.method
    if not method or not (own.dataset or known.made):
        missing = "dataset" if method else "method"
        raise UserError(f"{own.checkpoint} does not say its {missing}: pass --{missing}")
    benchmark = find_dataset(own.dataset) if own.dataset else dataset_of(known)
    flags = {"method": method, "model-path": own.checkpoint, "device": own.device, "precision": own.precision}
    flags |= {name: getattr(own, name) for name in ("config", "clip", "normal_centroid", "train_list")}
    tokens = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    args, file = parse_over_model(tokens, option_file_of(benchmark))
    if own.classes:
        benchmark = _with_classes(args, benchmark, file, read_classes(own.classes))
    model, clip = load_model(args, benchmark, file)
    device = pick_device(own.device)
    clips = _clips(own, args, model, clip)
    encoders = [(stream, ImageEncoder(clip, device, own.precision)) for stream, clip in clips.items()]
    for (stream, encoder), source in zip(encoders, clips.values(), strict=True):
        if encoder.dim != model.visual_width:
            raise UserError(
                f"CLIP {source.source} makes {stream} features of width {encoder.dim}, but {own.checkpoint} reads "
                f"{model.visual_width}: pass the one whose features it was trained on"
            )
    frames = args.frames_per_snippet
    reduce = {"stride": frames, "reduce": "mean"} if frames > 1 else {"reduce": "none"}
    events = {"event_threshold": own.event_threshold, "event_scope": own.event_scope}
    options = ExtractOptions(crops=(own.crop,), tail="ceil", **reduce, **events)
    # Where labels are codes, the prompts say what they mean.
    labels = benchmark.prompts if benchmark.multi_label else benchmark.labels
    settings = {
        "checkpoint": own.checkpoint,
        "checkpoint_bytes": Path(own.checkpoint).stat().st_size,
        "method": method,
        "dataset": benchmark.name,
        "classes": dict(zip(labels, benchmark.prompts, strict=True)),
        "frames_per_snippet": frames,
        "clip": {stream: source.source for stream, source in clips.items()},
        "crop": own.crop,
        "precision": own.precision,
        **(events if "event" in clips else {}),
    }
    return Loaded(Scorer(model, device, own.precision), encoders, options, frames, labels, settings)


def _clips(own: Namespace, args: Namespace, model: Method, clip: ClipWeights | None) -> dict[str, ClipWeights]:
    """The CLIP whose image tower reads each stream of the model."""
    if clip is None or not any(key.startswith("visual.") for key in clip.state):
        name = own.clip or (args.clip if clip else CLIP_OF_WIDTH.get(model.visual_width))
        if name is None:
            raise UserError(
                f"pass --clip: the CLIP whose features of width {model.visual_width} the model was trained on"
            )
        clip = load_clip(name, model.visual_width)
    clips = {}
    for stream in model.streams:
        if stream == "rgb":
            clips[stream] = clip
            continue
        source = own.event_clip or (TOY if clip.source == TOY else None)
        if source is None:
            raise UserError(f"{model.name} reads {stream} images too: pass the weights for them with --event-clip")
        clips[stream] = load_clip(source, model.visual_width)
    return clips


def read_classes(words: list[str]) -> dict[str, str]:
    """Class names and prompts from NAME or NAME=PROMPT words, or the lines of one file of such."""
    if len(words) == 1 and Path(words[0]).is_file():
        lines = [line.strip() for line in read_text(words[0], "class file").splitlines()]
        words = [line for line in lines if line and not line.startswith("#")]
    halves = [word.partition("=") for word in words]
    pairs = [(name.strip(), prompt.strip() if equals else name.strip()) for name, equals, prompt in halves]
    names = [name for name, _ in pairs]
    if len(pairs) < 2 or len(set(names)) != len(names) or not all(name and prompt for name, prompt in pairs):
        raise UserError(
            f"--classes takes at least two different names, the normal one first (or a file with one per line), "
            f"each with =PROMPT if that is another text; got: {', '.join(words)}"
        )
    return dict(pairs)


def _with_classes(args: Namespace, dataset: Dataset, file: ModelFile, classes: dict[str, str]) -> Dataset:
    """The dataset with other classes, where the model has no weights that belong to one of its own."""
    if not find_method(args.method).needs_clip:
        raise UserError(f"--classes: {args.method} reads no class texts and tells no classes apart")
    wider, _ = prepare_model(args, replace(dataset, classes={**dataset.classes, "one more": "one more"}), file)
    own = wider.state_dict()
    bound = [key for key, value in file.state.items() if key in own and own[key].shape != value.shape]
    if bound:
        raise UserError(
            f"--classes: this {args.method} has weights of its own for each class that it was trained with "
            f"({bound[0]}), so it knows no others"
        )
    return replace(dataset, classes=classes)


def list_videos(given: list[str], output: Path) -> dict[str, str]:
    """Videos by the names of their results; what lies in the output folder is a result itself."""
    inside = output.resolve()
    videos = {name: source for source, name in find_videos(given) if inside not in Path(source).resolve().parents}
    for source in videos.values():
        if is_address(source):
            raise UserError(f"{source} is no file: score it with --stream")
    if not videos:
        raise UserError(f"all videos below {', '.join(given)} are results in {output}: name another --output")
    return videos


def _detect_files(
    videos: Mapping[str, str], folder: Path, own: Namespace, loaded: Loaded, thresholds: Thresholds
) -> int:
    try:
        with hold(folder):
            return detect_videos(videos, folder, own, loaded, thresholds)
    except KeyboardInterrupt:
        print(f"what is finished is kept in {folder}; the same command goes on from there", file=sys.stderr)
        raise


def detect_videos(
    videos: Mapping[str, str], folder: Path, own: Namespace, loaded: Loaded, thresholds: Thresholds
) -> int:
    """Score every video that is not finished; what fails is told and left out."""
    features = FrameFeatures(loaded.encoders, loaded.options)
    detector = Detector(features, loaded.scorer, loaded.labels, thresholds, loaded.frames)
    rows, failed = [], 0
    for name, path in tqdm(videos.items(), "videos", disable=None):
        path = Path(path)
        try:
            settings = loaded.settings | {"pages": own.video, "annotated": own.annotated, "file": _stamp(path)}
            known = None if own.overwrite else read_description(folder / f"{name}.json")
            if not known or (known["settings"], known["thresholds"]) != (settings, asdict(thresholds)):
                check_inside(folder, (folder / name).parent)
                found = _detect(detector, path)
                video = _beside(path, folder, name, found, own)
                write_detection(folder, name, found, settings, video)
                known = read_description(folder / f"{name}.json") or {}
        except CannotWrite:
            raise
        except UserError as error:
            failed += 1
            tqdm.write(f"error: {error}", sys.stderr)
            rows.append(failed_row(name, str(error)))
            continue
        rows.append(index_row(name, known))
        tqdm.write(
            f"{name}: {known['verdict']}, highest score {known['max_score']:.3f}, {rows[-1]['segments']} segments"
        )
    index = len(rows) > 1 or any(Path(item).is_dir() for item in own.videos)
    if index:
        write_index(folder, f"{own.checkpoint}: {len(rows)} videos", rows)
    if failed:
        print(f"{failed} of {len(rows)} failed", file=sys.stderr)
    if failed < len(rows):
        print(f"results in {folder}: {'index.html, ' if index else ''}NAME.html, .png, .json, .csv for each video")
    return EXIT_SOME_FAILED if failed else 0


def _stamp(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same."""
    if not path.is_file():
        raise UserError(f"video not found: {path}")
    known = path.stat()
    return {"bytes": known.st_size, "modified": known.st_mtime_ns}


def _detect(detector: Detector, path: Path) -> Detection:
    with tqdm(desc=path.name[:30], unit="frame", disable=None, leave=False) as bar:

        def advance(frames: int, info: VideoInfo) -> None:
            bar.total = info.frames
            bar.update(frames)

        found = detector.detect(path, advance)
    if found.broken:
        warn(f"{found.broken}; what was read is scored")
    return found


def _beside(path: Path, folder: Path, name: str, found: Detection, own: Namespace) -> str | None:
    """Put the video where its page finds it; the path from there."""
    target = folder / name
    if own.annotated:
        target = target.with_name(f"{target.name}_annotated.mp4")
        write_annotated(target, path, found)
    elif own.video == "none":
        return None
    else:
        target = target.with_name(target.name.removesuffix(path.suffix) + path.suffix)
        if own.video == "link":
            link_or_copy(path, target)
        elif target.resolve() != path.resolve():
            with atomic_write(target) as copy, open(path, "rb") as original:
                shutil.copyfileobj(original, copy)
    return target.name
