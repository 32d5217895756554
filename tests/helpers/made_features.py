"""Make features of a benchmark's true videos and lengths, with noise in place of CLIP: for tests of whole pipelines.

    python tests/helpers/made_features.py ../shared/data OUTPUT [WIDTH]

reads the official names, lengths and annotations of UCF-Crime and writes OUTPUT/features, OUTPUT/annotations.
"""

import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np

FRAMES = 16


def make_features(
    folder: Path, videos: list[tuple[str, int, list[tuple[int, int]]]], width: int, seed: int = 0
) -> None:
    """Write ``NAME.npy`` (snippets, width) float16 for each (name, snippets, events in snippets).

    Features are noise; in an event a direction of the class is added, that of the name's letters.
    """
    rng, directions = np.random.default_rng(seed), dict[str, np.ndarray]()
    folder.mkdir(parents=True)
    for name, snippets, events in videos:
        label = re.match("[A-Za-z]*", name)[0]
        direction = directions.setdefault(label, rng.normal(size=width))
        features = rng.normal(size=(snippets, width))
        for start, end in events:
            features[start:end] += direction
        np.save(folder / f"{name}.npy", features.astype(np.float16))


def ucf_videos(shared: Path) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """Return UCF-Crime's 290 test and 1610 training videos; a third of an anomalous training video is an event."""
    videos = []
    with open(shared / "benchmarks/ucf_test_videos.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            spans = [tuple(int(bound) // FRAMES for bound in span.split("-")) for span in row["segments"].split()]
            videos.append((row["video"], int(row["n_snippets_floor16"]), spans))
    with open(shared / "benchmarks/ucf_train_i3d_snippets.csv", encoding="utf-8") as file:
        lengths = {row["video"]: int(row["i3d_snippets"]) for row in csv.DictReader(file)}
    for line in (shared / "lists/ucf/Anomaly_Train.txt").read_text(encoding="utf-8").split():
        name = Path(line).stem
        snippets = lengths.get(name, 140)
        videos.append((name, snippets, [] if "Normal" in name else [(snippets // 3, 2 * snippets // 3 + 1)]))
    return videos


if __name__ == "__main__":
    shared, output = map(Path, sys.argv[1:3])
    make_features(output / "features", ucf_videos(shared), int(sys.argv[3]) if len(sys.argv) > 3 else 16)
    shutil.copytree(shared / "lists/ucf", output / "annotations")
