"""Packed features: the numbers of the single files, and a store that does not fit is noticed."""

import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipfusionvad.data import packed
from clipfusionvad.data.features import load_video
from clipfusionvad.data.lists import Entry, write_list
from clipfusionvad.data.loaders import BagDataset, PackedBatches, ShuffledBatchSampler, load_batches
from clipfusionvad.data.packed import FEATURES, MANIFEST, SOURCES, VIDEOS, open_store, write_store
from clipfusionvad.data.sampling import GridSampling, WindowSampling
from clipfusionvad.datasets import XD
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import atomic_folder, read_json, write_json

WIDTH, T = 3, 8
CPU = torch.device("cpu")
SAMPLINGS = {"window": WindowSampling(T), "grid": GridSampling(4, 2)}
STREAMS = ("rgb", "event")
LABELS = ("A", "B1-0-0", "B2-G-0")


def make_list(folder, lengths, dtype="float16", streams=1):
    """Feature files and the list that names them; the second stream lacks a snippet here and there."""
    rng = np.random.default_rng(len(lengths))
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for row, length in enumerate(lengths):
        paths = [folder / f"v{row:03d}_{stream}__0.npy" for stream in STREAMS[:streams]]
        for stream, path in enumerate(paths):
            values = rng.standard_normal((length, WIDTH))
            if stream:
                values[rng.random(length) < 0.2] = np.nan
            # What is float64 here is exact in float32.
            np.save(path, values.astype(np.float32).astype(dtype))
        entries.append(Entry(paths[0], LABELS[row % 3], row + 2, tuple(paths[1:])))
    write_list(folder / "list.csv", entries)
    return entries


def pack_up(entries, sampling=SAMPLINGS["window"], dtype="float16", workers=2):
    folder, streams = entries[0].path.parent, STREAMS[: len(entries[0].paths)]
    write_store(folder / "list.pack", entries, folder / "list.csv", streams, WIDTH, sampling, dtype, workers)
    return open_store(folder / "list.pack")


def make_bags(entries, sampling, store=None):
    entries = entries if store is None else store.attach(entries)
    gathers = store is not None and (sampling.is_random or not store.whole)
    return BagDataset(entries, XD, sampling, WIDTH, 5, PackedBatches(store, CPU) if gathers else None)


def batches_of(bags, start=0):
    plan = ShuffledBatchSampler(np.arange(len(bags)), 4, 5)
    return list(load_batches(bags, plan.epoch(1), workers=0, epoch=1, start=start))


def assert_same_batches(bags, other, start=0):
    found = batches_of(bags, start)
    assert found
    torch.testing.assert_close(found, batches_of(other, start), rtol=0, atol=0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    streams=st.integers(1, 2),
    packed_as=st.sampled_from(["window", "grid"]),
    sampled_as=st.sampled_from(["window", "grid"]),
    start=st.integers(0, 1),
)
def test_batches_and_videos_are_those_of_files(tmp_path_factory, lengths, dtype, streams, packed_as, sampled_as, start):
    entries = make_list(tmp_path_factory.mktemp("list"), lengths, dtype, streams)
    store = pack_up(entries, SAMPLINGS[packed_as], "float16" if dtype == "float16" else "float32")
    sampling = SAMPLINGS[sampled_as]
    assert store.manifest.rounding == 0 and store.whole == (packed_as == "grid")
    if not store.whole and sampled_as == "grid":
        return
    start = start if len(lengths) > 4 else 0
    assert_same_batches(make_bags(entries, sampling, store), make_bags(entries, sampling), start)
    if store.whole:
        for entry, features in zip(entries, VideoDataset(store.attach(entries), XD, WIDTH).features, strict=True):
            wanted = load_video(entry.paths, WIDTH)
            np.testing.assert_array_equal(features, wanted)
            assert features.dtype == wanted.dtype


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_ways_of_a_gpu_give_the_same_batches(name, tmp_path):
    """On the CPU, where only the transfers are missing."""
    entries, sampling = make_list(tmp_path, range(1, 30)), SAMPLINGS[name]
    bags, plain = make_bags(entries, sampling, pack_up(entries, sampling)), make_bags(entries, sampling)
    bags.packed.prefetches = True
    assert_same_batches(bags, plain)
    bags.packed.on_gpu = torch.tensor(bags.packed.mapped)
    assert_same_batches(bags, plain)


