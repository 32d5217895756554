"""Run detection as the command does: score videos or a live stream and write the results."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event

import cv2
import numpy as np
from tqdm import tqdm

from clipfusionvad.data.loaders import prefetch
from clipfusionvad.extraction.decode import BrokenVideo, VideoInfo, batched, is_address, read_frames
from clipfusionvad.extraction.jobs import check_name, find_videos
from clipfusionvad.extraction.pictures import files_of, is_pictures, note_rate, step_of
from clipfusionvad.extraction.snippets import to_canvas
from clipfusionvad.io.errors import EXIT_INTERRUPTED, UserError, error_line, printable, stop_on_signals, warn
from clipfusionvad.io.files import CannotWrite, atomic_write, check_inside, check_writable, hold, link_or_copy
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.metrics import snippet_edges
from clipfusionvad.metrics.segments import Thresholds, find_segments
from clipfusionvad.tools.detect.annotate import write_annotated
from clipfusionvad.tools.detect.config import CHUNK, DetectConfig, ModelOptions
from clipfusionvad.tools.detect.model import DetectionModel
from clipfusionvad.tools.detect.page import (
    ANNOTATED,
    ENDINGS,
    Detection,
    index_row,
    read_record,
    write_detection,
    write_index,
)
from clipfusionvad.tools.detect.stream import StreamSource, watch
from clipfusionvad.tools.detect.truth import Interval, place_intervals, read_intervals


def detect(config: DetectConfig, load: Callable[[ModelOptions], DetectionModel]) -> int:
    """Score videos or a stream; return the exit code. ``load`` builds the model, once the other options are checked."""
    own, live = config.segments, config.stream
    if bool(config.videos) == bool(live.stream):
        raise UserError("give videos or folders to score, or --stream and a source")
    if live.stream and config.annotations:
        raise UserError("--annotations is of video files: a stream has none")
    if live.stream and config.model.smooth:
        raise UserError("--smooth needs the snippets that follow, and a stream does not have them yet: leave it out")
    thresholds = Thresholds.of(own.threshold, own.low_threshold, own.min_seconds, own.merge_seconds)
    folder = Path(config.output)
    check_writable(folder / "index.html")
    videos = _list_videos(config.videos, folder) if config.videos else {}
    model = load(config.model)
    if live.stream and model.parts:
        raise UserError(f"{config.model.checkpoint} reads equal parts of whole videos: give video files, no --stream")
    if live.stream and model.sigma:
        warn(f"a stream is not smoothed: the snippets that follow are not there yet (model file: σ = {model.sigma:g})")
    truth = read_intervals(config.annotations, videos, model.dataset, model.labels) if config.annotations else {}
    if not live.stream:
        try:
            with hold(folder):
                return _detect_videos(videos, truth, folder, config, model, thresholds)
        except KeyboardInterrupt:
            print(f"finished videos are kept in {folder}; the same command continues from there", file=sys.stderr)
            raise
    stop = Event()
    with stop_on_signals(stop):
        source = StreamSource(live.stream, live.timeout, live.input_format, config.fps, stop=stop)
        watch(source, model, thresholds, folder, live.every)
    return EXIT_INTERRUPTED if stop.is_set() else 0


def _list_videos(given: Sequence[str], output: Path) -> dict[str, str]:
    """Return videos by the names of their results; videos in the output folder are results, and left out."""
    inside = output.resolve()
    videos = {name: source for source, name in find_videos(given) if inside not in Path(source).resolve().parents}
    for source in videos.values():
        if is_address(source):
            raise UserError(f"{source} is not a file: score it with --stream")
    for name, source in videos.items():
        others = (name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending))
        if other := next(
            (videos[other] for other in others if other in videos), "the list of videos" * (name == "index")
        ):
            raise UserError(f"the results of {source} and those of {other} would be in one file: rename the video")
    if not videos:
        raise UserError(f"all videos below {', '.join(given)} are results in {output}: name another --output")
    return videos


def _detect_videos(
    videos: Mapping[str, str],
    truth: Mapping[str, list[Interval]],
    folder: Path,
    config: DetectConfig,
    model: DetectionModel,
    thresholds: Thresholds,
) -> int:
    """Score every video that is not finished; a video that fails is reported and left out."""
    if config.fps is None:
        note_rate(videos.values(), model.dataset.fps)
    rows, failed = [], 0
    for name, path in ProgressBar(videos.items(), "videos"):
        source, record_path = Path(path), folder / f"{name}.json"
        try:
            check_name(path, name)
            if not (files := [file.stat() for file in files_of(source)]):
                raise UserError(f"video not found: {source}")
            fps = config.fps or (model.dataset.fps if is_pictures(source) else None)
            # What shows whether the file has changed.
            stamp = {"bytes": sum(f.st_size for f in files), "modified": max(f.st_mtime_ns for f in files)}
            settings = model.settings | {"pages": config.video, "annotated": config.annotated, "file": stamp}
            settings |= {"fps": fps} if fps else {}
            intervals = truth.get(name)
            settings |= {"annotations": intervals} if config.annotations else {}
            record = None if config.overwrite else read_record(record_path)
            if not record or (record["settings"], record["thresholds"]) != (settings, asdict(thresholds)):
                check_inside(folder, record_path.parent)
                found = detect_video(source, model, thresholds, fps)
                if intervals is not None:
                    found = replace(found, truth=place_intervals(name, intervals, found.times, step_of(source)))
                if found.broken:
                    warn(f"{found.broken}; the frames before are scored")
                video = _place_video(source, folder / name, found, config)
                record = write_detection(folder, name, found, settings, video)
            rows.append(row := index_row(name, record))
            of_class = "" if row["class_probability"] is None else f"class {row['line']}, "
            verdict = f"{of_class}anomaly score {row['confidence']:.2f}" if row["segments"] else "normal"
            count = f"{row['segments']} segment{'s' * (row['segments'] != 1)}"
            tqdm.write(f"{name}: {verdict}; highest score {row['max_score']:.3f}, {count}")
        except CannotWrite:
            raise
        except UserError as error:
            failed += 1
            tqdm.write(error_line(error), sys.stderr)
            rows.append(index_row(printable(name), error=printable(str(error))))
    index = len(rows) > 1 or any(Path(item).is_dir() for item in config.videos)
    if index:
        write_index(folder, f"{len(rows)} videos · {Path(config.model.checkpoint).name}", rows)
    if failed:
        print(f"{failed} of {len(rows)} failed", file=sys.stderr)
    if failed < len(rows):
        print(f"results in {folder}: {'index.html, ' if index else ''}NAME.html, .png, .json, .csv for each video")
    return 1 if failed else 0


def _small_picture(canvas: np.ndarray, info: VideoInfo) -> bytes:
    """Return a frame of a video, resized to a canvas already, as a JPEG of about 4 KB."""
    scale = 160 / max(info.width, info.height)
    size = max(1, round(scale * info.width)), max(1, round(scale * info.height))
    small = cv2.cvtColor(cv2.resize(canvas, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()


def detect_video(
    path: Path,
    model: DetectionModel,
    thresholds: Thresholds,
    fps: float | None = None,
    on_frame: Callable[[int, int | None], object] = lambda done, total: None,
) -> Detection:
    """Score one video, under a progress bar. If decoding stops early, the frames before are scored.

    ``on_frame`` gets the number of frames read so far and of all, if the file says it. ``UserError`` for a file
    without any frame.
    """
    infos: list[VideoInfo] = []
    times: list[float] = []
    pictures: list[bytes] = []
    count, broken = 0, ""

    def canvases() -> Iterator[np.ndarray]:
        nonlocal count, broken
        try:
            for frame in read_frames(path, infos.append, times.append, fps):
                canvas = to_canvas(frame)
                # The middle one of every CHUNK frames, or the first one where the video ends before.
                if count % CHUNK in (0, CHUNK // 2):
                    pictures[count // CHUNK :] = [_small_picture(canvas, infos[0])]
                count, bar.total = count + 1, infos[0].frames
                bar.update()
                on_frame(count, infos[0].frames)
                yield canvas
        except BrokenVideo as error:
            broken = str(error)

    with ProgressBar(desc=path.name[:30], unit="frame", leave=False) as bar:
        with contextlib.closing(prefetch(batched(canvases(), CHUNK))) as chunks:
            rows = np.concatenate(list(model.rows(chunks)))
    if not count:
        raise UserError(broken)
    anomaly, classes = model.score_whole(model.snippets(rows))
    if not np.isfinite(anomaly).all():
        raise UserError(f"the scores of {path} are not finite: do the weights fit this CLIP's features?")
    bounds = snippet_edges(len(anomaly), count, None if model.parts else model.frames_per_snippet)
    ends = np.array([*times[:count], infos[0].end(count, times[count - 1])])
    segments = find_segments(anomaly, classes, bounds, ends[bounds], model.labels, thresholds)
    info = infos[0].measured(count, float(ends[-1]))
    return Detection(info, anomaly, classes, bounds, ends, model.labels, thresholds, segments, broken or None, pictures)


def _place_video(path: Path, target: Path, found: Detection, config: DetectConfig) -> str | None:
    """Put the video where its page finds it; return its path from there."""
    if config.annotated:
        target = target.with_name(f"{target.name}{ANNOTATED}.mp4")
        write_annotated(target, path, found)
    elif config.video == "none" or is_pictures(path):
        return None
    else:
        target = target.with_name(target.name.removesuffix(path.suffix) + path.suffix)
        if config.video == "link":
            link_or_copy(path, target)
        elif target.resolve() != path.resolve():
            with atomic_write(target) as copy, open(path, "rb") as original:
                shutil.copyfileobj(original, copy)
    return target.name
