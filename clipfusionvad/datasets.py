"""The benchmarks, one entry each with everything particular to it, and a user's own datasets (YAML).

No other module names a benchmark. The facts come from the official annotation files and from the lists that the
VadCLIP family released (IEF-VAD for ShanghaiTech and MSAD). Frame rates are the commonly stated ones.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.files import read_yaml

# The mark of a normal video in the released truth arrays of every dataset.
NORMAL_IN_TRUTH = "A"


@dataclass(frozen=True)
class Convention:
    """Which frames of a test set are judged, and how the bounds of its text annotation are read.

    Of a video of n frames "floor" judges floor(n / 16) · 16, "ceil" ceil(n / 16) · 16, "all" n. ``start`` and ``end``
    are added to the bounds of a text annotation, which does not say whether they are inclusive: [s + start, e + end).
    ``videos`` and ``frames`` are those of the whole test set, 0 where unknown; ``users`` have published numbers so.
    """

    name: str
    rule: Literal["floor", "ceil", "all"]
    videos: int = 0
    frames: int = 0
    users: str = ""
    start: int = 0
    end: int = 0
    #: Videos that are judged on one snippet fewer.
    short: frozenset[str] = frozenset()
    #: Videos and order are those of the dataset's authors: normal videos last, and none of ``misplaced``.
    official_split: bool = False


GENERAL_CONVENTIONS = (Convention("floor16", "floor"), Convention("ceil16", "ceil"), Convention("all-frames", "all"))


@dataclass(frozen=True)
class Dataset:
    """A benchmark or a user's own dataset; ``classes`` maps labels of lists to prompts, the first one is *normal*."""

    name: str
    title: str
    classes: dict[str, str]
    fps: float
    #: Labels are several class codes joined by "-" (and padded with "0").
    multi_label: bool = False
    #: Finds the label in a video's name; group 1 is compared with ``classes``, ignoring case.
    label_pattern: str = ""
    #: Further names of a class: folders and file-name stems.
    aliases: dict[str, str] = field(default_factory=dict)
    #: The crop of each video in the released test list (file name ``NAME__k.npy``).
    test_crop: int = 0
    #: Names of the truth files in the released option files, and of the lists and the keyed truth beside them.
    truth_files: dict[str, str] = field(default_factory=dict)
    list_files: dict[str, str] = field(default_factory=dict)
    #: Official names of the annotation files, with alternatives, and of split files, one of which may be ``required``.
    annotation_files: tuple[tuple[str, ...], ...] = ()
    split_files: tuple[str, ...] = ()
    split_required: bool = False
    #: Order of the released lists: normal videos last, else by name; or by label, then by name, numbers as numbers.
    order: Literal["normal last", "by class"] = "normal last"
    #: In the annotation file the word after the name is the scene, not the class.
    scene_in_annotation: bool = False
    #: The annotation file has intervals [s, s), which hold no frame.
    empty_intervals: bool = False
    #: Name of a piece of a video of several classes in the annotation file; group 1 is the video's name.
    piece_pattern: str = ""
    #: Videos that the released lists put on the wrong side, and the right side.
    misplaced: dict[str, Literal["train", "test"]] = field(default_factory=dict)
    #: Test videos whose official annotation names classes that their label lacks, or has overlapping segments.
    annotation_quirks: frozenset[str] = frozenset()
    #: Name of a generated video.
    demo_name: str = "{label}_{number:03d}"
    #: Anomalous videos at the head of the released test list, which the released ``excludeNormal`` keeps.
    anomalous_test_videos: int = 0
    #: Treatment of a truth label outside the class list in the released detection mAP.
    unknown_truth_label: Literal["ignore", "error"] = "ignore"
    #: Truths that are in use; the first one that fits is taken.
    conventions: tuple[Convention, ...] = GENERAL_CONVENTIONS

    @property
    def labels(self) -> list[str]:
        return list(self.classes)

    @property
    def prompts(self) -> list[str]:
        return list(self.classes.values())

    def encode(self, label: str) -> np.ndarray:
        """Return a list label as a multi-hot vector (C,) float32; ``UserError`` for an unknown label."""
        vector = multi_hot([label], self.labels, self.multi_label)[0]
        if not vector.any():
            raise UserError(f"unknown label {label!r}{self.label_hint(label)}; known: {', '.join(self.labels)}")
        return vector

    def label_hint(self, label: str) -> str:
        """Return what an unknown label may mean, to append to a message: one of another benchmark, or a near one."""
        others = [f"{one.title}: --dataset {one.name}" for one in DATASETS.values() if one.match_label(label)]
        foreign = others and not self.match_label(label)
        return f" (a label of {', or of '.join(others)})" if foreign else nearest(label, self.labels)

    def label_of(self, name: str, folder: str = "") -> str | None:
        """Return the list label in a video's name, else of its folder; None if neither names one."""
        found = re.search(self.label_pattern or "()", name)
        words = filter(None, [found and found.group(1), folder])
        return next(filter(None, map(self.match_label, words)), None)

    def match_label(self, word: str) -> str | None:
        """Return the list label that a word means, ignoring case; None for any other word."""
        if self.multi_label and multi_hot([word], self.labels, True).any():
            return word
        return {**{label.lower(): label for label in self.labels}, **self.aliases}.get(word.lower())

    def whole_of(self, name: str) -> str:
        """Return the video that a name of the annotation file belongs to: that of a piece, else the name itself."""
        found = re.fullmatch(self.piece_pattern or "(.*)", name)
        return found.group(1) if found else name

    def list_order(self, label: str, name: str, official: bool = False) -> tuple[Any, ...]:
        """Return the sort key of a video in the order of the released lists, or of the dataset's ``official`` one."""
        if self.order == "normal last":
            return self.is_normal(label), name
        parts = re.split(r"([0-9]+)", name)
        natural = [int(part) if index % 2 else part for index, part in enumerate(parts)]
        return official and self.is_normal(label), label, natural

    def is_normal(self, label: str) -> bool:
        return bool(self.encode(label)[0])

    def codes(self, label: str) -> list[str]:
        """Return the classes in a list label: several only if the dataset is multi-label."""
        return [part for part in (label.split("-") if self.multi_label else [label]) if part in self.classes]


