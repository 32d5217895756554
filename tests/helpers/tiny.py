"""A tiny benchmark for tests: a dozen short videos, lists, and the ground truth in both of its forms."""

import dataclasses
import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import ucf_test
import ucf_train
import xd_test
import xd_train
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.datasets import DATASETS
from clipfusionvad.io.files import write_csv
from clipfusionvad.models import find_method, method_names

WIDTH, LENGTH, FRAMES = 64, 32, 16


def package(command, dataset):
    return lambda argv: package_main([command, "--dataset", dataset, *argv])


TRAIN = {name: package("train", name) for name in DATASETS} | {"ucf": ucf_train.main, "xd": xd_train.main}
TEST = {name: package("test", name) for name in DATASETS} | {"ucf": ucf_test.main, "xd": xd_test.main}
SHARED_FLAGS = ["--clip", "toy", "--embed-dim", WIDTH, "--visual-width", WIDTH, "--frames-per-snippet", FRAMES]
#: Small values of options that methods declare; an option that is not here keeps its default.
SMALL = {"visual_length": LENGTH, "attn_window": 8, "visual_layers": 1, "prompt_prefix": 2, "prompt_postfix": 2}
SMALL |= {"glimpse_window": 8, "prompt_encoder": "toy", "prompt_length": 4, "num_segments": 8, "seg_length": 4}
SMALL |= {"n_ctx": 2, "emb_size": 16, "heads": 2, "num_refinement_steps": 2}
SMALL |= {"hidden_width": 32, "head_width": 8, "mlp_width": 32, "output_width": 16, "first_width": 16}
SMALL |= {"second_width": 8, "first_ratio": 4, "second_ratio": 8, "samples": 10}
# With much dropout, the loss of a few steps is noise.
SMALL |= {"num_prototypes": 4, "decoder_depth": 1, "score_dropout": False, "dropout": 0.1}


def small_options(method):
    return {key: SMALL[key] for key in find_method(method).option_names() if key in SMALL}


def method_flags(method):
    """Flags that make a method small and, for several streams, say where theirs lie."""
    named = ((key.replace("_", "-"), value) for key, value in small_options(method).items())
    own = [(f"--no-{key}",) if value is False else (f"--{key}", value) for key, value in named]
    streams = ["--stream-folders", "features", "events"] if len(find_method(method).streams) > 1 else []
    return [item for pair in own for item in pair] + streams + ["--warmup-epochs", 0]


METHOD_FLAGS = {name: method_flags(name) for name in method_names()}
SCHEDULE_FLAGS = ["--max-epoch", 2, "--batch-size", 3, "--lr", 3e-3, "--scheduler-milestones", 1]

# Video names contain the labels; each label stands for these events.
NAMES = {name: "{label}_{number:03d}" for name in DATASETS}
NAMES |= {"ucf": "{label}{number:03d}_x264", "xd": "v=tiny{number:03d}__#1_label_{label}"}
LABELS = {
    "ucf": {"Normal": [], "Abuse": ["Abuse"], "Robbery": ["Robbery", "Robbery"]},
    "xd": {"A": [], "B1-0-0": ["B1"], "B2-G-0": ["B2", "G"]},
    "shanghaitech": {"normal": [], "car": ["car"], "throwing_object": ["throwing_object", "throwing_object"]},
    "msad": {"Normal": [], "Fire": ["Fire"], "Water_incident": ["Water_incident", "Water_incident"]},
}
# Lengths of test videos: one snippet, a window plus or minus one, exactly one and two windows.
TEST_LENGTHS = [LENGTH + 1, LENGTH, 40, LENGTH - 1, 2 * LENGTH, 1]


@dataclass
class Video:
    name: str
    label: str
    snippets: int
    segments: list[tuple[int, int]]
    classes: list[str]


