"""Folders of runs and tests, their scores, manifests of features, and descriptions of detections."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clipfusionvad.extraction.jobs import EncoderConfig, FeatureManifest, Job, find_videos
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.report.scores import read_scores
from clipfusionvad.tools.detect.page import index_row, read_record, write_index
from fuzz.case import REFUSED, TOY_ENCODER, Case, read_or_refuse, require
from fuzz.mutate import damage, damage_archive, disturb

#: Files of a run that are damaged here; model files and training states have their own kinds.
SPOILT = (".json", ".yaml", ".csv", ".npz", ".jsonl")
DETECTION = {
    "video": {"path": "a.mp4", "fps": 30.0, "frames": 20, "seconds": 0.7},
    "warning": None,
    "settings": {"checkpoint": "m.pth", "pages": "link"},
    "thresholds": {"high": 0.5, "low": 0.4, "min_seconds": 1.0, "merge_seconds": 1.0},
    "verdict": "normal",
    "max_score": 0.3,
    "segments": [{"start": 0.0, "end": 1.0, "label": "Abuse"}],
    "snippets": {"start": [0.0], "end": [0.5], "anomaly": [0.3], "classes": None},
}


def run_folders(case: Case) -> str:
    """One damaged file in the folder of a run or a test, and the page or the table of it."""
    rng = case.rng
    folder = case.copy(f"runs/{rng.choice(['training', 'test', 'scored', 'trained'])}", "run")
    _spoil(rng.choice([path for path in sorted(folder.iterdir()) if path.suffix in SPOILT]), rng)
    if rng.random() < 0.5:
        return case.run("table", folder, "--bootstrap", 10, "--reference", folder)
    page = case.folder / "page.html"
    outcome = case.run("report", folder, "--output", page)
    require(outcome == REFUSED or page.read_text(encoding="utf-8").rstrip().endswith("</html>"), "no whole page")
    return outcome


def _spoil(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".npz":
        path.write_bytes(_scores(content, rng))
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(disturb(json.loads(content), rng)))
    elif path.suffix == ".yaml" and rng.random() < 0.6:
        path.write_text(yaml.safe_dump(disturb(yaml.safe_load(content), rng)))
    else:
        path.write_bytes(damage(content, rng))


def _scores(content: bytes, rng: random.Random) -> bytes:
    """Damaged bytes, a damaged member, or arrays of another kind."""
    kind = rng.random()
    if kind < 0.3:
        return damage(content, rng)
    if kind < 0.5:
        return damage_archive(content, rng)
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(list(arrays))
    array = arrays[name]
    if name == "about" and rng.random() < 0.9:
        arrays[name] = np.array(json.dumps(disturb(json.loads(array.item()), rng)))
    elif rng.random() < 0.1:
        del arrays[name]
    else:
        arrays[name] = _odd_array(array, rng)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _odd_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    flat = array.copy()
    if flat.size and rng.random() < 0.6:
        odd = [0, -1, 1, 10**6, 10**12, 2**62, 0.5] + ([np.nan, np.inf, 1e30] if array.dtype.kind == "f" else [])
        flat.flat[rng.randrange(flat.size)] = rng.choice(odd) if array.dtype.kind in "if" else "</script>\n"
        return flat
    changes = [array[None], array.astype("U5"), array.flatten()]
    if array.ndim:
        changes += [array[:-1], array[..., :0]]
    if array.dtype.kind in "if":
        changes += [array.astype(complex), array.astype(np.float16), array.astype(np.uint8), -array]
    return rng.choice(changes)


def scores(case: Case) -> str:
    rng = case.rng
    name = rng.choice(["test/test_scores.npz", "scored/scores.npz", "trained/scores.npz"])
    path = case.put("scores.npz", _scores((case.seeds / "runs" / name).read_bytes(), rng))

    def check(tested: Any) -> None:
        require(len(tested.scores) == len(tested.videos.entries) > 0, "videos")
        for found in tested.scores:
            require(found.anomaly.ndim == 2 and found.anomaly.shape[1] > 0, f"{found.anomaly.shape}")
        for entry in tested.videos.entries:
            require(tested.videos.dataset.encode(entry.label).any(), f"{entry}")

    return read_or_refuse(lambda: read_scores(path), check)


def manifests(case: Case) -> str:
    """The record beside features, for an extraction that goes on, and as a list of videos."""
    rng = case.rng
    folder = case.copy("extracted")
    path = folder / "manifest.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    if rng.random() < 0.6:
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(disturb(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")
    else:
        content = damage(path.read_bytes(), rng) if rng.random() < 0.95 else b'{"video":' * 50_000
        path.write_bytes(content)
    if rng.random() < 0.15:
        outcome = case.run("extract", "--videos", path, "--output", case.folder / "again", *TOY_ENCODER, codes=(0, 1))
        beyond = [file for file in case.folder.rglob("*.npy") if not file.is_relative_to(case.folder / "again")]
        require(all(file.is_relative_to(folder) for file in beyond), f"written elsewhere: {beyond}")
        return outcome
    options, encoder = ExtractOptions(crops=(0,)), EncoderConfig("toy", 64)
    job = Job(str(case.seeds / "videos" / "a.mp4"), "a", str(folder), options, encoder)

    def read() -> Any:
        done = FeatureManifest(folder).is_done(job, "x")
        for source, name in find_videos([path]):
            require(isinstance(source, str) and not name.startswith("/") and ".." not in Path(name).parts, f"{name!r}")
            require(name.isprintable(), f"{name!r}")
        return done

    return read_or_refuse(read, lambda done: require(done is False, "taken for done with another model"))


def descriptions(case: Case) -> str:
    """What an interrupted or foreign hand left of NAME.json; never an error, the video is scored again."""
    rng = case.rng
    content = json.dumps(disturb(DETECTION, rng) if rng.random() < 0.8 else DETECTION).encode()
    if rng.random() < 0.4:
        content = damage(content, rng) if rng.random() < 0.95 else b"[" * 200_000
    path = case.put("a.json", content)

    def check(known: dict | None) -> None:
        if known is not None:
            known["settings"], known["thresholds"], known["verdict"]
            write_index(case.folder, "t", [index_row("a", known)])

    return read_or_refuse(lambda: read_record(path), check)