def test_an_epoch_that_is_left_early_leaves_no_thread_behind(tmp_path):
    entries = make_list(tmp_path, [9] * 60)
    bags = make_bags(entries, SAMPLINGS["window"], pack_up(entries))
    bags.packed.prefetches = True
    before = threading.active_count()
    batches = load_batches(bags, ShuffledBatchSampler(np.arange(60), 2, 0).epoch(0), workers=0)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_rounding_in_the_manifest_is_that_of_the_values(sampling, tmp_path):
    entries = make_list(tmp_path, [5, 8, 30], "float32")
    store = pack_up(entries, sampling)
    worst = 0.0
    for row, entry in enumerate(entries):
        features = load_video(entry.paths)
        exact = features if store.whole else sampling.sample(features, None)[0]
        found = store.video(row) if store.whole else store.features[row]
        off = np.abs(found.astype(np.float64) - exact).max(axis=1)
        worst = max(worst, np.max(off / np.maximum(np.abs(exact).max(axis=1), 1e-30)))
    assert 0 < worst < 2**-11
    assert store.manifest.rounding == pytest.approx(worst, rel=1e-4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((4, WIDTH), np.nan, np.float16), "holds NaN"),
        (np.ones((4, WIDTH + 1), np.float16), "dim 4, but 3 are expected"),
        (np.ones((4, WIDTH), np.int64), "features must be float"),
        (np.full((4, WIDTH), 7e4, np.float32), "holds 70000.*--dtype float32"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(bad, message, tmp_path):
    entries = make_list(tmp_path, [3, 4, 5])
    np.save(entries[1].path, bad)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=f"list.csv, row 3: .*v001_rgb__0.npy.*{message}"):
        pack_up(entries)
    assert sorted(os.listdir(tmp_path)) == before
    if "--dtype" in message:
        assert pack_up(entries, dtype="float32").manifest.rounding == 0


def test_an_interrupted_packing_leaves_what_was_there(tmp_path, monkeypatch):
    entries = make_list(tmp_path, [5] * 20)
    pack_up(entries)
    before = {file.name: file.read_bytes() for file in (tmp_path / "list.pack").iterdir()}

    def stop(paths, width):
        if paths == entries[12].paths:
            raise KeyboardInterrupt
        return load_video(paths, width)

    monkeypatch.setattr(packed, "load_video", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_up(entries, dtype="float32")
    assert {file.name: file.read_bytes() for file in (tmp_path / "list.pack").iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    """Also of a run that was killed after it moved the old store away and before the new one was in place."""
    for name in (".list.pack.one.tmp", ".list.pack.two.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FEATURES).write_bytes(name.encode())
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "list.pack"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["list.pack"]
    assert (tmp_path / "list.pack" / FEATURES).read_bytes() == b".list.pack.two.old.tmp"


def test_neither_another_folder_nor_a_full_disk_is_written(tmp_path, monkeypatch):
    (tmp_path / "list.pack").mkdir()
    (tmp_path / "list.pack" / "mine.txt").write_text("precious")
    entries = make_list(tmp_path, [5])
    with pytest.raises(UserError, match="does not hold packed features: move it away"):
        pack_up(entries)
    assert (tmp_path / "list.pack" / "mine.txt").exists()
    shutil.rmtree(tmp_path / "list.pack")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=T * WIDTH * 2 - 1))
    with pytest.raises(UserError, match="GB are free there: name another folder with --output"):
        pack_up(entries)
    assert not (tmp_path / "list.pack").exists()


def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entries, fit: write_list(fit["list_path"], entries[:-1]), "list.csv has changed"),
        (lambda entries, fit: fit.update(sampling=WindowSampling(T + 1)), "8 snippets, not inputs of 9 snippets"),
        (lambda entries, fit: fit.update(sampling=None), "not whole videos"),
        (lambda entries, fit: fit.update(width=WIDTH + 1), "have dim 3, not 4"),
        (lambda entries, fit: fit.update(streams=["rgb"]), "streams rgb event, not rgb"),
        (lambda entries, fit: touch(entries[3].path), "v003_rgb__0.npy has changed"),
        (lambda entries, fit: touch(entries[3].further[0]), "v003_event__0.npy has changed"),
        (lambda entries, fit: entries[0].path.write_bytes(b""), "v000_rgb__0.npy has changed"),
    ],
)
def test_a_store_that_does_not_fit_says_why(change, said, tmp_path):
    entries = make_list(tmp_path, [5, 9, 8, 7], streams=2)
    store = pack_up(entries)
    fit = {"list_path": tmp_path / "list.csv", "streams": STREAMS, "width": WIDTH, "sampling": WindowSampling(T)}
    store.check_fit(**fit)
    store.check_sources(entries)
    change(entries, fit)
    with pytest.raises(UserError, match=f"list.pack does not fit: .*{said}.*pack again, or .*--no-packed"):
        store.check_fit(**fit)
        store.check_sources(entries)


