"""Options of detection."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.option import MOST_SMOOTH, Option
from clipfusionvad.models import method_names

_CLASSES = "other classes, the normal one first; or a file of them"
_ANNOTATIONS = "annotation file of the videos, as for 'lists': its intervals are shown beside what is found"
_SCOPE = "event images are normalised over a block of 32 chunks or each chunk"
_SMOOTH = "smooth scores over time: a Gaussian's standard deviation in snippets (default: that of the model file, or 0)"
_HIGH = "score that starts a segment (default: 0.5, or a higher --low-threshold)"
_LOW = "score that continues a segment (default: 0.4, or a lower --threshold)"
#: Frames that are handed over together, if a snippet is a frame; a picture is kept of as many.
CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model detects, and the features that it reads."""

    checkpoint: Annotated[str, Option("model file: ours, or a released one with --method and --dataset", required=True)]
    method: Annotated[str | None, Option("method of a released file", choices=method_names())] = None
    dataset: Annotated[str | None, Option("dataset of a released file, for its classes", metavar="NAME")] = None
    config: Annotated[str | None, Option("YAML file of model options, if a released file has unusual ones")] = None
    classes: Annotated[tuple[str, ...] | None, Option(_CLASSES, metavar="NAME[=PROMPT]", nonempty=True)] = None
    clip: Annotated[str | None, Option("CLIP name, local file or 'toy' (default: the one of the training)")] = None
    event_clip: Annotated[str | None, Option("event-CLIP file, for methods that read event images")] = None
    normal_centroid: Annotated[str | None, Option("calibration.pt of a run", aliases=("--calibration",))] = None
    train_list: Annotated[str | None, Option("a training list, to compute the normal centroid instead")] = None
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, …")] = "auto"
    precision: Annotated[str, Option("arithmetic of CLIP and the model", choices=("fp32", "bf16"))] = "fp32"
    smooth: Annotated[float | None, Option(_SMOOTH, minimum=0, maximum=MOST_SMOOTH, metavar="SIGMA")] = None
    crop: Annotated[int, Option("which of the ten crops, 0 to 9", minimum=0)] = 0
    event_threshold: Annotated[float, Option("change of grey (0..255) that counts as an event", above=0)] = 10
    event_scope: Annotated[str, Option(_SCOPE, choices=("block", "chunk"))] = "block"


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How scores become segments."""

    threshold: Annotated[float | None, Option(_HIGH, minimum=0, maximum=1)] = None
    low_threshold: Annotated[float | None, Option(_LOW, minimum=0, maximum=1)] = None
    min_seconds: Annotated[float, Option("shortest segment", minimum=0)] = 1.0
    merge_seconds: Annotated[float, Option("longest gap over which segments are merged", minimum=0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """A live source in place of videos."""

    stream: Annotated[str | None, Option("a growing file, a camera, an address, or -", metavar="SOURCE")] = None
    every: Annotated[float, Option("seconds between two scorings; 0: score after each snippet", minimum=0)] = 0.0
    timeout: Annotated[float, Option("seconds without data that end the stream; 0: no limit", minimum=0)] = 30.0
    input_format: Annotated[str | None, Option("ffmpeg's name of a device's format: v4l2, dshow, …")] = None


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """What is scored and what is written."""

    output: Annotated[str, Option("folder for the results", required=True)]
    overwrite: Annotated[bool, Option("score finished videos again")] = False
    video: Annotated[str, Option("how the video gets beside its page", choices=("link", "copy", "none"))] = "link"
    annotated: Annotated[bool, Option("write an mp4 with the scores drawn in, and show it on the page")] = False
    annotations: Annotated[str | None, Option(_ANNOTATIONS, metavar="FILE")] = None
    fps: Annotated[
        float | None,
        Option("frame rate, if the source reports a wrong one; of pictures (default: the dataset's)", above=0),
    ] = None
    videos: tuple[str, ...]
    model: ModelOptions
    segments: SegmentOptions
    stream: StreamOptions
