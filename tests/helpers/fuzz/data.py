"""Features, lists, annotations, truth, packed stores and videos."""

import contextlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from clipfusionvad.data.annotations import read_annotations, write_annotations_csv
from clipfusionvad.data.features import load_features, read_shape
from clipfusionvad.data.lists import read_list
from clipfusionvad.data.packed import open_store
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, UCF
from clipfusionvad.extraction.decode import read_frames
from fuzz.case import ALTERED, REFUSED, RIGHT, TOY_ENCODER, Case, read_or_refuse, require, run_command
from fuzz.mutate import damage, disturb, odd_value

DTYPES = ["<f2", "<f4", "<f8", ">f4", ">f2", "<i4", "|u1", "<f16", "|b1", "<c8", "<U3", "|V4", "<M8[s]", "|S3"]
SHAPES = [(3, 64), (1, 1), (0, 64), (64,), (2, 3, 4), (), (3, 0), (10**12, 64), (2**63, 2), (2, 2**62), (-1, -192)]


def an_array(rng: random.Random) -> bytes:
    """A .npy file: of any dtype, shape and version, whole or with a header that lies."""
    generator = np.random.default_rng(rng.randrange(2**32))
    shape = rng.choice(SHAPES) if rng.random() < 0.5 else (rng.randrange(1, 9), rng.choice([1, 64]))
    dtype = rng.choice(DTYPES[:5]) if rng.random() < 0.6 else rng.choice(DTYPES)
    real = shape if math.prod(shape) in range(10_000) and min(shape, default=0) >= 0 else (3, 64)
    values = (100 * generator.standard_normal(real)).astype(np.float32)
    if values.size and rng.random() < 0.15:
        values.flat[rng.randrange(values.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    if rng.random() < 0.1:
        file = io.BytesIO()
        np.save(file, values.astype(object), allow_pickle=True)
        return file.getvalue()
    with np.errstate(all="ignore"):
        content = np.zeros(real, dtype) if dtype[1] in "VMUS" else values.astype(dtype)
    if rng.random() < 0.3:
        content = np.asfortranarray(content)
    header = {"descr": dtype, "fortran_order": bool(content.flags.f_contiguous and not content.flags.c_contiguous)}
    file = io.BytesIO()
    write = rng.choice([np.lib.format.write_array_header_1_0, np.lib.format.write_array_header_2_0])
    write(file, header | {"shape": shape if rng.random() < 0.9 else real})
    return file.getvalue() + content.tobytes(order="A")


def features(case: Case) -> str:
    rng = case.rng
    content = an_array(rng)
    if rng.random() < 0.5:
        seeds = sorted((case.seeds / "data" / "ucf" / "features").iterdir())
        content = damage(rng.choice([content, rng.choice(seeds).read_bytes()]), rng)
    path = case.put("a__0.npy", content)
    if rng.random() < 0.05:
        return case.run("compare-features", path, case.seeds / "plain.npy", codes=(0, 1))
    outcome = read_or_refuse(lambda: load_features(path), lambda found: _same_array(path, found))
    if outcome == RIGHT:
        require(read_shape(path) == np.load(path, allow_pickle=False).shape, "shape")
    return outcome


def _same_array(path: Path, found: np.ndarray) -> None:
    strict = np.load(path, allow_pickle=False)
    require(found.ndim == 2 and found.size and np.isfinite(found).all(), f"features {found.shape}")
    require(found.shape == strict.shape and np.array_equal(found, strict), "other values than numpy reads")


def lists(case: Case) -> str:
    rng, name = case.rng, case.rng.choice(list(DATASETS))
    home = case.seeds / "data" / name
    text = (home / rng.choice(["train.csv", "test.csv"])).read_bytes()
    if rng.random() < 0.4:
        rows = [line.split(b",") for line in text.splitlines()]
        for _ in range(rng.choice([1, 2, 9])):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = _cell(rng)
        text = b"\n".join(b",".join(row) for row in rows)
    else:
        text = damage(text, rng)
    path = case.put("list.csv", text)
    root = rng.choice([home, home / "features", None, case.folder / "nowhere"])
    dataset = DATASETS[name]
    if rng.random() < 0.1:
        flags = ["--train-list", path, "--test-list", path, *(["--feature-root", root] if root else [])]
        return case.run("pack", "--dataset", name, "--visual-width", 64, *flags)

    def check(entries: list) -> None:
        rows = [line for line in text.decode("utf-8-sig").splitlines() if line.strip(" ,\t")]
        require(0 < len(entries) <= len(rows), "more entries than rows")
        for entry in entries:
            require(entry.path.is_file() and dataset.encode(entry.label).any(), f"{entry}")

    return read_or_refuse(lambda: read_list(path, root, dataset), check)


def _cell(rng: random.Random) -> bytes:
    value = rng.choice([odd_value(rng), "../features/x.npy", "\x00", "features//../test.csv", "a" * 200_000, '"open'])
    return str(value).encode("utf-8", "replace")


def annotations(case: Case) -> str:
    rng = case.rng
    path = rng.choice(sorted((case.seeds / "annotations").iterdir()) + [case.seeds / "data" / "ucf" / "truth.csv"])
    names = [name for name in DATASETS if path.name.startswith(name)] or ["ucf"]
    dataset = DATASETS[names[0] if rng.random() < 0.9 else rng.choice(list(DATASETS))]
    content = _changed_text(path, rng)
    if rng.random() < 0.03:
        content = rng.choice([b"[" * 200_000, b'{"videos":' * 50_000, b"{" + b'"a":{' * 20_000])
    mine = case.put(path.name, content)
    if rng.random() < 0.05:
        home = case.seeds / "data" / dataset.name
        argv = ["lists", "--dataset", dataset.name, "--features", home / "features", "--output", case.folder / "out"]
        return case.run(*argv, rng.choice(["--annotations", "--split"]), mine)

    def check(found: dict) -> None:
        for name, item in found.items():
            require(name == item.video and len(item.segments) == len(item.labels), f"{item}")
            require(all(0 <= start < end for start, end in item.segments), f"{item}")
            require(all(label in dataset.labels[1:] for label in item.labels), f"{item}")
            require(item.frames is None or item.frames > 0, f"{item}")
        write_annotations_csv(case.folder / "again.csv", found.values())
        again = read_annotations(case.folder / "again.csv", dataset)
        for name, item in again.items():
            same = (item.segments, item.frames) == (found[name].segments, found[name].frames)
            require(same, f"{item} comes back otherwise")

    return read_or_refuse(lambda: read_annotations(mine, dataset), check)


def _changed_text(path: Path, rng: random.Random) -> bytes:
    """A text with some words, or JSON with some values, replaced; or bytes damaged."""
    content = path.read_bytes()
    if rng.random() < 0.4:
        return damage(content, rng)
    if path.suffix == ".json":
        value = json.loads(content)
        for _ in range(rng.choice([1, 1, 3])):
            value = disturb(value, rng)
        return json.dumps(value).encode()
    separator = "," if path.suffix == ".csv" else " "
    lines = [line.split(separator) for line in content.decode().splitlines()]
    for _ in range(rng.choice([1, 1, 2, 5])):
        line = rng.choice(lines)
        line[rng.randrange(len(line))] = str(odd_value(rng))
    return "\n".join(separator.join(line) for line in lines).encode("utf-8", "replace")


def _test_videos(case: Case) -> tuple[Path, list, list[int]]:
    home = case.seeds / "data" / "ucf"
    entries = read_list(home / "test.csv", None, UCF)
    return home, entries, [read_shape(entry.path)[0] for entry in entries]


def truth_arrays(case: Case) -> str:
    rng = case.rng
    home, entries, snippets = _test_videos(case)
    names = ["gt.npy", "gt_segment.npy", "gt_label.npy"]
    paths = [home / name for name in names]
    at = rng.randrange(3)
    paths[at] = case.put(names[at], _changed_truth(paths[at], rng))

    def check(truth: Any) -> None:
        require([len(part) for part in truth.frames] == [16 * count for count in snippets], "lengths")
        require(all(set(np.unique(part)) <= {0, 1} for part in truth.frames), "values")
        for spans, labels in zip(truth.segments, truth.labels, strict=True):
            require(len(spans) == len(labels) and all(0 <= start <= stop for start, stop in spans), f"{spans}")
        if at == 0:
            require(np.array_equal(np.concatenate(truth.frames), np.load(paths[0])), "other frames than numpy reads")

    return read_or_refuse(lambda: read_truth(*paths, entries, snippets, UCF), check)


def _changed_truth(path: Path, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return damage(path.read_bytes(), rng)
    array = np.load(path, allow_pickle=True)
    if array.dtype != object:
        array = rng.choice(
            [array.astype(bool), array.astype("<i8"), array[:-1], array[None], array * 2, array - np.float32("nan")]
        )
        array = array.astype(">f8") if rng.random() < 0.1 else array
    else:
        items = disturb(array.tolist(), rng)
        items = items if isinstance(items, list) else [items]
        array = np.empty(len(items), object)
        for index, item in enumerate(items):
            array[index] = item
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def truth_file(case: Case) -> str:
    rng = case.rng
    home, entries, snippets = _test_videos(case)
    path = case.put("truth.csv", _changed_text(home / "truth.csv", rng))

    def check(truth: Any) -> None:
        require(len(truth.frames) == len(entries), "videos")
        for frames, spans, labels in zip(truth.frames, truth.segments, truth.labels, strict=True):
            require(len(spans) == len(labels) and len(frames), f"{spans} {labels}")
            wanted = np.zeros(len(frames))
            for start, stop in spans if labels != ["A"] else []:
                wanted[start:stop] = 1
            require(np.array_equal(wanted, frames), "frames are not those of the intervals")

    return read_or_refuse(lambda: read_truth(path, None, None, entries, snippets, UCF), check)


def stores(case: Case) -> str:
    rng = case.rng
    name = rng.choice(["train.pack", "test.pack"])
    folder = case.copy(f"packed/{name}", name)
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(disturb(json.loads(content), rng)))
    elif rng.random() < 0.05:
        path.unlink()
    else:
        changed = damage(content, rng) if rng.random() < 0.8 else an_array(rng)
        path.write_bytes(changed)
    whole = open_store(case.seeds / "packed" / name)

    def read() -> Any:
        store, sampling = open_store(folder), whole.manifest.sampling
        list_path = case.seeds / "packed" / f"{name[:-5]}.csv"
        store.check_fit(list_path, ["rgb"], 64, None if sampling is None else _Said(sampling))
        return store

    def check(store: Any) -> str | None:
        same = np.array_equal(store.features, whole.features) and np.array_equal(store.videos, whole.videos)
        if store.whole:
            parts = [store.video(row) for row in range(store.manifest.videos)]
            require([len(part) for part in parts] == store.lengths.tolist(), "lengths")
        shaped = path.name != "manifest.json" and store.features.shape == whole.features.shape
        require(same or shaped, "other features than were packed")
        return None if same else ALTERED

    return read_or_refuse(read, check)


class _Said:
    """A sampling that says what another one said."""

    draws = False

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _video(case: Case) -> tuple[str, bytes]:
    rng = case.rng
    path = rng.choice(sorted((case.seeds / "videos").iterdir()))
    content = path.read_bytes()
    kind = rng.random()
    if kind < 0.06:
        content = content[: rng.choice([0, 64])]
    elif kind < 0.3:
        content = _absurd(content, rng)
    else:
        others = [other.read_bytes() for other in (case.seeds / "videos").iterdir()]
        content = damage(content, rng, others)
    name = path.name if rng.random() < 0.9 else rng.choice(["x.mp4", "x.mkv", "x.flv", "x.y4m", "x.m3u8", "x.txt", "x"])
    return name, content


def _absurd(content: bytes, rng: random.Random) -> bytes:
    """Sizes, rates and counts in headers at their limits."""
    content = bytearray(content)
    marks = [*b"tkhd mvhd stsz stts stco avc1 mdhd strh avih strf trun".split(), b"\xb0\x82", b"\xe7"]
    found = [place for mark in marks if (place := bytes(content).find(mark)) >= 0]
    if found:
        place = rng.choice(found) + rng.randrange(4, 100)
        content[place : place + 4] = rng.choice([0xFFFFFFFF, 0x7FFFFFFF, 0, 0x4000]).to_bytes(4, "big")
    return bytes(content)


def frames(case: Case) -> str:
    name, content = _video(case)
    path = case.put(name, content)

    def read() -> int:
        count = 0
        with contextlib.closing(read_frames(path)) as found:
            for frame in found:
                require(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3, f"{frame.shape}")
                require(frame.size, "an empty frame")
                count += 1
        return count

    return read_or_refuse(read, lambda count: require(count > 0, "no frame and no word of it"))


def extraction(case: Case) -> str:
    """The whole command: features of every frame that could be read to the end, or none."""
    name, content = _video(case)
    name = name if "." in name and not name.endswith(("txt", "m3u8")) else "x.mp4"
    path = case.put(name, content)
    argv = ["extract", "--videos", path, "--output", case.folder / "out", *TOY_ENCODER]
    outcome = run_command(case, argv, codes=(0, 1))
    made = list((case.folder / "out").rglob("*.npy"))
    require(len(made) == (outcome.code == 0), f"{made}")
    if outcome.code == 1:
        require(outcome.err.count("failed: ") == 1 and "Traceback" not in outcome.err, outcome.err)
    if made:
        require(np.isfinite(np.load(made[0])).all(), "not finite")
    return REFUSED if outcome.code else RIGHT