def edit(name, value):
    return lambda folder: write_json(folder / MANIFEST, read_json(folder / MANIFEST, "manifest") | {name: value})


def bump(name, by):
    """Change the last number of an array, which only its checksum shows."""

    def change(folder):
        array = np.load(folder / name)
        array.flat[-1] += by
        np.save(folder / name, array)

    return change


def save(name, array):
    return lambda folder: np.save(folder / name, array)


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / FEATURES, (folder / FEATURES).stat().st_size - 1),
    "longer": lambda folder: (folder / FEATURES).write_bytes((folder / FEATURES).read_bytes() + b"0"),
    "no features": lambda folder: (folder / FEATURES).unlink(),
    "other features": save(FEATURES, np.ones((4, T, 5), np.float16)),
    "flat features": save(FEATURES, np.ones(4, np.float16)),
    "no rows": save(FEATURES, np.ones((0, T, WIDTH), np.float16)),
    "Fortran features": save(FEATURES, np.ones((4, T, WIDTH), np.float16, order="F")),
    "no lengths": lambda folder: (folder / VIDEOS).unlink(),
    "other lengths": save(VIDEOS, np.array([[0, 2], [8, 2], [8, 2], [7, 2]])),
    "float lengths": save(VIDEOS, np.array([[5.0, 2], [8, 2], [8, 2], [7, 2]])),
    "few sources": save(SOURCES, np.zeros((3, 1, 2), np.int64)),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "no JSON": lambda folder: (folder / MANIFEST).write_text("{"),
    "not of ours": lambda folder: (folder / MANIFEST).write_text("[]"),
    "other format": edit("format", "clipfusionvad-pack-0"),
    "extra key": edit("more", 1),
    "text for a number": edit("videos", "four"),
    "no streams": edit("streams", None),
    "no dtype": edit("dtype", "complex"),
    "another time of a file": bump(SOURCES, 1),
    "another size of a value": bump(VIDEOS, 2),
    "another rounding": edit("rounding", 0.5),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_one_clear_line(name, tmp_path):
    pack_up(make_list(tmp_path, [5, 9, 8, 7]))
    DAMAGE[name](tmp_path / "list.pack")
    with pytest.raises(UserError, match="list.pack is damaged: .*pack again, or .*--no-packed") as raised:
        open_store(tmp_path / "list.pack")
    assert "\n" not in str(raised.value)


def test_files_may_be_gone_and_the_list_may_move(tmp_path):
    entries = make_list(tmp_path / "here", [5, 9, 8])
    store = pack_up(entries)
    wanted = batches_of(make_bags(entries, SAMPLINGS["window"]))
    entries[0].path.unlink()
    store.check_sources(entries)
    found = batches_of(make_bags(entries, SAMPLINGS["window"], store))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    store.check_fit(tmp_path / "there" / "list.csv", ["rgb"], WIDTH, WindowSampling(T))