@dataclass(frozen=True)
class Tiny:
    """The folder of a tiny benchmark and the flags that describe it; outputs of runs go to ``work``."""

    dataset: str
    folder: Path
    work: Path
    videos: list[Video]
    method: str = "clipfusionvad"

    def of(self, method):
        """The same data for another method."""
        return dataclasses.replace(self, method=method)

    def at(self, work):
        """The same data with another place for outputs."""
        return dataclasses.replace(self, work=Path(work))

    @property
    def train_list(self):
        return self.folder / "train.csv"

    @property
    def test_list(self):
        return self.folder / "test.csv"

    @property
    def arrays(self):
        names = {"--gt-path": "gt.npy", "--gt-segment-path": "gt_segment.npy", "--gt-label-path": "gt_label.npy"}
        return {flag: self.folder / name for flag, name in names.items()}

    def test_flags(self, *more):
        truth = [item for pair in self.arrays.items() for item in pair]
        model = ["--model-path", self.work / "model.pth"]
        flags = ["--method", self.method, *SHARED_FLAGS, *METHOD_FLAGS[self.method]]
        return strings(flags, truth, model, ["--test-list", self.test_list, "--device", "cpu"], more)

    def train_flags(self, *more):
        paths = ["--checkpoint-path", self.work / "checkpoint.pth", "--output-dir", self.work / "run"]
        return strings(self.test_flags(), SCHEDULE_FLAGS, ["--train-list", self.train_list], paths, more)

    def train(self, *more):
        return quietly(TRAIN[self.dataset], self.train_flags(*more))

    def test(self, *more):
        return quietly(TEST[self.dataset], self.test_flags(*more))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def skip_without_packages(method):
    """Skip a test where the package that a method is built with is not installed."""
    if "prompt_encoder" in find_method(method).option_names():
        pytest.importorskip("transformers", reason="its prompt encoder comes from transformers")


def strings(*groups):
    return [str(item) for group in groups for item in group]


def quietly(main, argv):
    """Run a program's ``main`` in this process, on one thread; return its exit code and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(argv)
    except SystemExit as stop:
        code = stop.code
    finally:
        torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


def make_tiny(dataset, folder):
    """Write features, lists, the three truth arrays and the keyed truth of a dataset into a folder."""
    rng = np.random.default_rng(7)
    folder = Path(folder)
    normal, *anomalous = LABELS[dataset]
    directions = 3 * rng.normal(size=(len(anomalous), WIDTH))
    for stream in ("features", "events"):
        (folder / stream).mkdir(parents=True)

    def make(number, label, snippets):
        classes = LABELS[dataset][label]
        bounds = np.linspace(0, snippets * FRAMES, 2 * len(classes) + 1).astype(int)[1:].reshape(-1, 2)
        video = Video(NAMES[dataset].format(label=label, number=number), label, snippets, bounds.tolist(), classes)
        features = rng.normal(size=(snippets, WIDTH))
        for start, end in video.segments:
            features[start // FRAMES : -(-end // FRAMES)] += directions[anomalous.index(label)]
        return video, features.astype(np.float16)

    def write(video, features, crops):
        """Save the crops of a video in both streams; return their rows of a list."""
        for crop in crops:
            np.save(folder / "features" / f"{video.name}__{crop}.npy", features + np.float16(0.1) * (crop % 5))
            np.save(folder / "events" / f"{video.name}__{crop}.npy", features[:, ::-1])
        return [(f"features/{video.name}__{crop}.npy", video.label) for crop in crops]

    rows = []
    for number in range(12):
        label = normal if number % 2 else anomalous[number // 2 % 2]
        rows += write(*make(number, label, int(rng.integers(5, 60))), crops=range(2))
    write_csv(folder / "train.csv", ["path", "label"], rows)

    tested = zip([*anomalous, *anomalous, normal, normal], TEST_LENGTHS, strict=True)
    made = [make(500 + number, label, snippets) for number, (label, snippets) in enumerate(tested)]
    videos = [video for video, _ in made]
    write_csv(folder / "test.csv", ["path", "label"], [row for pair in made for row in write(*pair, crops=[5])])
    _write_truth(folder, videos)
    return Tiny(dataset, folder, folder, videos)


def _write_truth(folder, videos):
    frames = [np.zeros(FRAMES * video.snippets, np.float32) for video in videos]
    segments, labels = np.empty(len(videos), object), np.empty(len(videos), object)
    keyed = []
    for index, video in enumerate(videos):
        length = FRAMES * video.snippets
        segments[index] = [[str(start), str(end)] for start, end in video.segments] or [[0, length]]
        labels[index] = video.classes or ["A"]
        keyed += [(video.name, length, "", "", "")] if not video.segments else []
        for (start, end), name in zip(video.segments, video.classes, strict=True):
            frames[index][start:end] = 1
            keyed.append((video.name, length, name, start, end))
    np.save(folder / "gt.npy", np.concatenate(frames))
    np.save(folder / "gt_segment.npy", segments)
    np.save(folder / "gt_label.npy", labels)
    write_csv(folder / "truth.csv", ["video", "frames", "label", "start", "end"], keyed)
