"""A small synthetic benchmark: real class names, plausible lengths and events, features that can be learned.

The RGB feature of a snippet is the sum of a scene, which differs between videos and drifts slowly, of noise, and,
during an event, of the direction of its class in the toy CLIP's text space, weaker at the event's borders. The
event-camera feature has no scene, more noise, and other directions for the same events. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfusionvad.data.annotations import Annotation, write_annotations_csv
from clipfusionvad.data.config import FRAMES_PER_SNIPPET
from clipfusionvad.datasets import Dataset
from clipfusionvad.io.files import write_array, write_text
from clipfusionvad.io.option import CONFIGS, read_config
from clipfusionvad.tools.lists import ListsConfig, build_lists

if TYPE_CHECKING:
    from clipfusionvad.models import Method

FOLDER = Path("demo")
WIDTH = 64
SEED = 0
TRAIN_PER_CLASS, TEST_PER_CLASS, TRAIN_CROPS = 4, 2, 3


def demo_folder(dataset: Dataset) -> Path:
    return FOLDER / dataset.name


def demo_settings(dataset: Dataset, method: type[Method]) -> dict[str, Any]:
    """Return what ``--demo`` sets: small sizes, the paths of the demo data, and the method's own settings.

    Not every method has all of these options.
    """
    folder = demo_folder(dataset)
    lists = {name: str(folder / "list" / file) for name, file in dataset.list_files.items()}
    settings: dict[str, Any] = {"clip": "toy", "embed_dim": WIDTH, "visual_width": WIDTH, "visual_length": 128}
    settings |= {"attn_window": 8, "max_epoch": 16, "batch_size": 16, "lr": 2e-3, "scheduler_milestones": [8, 12]}
    settings |= {"eval_every": 0, "stream_folders": list(method.streams)}
    settings |= {"train_list": lists["train"], "test_list": lists["test"], "gt_path": lists["truth"]}
    settings |= {f"{kind}_path": str(folder / f"{kind}_{method.name}.pt") for kind in ("model", "checkpoint")}
    return settings | method_settings(method.name)


def method_settings(method: str) -> dict[str, Any]:
    """Return what ``--demo`` sets for one method: configs/demo/METHOD.yaml, if it exists."""
    path = CONFIGS / "demo" / f"{method}.yaml"
    return {key: value for key, value in read_config(path).items() if key != "method"} if path.is_file() else {}


def make_demo(dataset: Dataset) -> None:
    """Make the demo data of a dataset unless it exists: features, annotations, lists, truth."""
    folder = demo_folder(dataset)
    done = folder / "README.txt"
    if done.exists():
        return
    # Two generators, so that the RGB features do not depend on the event features.
    rng, event_rng = np.random.default_rng(SEED), np.random.default_rng(SEED + 1)
    directions = class_directions(dataset)
    motions = np.linalg.qr(event_rng.normal(size=(WIDTH, WIDTH)))[0][: len(directions)]
    splits: dict[str, list[Annotation]] = {}
    for split, per_class, first, crops in (
        ("train", TRAIN_PER_CLASS, 1, range(TRAIN_CROPS)),
        ("test", TEST_PER_CLASS, 501, [dataset.test_crop]),
    ):
        anomalies = [column for column in range(1, len(directions)) for _ in range(per_class)]
        columns = anomalies + [0] * len(anomalies)
        splits[split] = []
        for number, column in enumerate(columns, start=first):
            video, scenes, strength = _make_video(rng, dataset, column, number, directions, len(crops))
            splits[split].append(video)
            for crop, rgb in zip(crops, scenes, strict=True):
                # The event camera shows the classes of a video but not its scene.
                events = event_rng.normal(size=(len(strength), WIDTH)) + 3 * strength @ motions
                for stream, features in (("rgb", rgb), ("event", events.astype(np.float16))):
                    path = Path(stream, split, video.label or "", f"{video.video}__{crop}.npy")
                    write_array(folder / "features" / path, features)
    write_annotations_csv(folder / "annotations.csv", splits["test"])
    annotations = (str(folder / "annotations.csv"),)
    features, lists = str(folder / "features" / "rgb"), str(folder / "list")
    build_lists(dataset, ListsConfig(features=features, output=lists, annotations=annotations))
    # Written last: if it exists, everything else is complete.
    write_text(done, f"Synthetic data in the shape of {dataset.title}. Delete this folder to make it again.\n")


def class_directions(dataset: Dataset) -> np.ndarray:
    """Return unit vectors (C, WIDTH) along which the classes' prompts differ in the toy CLIP's text space."""
    import torch  # here: the settings of --demo do not need it

    from clipfusionvad.models.clip import TOY, load_clip
    from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts

    with torch.inference_mode():
        text = FixedPrompts(dataset.prompts, "{}")(ClipTextTower(load_clip(TOY, WIDTH))).numpy()
    centred = text - text.mean(axis=0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def _make_video(
    rng: np.random.Generator, dataset: Dataset, column: int, number: int, directions: np.ndarray, crops: int
) -> tuple[Annotation, list[np.ndarray], np.ndarray]:
    """Make one video of a class: its annotation, features (n, WIDTH) float16 of each crop, and class strengths."""
    # Log-normal around 100, as in surveillance clips.
    snippets = int(np.clip(rng.lognormal(np.log(100), 0.8), 12, 600))
    events = _events(rng, snippets) if column else []
    classes = [column] * len(events)
    if dataset.multi_label and len(events) > 1:
        classes[1] = 1 + column % (len(directions) - 1)
    labels = [dataset.labels[c] for c in classes]
    label = "-".join([*labels, "0"][:3]) if dataset.multi_label and column else dataset.labels[column]
    strength = _strength(snippets, events, classes, len(directions))
    # Norms near 10, as of unnormalised CLIP features; crops differ by their noise.
    scene = rng.normal(size=WIDTH) + np.cumsum(rng.normal(size=(snippets, WIDTH)), axis=0) * 0.05
    features = [
        (0.6 * (scene + 0.5 * rng.normal(size=scene.shape)) + 4 * strength @ directions).astype(np.float16)
        for _ in range(crops)
    ]
    bounds = [(FRAMES_PER_SNIPPET * start, FRAMES_PER_SNIPPET * end) for start, end in events]
    frames = FRAMES_PER_SNIPPET * snippets + int(rng.integers(0, FRAMES_PER_SNIPPET))
    name = dataset.demo_name.format(label=label, number=number)
    return Annotation(name, bounds, labels, frames, label), features, strength


def _events(rng: np.random.Generator, snippets: int) -> list[tuple[int, int]]:
    """Draw one or two events [start, end) in snippets, which cover a tenth to a third of the video."""
    count = 2 if snippets > 60 and rng.random() < 0.4 else 1
    slots = np.linspace(0, snippets, count + 1).astype(int)
    events = []
    for low, high in zip(slots[:-1], slots[1:], strict=True):
        length = max(3, int((high - low) * rng.uniform(0.12, 0.35)))
        start = int(rng.integers(low, high - length + 1))
        events.append((start, start + length))
    return events


def _strength(snippets: int, events: list[tuple[int, int]], classes: list[int], total: int) -> np.ndarray:
    """Return the strength of each class in each snippet, (n, C) with rows that sum to 1; events rise and fall."""
    strength = np.zeros((snippets, total))
    for (start, end), column in zip(events, classes, strict=True):
        ramp = np.minimum(np.arange(1, end - start + 1), np.arange(end - start, 0, -1))
        strength[start:end, column] = np.minimum(ramp / 2, 1)
    strength[:, 0] = 1 - strength[:, 1:].sum(axis=1)
    return strength