def multi_hot(labels: list[str], class_labels: list[str], multi_label: bool = False) -> np.ndarray:
    """Encode list labels as vectors (N, C) float32.

    With ``multi_label`` a label is split at "-" and each known part is set; unknown parts are ignored, as in the
    released code. With two classes any label but the first is the second. An unknown label gives a row of zeros.
    """
    if len(class_labels) == 2:
        labels = [label if label == class_labels[0] else class_labels[1] for label in labels]
        multi_label = False
    parts = [label.split("-") if multi_label else [label] for label in labels]
    known = [[label in row for label in class_labels] for row in parts]
    return np.array(known, np.float32).reshape(len(labels), len(class_labels))


def _benchmark(name: str, **more: Any) -> Dataset:
    """Return a benchmark with the file names of its released lists and truth unless others are given."""
    lists = {"train": f"{name}_CLIP_rgb.csv", "test": f"{name}_CLIP_rgbtest.csv", "truth": f"{name}_truth.csv"}
    truth = {"frames": f"gt_{name}.npy", "segments": f"gt_segment_{name}.npy", "labels": f"gt_label_{name}.npy"}
    return Dataset(**{"name": name, "truth_files": truth, "list_files": lists} | more)


_UCF_LABELS = "Normal Abuse Arrest Arson Assault Burglary Explosion Fighting RoadAccidents Robbery Shooting "
_UCF_LABELS += "Shoplifting Stealing Vandalism"
_UCF_NORMAL = "normal_videos training_normal_videos_anomaly testing_normal_videos_anomaly"
# Their number of frames divides by 16, as that of eleven others; extraction lost their last snippet.
_UCF_SHORT = [f"{name}_x264" for name in "Assault006 Burglary037 RoadAccidents010 RoadAccidents016 Shooting046".split()]
_UCF_SHORT += [f"{name}_x264" for name in "Shoplifting010 Shoplifting015 Normal_Videos_881 Normal_Videos_914".split()]
_SHANGHAITECH_LABELS = "normal car chasing circuit fall fighting hurdle jumping monocycle push robbery running "
_SHANGHAITECH_LABELS += "skateboard step stoop throwing_object vaudeville vehicle"
_MSAD_LABELS = "Normal Assault Explosion Fighting Fire Object_falling People_falling Robbery Shooting "
_MSAD_LABELS += "Traffic_accident Vandalism Water_incident"

UCF = _benchmark(
    "ucf",
    title="UCF-Crime",
    classes={label: label[0].lower() + label[1:] for label in _UCF_LABELS.split()},
    fps=30,
    label_pattern=r"^([A-Za-z]+)(?:_Videos)?_?\d",
    aliases=dict.fromkeys(_UCF_NORMAL.split(), "Normal"),
    test_crop=5,
    annotation_files=(("Temporal_Anomaly_Annotation.txt", "Temporal_Anomaly_Annotation_for_Testing_Videos.txt"),),
    split_files=("Anomaly_Train.txt", "Anomaly_Test.txt"),
    demo_name="{label}{number:03d}_x264",
    anomalous_test_videos=140,
    conventions=(
        Convention("floor16", "floor", 290, 1_109_824, "VadCLIP, ClipFusionVAD, ReFLIP-VAD"),
        Convention("floor16-short", "floor", 290, 1_109_680, "PEL4VAD, UR-DMU", short=frozenset(_UCF_SHORT)),
        Convention("ceil16", "ceil", 290, 1_114_144, "RTFM, MGFN"),
        Convention("all-frames", "all", 290, 1_111_808, "LAVAD, URF-HVAA", end=1),
    ),
)

XD = _benchmark(
    "xd",
    title="XD-Violence",
    classes=dict(A="normal", B1="fighting", B2="shooting", B4="riot", B5="abuse", B6="car accident", G="explosion"),
    fps=24,
    multi_label=True,
    label_pattern=r"_label_([^_.]+)",
    truth_files={"frames": "gt.npy", "segments": "gt_segment.npy", "labels": "gt_label.npy"},
    annotation_quirks=frozenset(
        "Ip.Man.2008__#01-40-37_01-42-07_label_B4-0-0 v=OOjjPGN8jSU__#1_label_B6-0-0 "
        "v=PRH5rYUHoVU__#00-00-25_00-02-50_label_B6-0-0".split()
    ),
    annotation_files=(("annotations.txt",), ("annotations_multiclasses.txt",)),
    # Without one of them, normal test videos would become training videos.
    split_files=("xd_CLIP_rgbtest.csv", "test_videos.csv"),
    split_required=True,
    demo_name="v={number:03d}__#1_label_{label}",
    anomalous_test_videos=500,
    unknown_truth_label="error",
    conventions=(
        Convention("floor16", "floor", 800, 2_330_384, "XDVioDet, RTFM, PEL4VAD"),
        Convention("all-frames", "all", 800, 2_335_801, "LAVAD", end=1),
        # 57 snippets more, in unknown videos: as long as the released features.
        Convention("released-clip", "floor", 800, 2_331_296, "VadCLIP"),
        *GENERAL_CONVENTIONS[1:2],
    ),
)

SHANGHAITECH = _benchmark(
    "shanghaitech",
    title="ShanghaiTech",
    classes={label: label.replace("_", " ") for label in _SHANGHAITECH_LABELS.split()},
    fps=24,
    # Only generated videos have the class in their name; real names are scene and number (01_0130).
    label_pattern=r"^([a-z_]+)_\d",
    test_crop=5,
    annotation_files=(("shang_annotations.txt",),),
    split_files=("shang_test_list.txt",),
    order="by class",
    empty_intervals=True,
    piece_pattern=r"(\d\d_\d{4})_\d",
    # Listed as pieces, which match no feature file, so the released lists have them in training.
    misplaced={"04_0012": "test", "05_0023": "test"},
    annotation_quirks=frozenset({"04_0012", "05_0023"}),
    conventions=(
        Convention("floor16", "floor", 199, 142_912, "RTFM, PEL4VAD"),
        Convention("floor16-197", "floor", 197, 139_568, "IEF-VAD"),
        *GENERAL_CONVENTIONS[1:],
    ),
)

MSAD = _benchmark(
    "msad",
    title="MSAD",
    classes={label: label.lower().replace("_", " ") for label in _MSAD_LABELS.split()},
    fps=30,
    # Assault_2 and MSAD_normal_testing_119, but normal training videos are scene and number (frontdoor1).
    label_pattern=r"^(?:MSAD_)?(normal|[A-Za-z_]+(?=_\d))",
    test_crop=5,
    annotation_files=(("msad_annotations.txt",),),
    split_files=("msad_test_list.txt",),
    order="by class",
    scene_in_annotation=True,
    # Annotated and tested in IEF-VAD's lists, a training video in those of the dataset's authors.
    misplaced={"Robbery_10": "train"},
    conventions=(
        # Its bounds count from 1 and are inclusive.
        Convention("official", "floor", 240, 143_920, "MSAD's authors", start=-1, official_split=True),
        Convention("floor16", "floor", 241, 144_144, "IEF-VAD"),
        *GENERAL_CONVENTIONS[1:2],
        Convention("all-frames", "all", 360, 227_884, "training-free methods (240 + 120 videos)"),
    ),
)

DATASETS = {dataset.name: dataset for dataset in (UCF, XD, SHANGHAITECH, MSAD)}


def find_dataset(name: str) -> Dataset:
    """Return the benchmark of that name, or the dataset of a YAML file."""
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return read_dataset(name)
    if name not in DATASETS:
        known = f"known: {', '.join(DATASETS)}, or your own YAML file"
        raise UserError(f"unknown dataset {name!r}{nearest(name, DATASETS)}; {known}")
    return DATASETS[name]


#: The keys of a dataset's YAML file and their types; ``classes`` is required.
OWN_KEYS: dict[str, tuple[type, ...]] = dict(name=(str,), title=(str,), classes=(dict,), fps=(int, float))
OWN_KEYS |= dict(multi_label=(bool,), label_pattern=(str,), aliases=(dict,), test_crop=(int,))


def read_dataset(path: str | Path) -> Dataset:
    """Read a user's own dataset: a YAML file with ``OWN_KEYS``; its name is the file's unless ``name`` is given."""
    content = read_yaml(path, "dataset file")
    try:
        return _own(content, Path(path).stem)
    except UserError as error:
        raise UserError(f"dataset file {path}: {error}") from error


def yaml_content(dataset: Dataset) -> dict[str, Any]:
    """Return the content of a YAML file from which ``read_dataset`` gives this dataset."""
    whole = {key: getattr(dataset, key) for key in OWN_KEYS}
    return {key: value for key, value in whole.items() if value not in ("", {})}


def own_dataset(name: str, classes: Mapping[str, str], **more: Any) -> Dataset:
    """Return a dataset that is not a benchmark, with file names derived from its name."""
    lists = {part: f"{name}_{part}.csv" for part in ("train", "test", "truth")}
    defaults = dict(title=name, fps=30, order="by class", classes=dict(classes), list_files=lists)
    return _benchmark(name, **defaults | more)


def _own(content: Any, stem: str) -> Dataset:
    if not isinstance(content, dict):
        raise UserError("it must hold lines of the form 'key: value', including 'classes:'")
    for key, value in content.items():
        if key not in OWN_KEYS:
            raise UserError(f"unknown key {key!r}{nearest(str(key), OWN_KEYS)}; known: {', '.join(OWN_KEYS)}")
        if not isinstance(value, OWN_KEYS[key]) or isinstance(value, bool) != (key == "multi_label"):
            raise UserError(f"{key} cannot be {value!r}")
    given = dict(content)
    name, classes = given.pop("name", stem), _texts(given.pop("classes", None) or {}, "classes")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"the name {name!r} must be of letters, digits, '-' and '_' (files are named after it)")
    if name.lower() in DATASETS:
        raise UserError(f"the name {name!r} is that of a benchmark; give another one as 'name:'")
    if len(classes) < 2:
        raise UserError("'classes:' needs two labels or more with their prompts, the normal one first")
    if len({label.lower() for label in classes}) < len(classes):
        raise UserError("two labels differ only in case")
    if NORMAL_IN_TRUTH in list(classes)[1:]:
        raise UserError(f"no label but the first may be {NORMAL_IN_TRUTH!r}, which marks normal videos in truth files")
    if not 0 < given.get("fps", 30) < math.inf or given.get("test_crop", 0) < 0:
        raise UserError("fps must be more than 0, and test_crop 0 or more")
    aliases = {word.lower(): label for word, label in _texts(given.pop("aliases", {}), "aliases").items()}
    for label in aliases.values():
        if label not in classes:
            raise UserError(f"aliases: unknown label {label!r}{nearest(label, classes)}")
    pattern = given.get("label_pattern", "()")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"label_pattern {pattern!r} is not a regular expression: {error}") from error
    if not groups:
        raise UserError(f"label_pattern {pattern!r} needs parentheses around the label")
    return own_dataset(name, classes, aliases=aliases, **given)


def _texts(mapping: Mapping[Any, Any], where: str) -> dict[str, str]:
    """Return a mapping of text to text; YAML reads numbers and words such as no as other types."""
    for pair in mapping.items():
        for word in pair:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{where}: {word!r} in '{pair[0]}: {pair[1]}' is not text; put it in quotes")
    return {key.strip(): value.strip() for key, value in mapping.items()}
