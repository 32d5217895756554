"""doctor and compare-features on features that are wrong but readable: rows out of order, another scale, a row less."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import UCF
from clipfusionvad.tools.features.order import name_order, row_order

REAL = Path(os.environ.get("SHARED_DIR") or Path(__file__).resolve().parents[3] / "shared") / "data"
CLIP = REAL / "real_clip_features"
needs_real = pytest.mark.skipif(not CLIP.is_dir(), reason=f"needs real features, {CLIP} (SHARED_DIR)")
DIM = 64


def make_rows(seed, count=48):
    """Rows that drift around a scene, which all videos share in part."""
    scene = 2 * np.random.default_rng(99).normal(size=DIM)
    rng = np.random.default_rng(seed)
    return scene + rng.normal(size=DIM) + 0.3 * np.cumsum(rng.normal(size=(count, DIM)), axis=0)


def sorted_as_text(rows):
    return rows[sorted(range(len(rows)), key=str)]


def shuffled(rows):
    return np.random.default_rng(int(1000 * abs(rows[0, 0]))).permutation(rows)


def doctor(folder, train, test, check, *flags, truth=()):
    """What a check finds in two lists of features by name."""
    for side, videos in (("train", train), ("test", test)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        lines = ["path,label"]
        for name, rows in videos.items():
            np.save(folder / side / name, rows.astype(np.float16 if np.abs(rows).max() > 1 else np.float32))
            lines.append(f"{side}/{name}.npy,{UCF.label_of(name)}")
        (folder / f"{side}.csv").write_text("\n".join(lines))
    (folder / "truth.csv").write_text("\n".join(["video,frames,label,start,end", *truth]))
    lists = ["--train-list", folder / "train.csv", "--test-list", folder / "test.csv"]
    lists += ["--gt-path", folder / "truth.csv" if truth else "none", "--visual-width", len(rows[0])]
    argv = ["doctor", "--dataset", "ucf", *lists, "--only", check, "--json", folder / "found.json", *flags]
    done = quietly(main, strings(argv))
    return done, json.loads((folder / "found.json").read_text())["findings"] if not done.err else []


def slow_roughness(rows):
    steps = [np.square(rows[i + 1] - rows[i]).sum() for i in range(len(rows) - 1)]
    pairs = [np.square(a - b).sum() for i, a in enumerate(rows) for b in rows[:i]]
    return np.mean(steps) / np.mean(pairs)


def test_roughness_is_the_step_between_neighbours_against_that_between_any_two_rows():
    rows = make_rows(1, 120)
    found = row_order(rows)
    assert found.roughness == pytest.approx(slow_roughness(rows), rel=1e-9)
    for first in (0, 1):
        text = sorted(range(first, first + 120), key=str)
        assert (name_order(120, first) + first).tolist() == text
        assert row_order(rows[name_order(120, first)]).sorted_roughness == pytest.approx(found.roughness)
    # Too few rows, rows without any change, and rounding are not judged.
    for still in (rows[:15], np.ones((99, DIM)), np.zeros((99, DIM)), 10 + 1e-4 * rows):
        assert row_order(still) is None


@pytest.mark.parametrize("level, change, says", [
    ("", lambda rows: rows, ""),
    ("", lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True), ""),
    ("error", sorted_as_text, "in the order of file names"),
    ("warning", shuffled, "in random order"),
])  # fmt: skip
def test_rows_out_of_order_are_found(level, change, says, tmp_path):
    train = {f"Abuse{k:03}_x264": change(make_rows(k, 200)) for k in range(1, 9)}
    train |= {f"Normal_Videos{k:03}_x264": make_rows(k, 200) for k in range(10, 12)}
    test = {"Abuse030_x264": np.ones((50, DIM)), "Normal_Videos_031_x264": make_rows(31, 7)[::-1]}
    done, found = doctor(tmp_path, train, test, "row-order")
    assert not done.err and [item["level"] for item in found] == [level] * bool(level)
    if found:
        assert "8 of 10 videos, the first is Abuse001_x264.npy" in found[0]["what"] and says in found[0]["what"]
        assert found[0]["file"].endswith("train.csv") and found[0]["row"] == 2


@pytest.mark.parametrize("short, more", [(1, 0), (1, 1), (0, 0)])
def test_a_row_fewer_where_frames_divide_is_found(short, more, tmp_path):
    """``short`` rows fewer where 16 divides the frames; others have ``more`` than the whole ones."""
    frames = {f"Abuse{k:03}_x264": 16 * (20 + k) + (0 if k % 3 == 0 else k) for k in range(1, 13)}
    test = {name: make_rows(k, n // 16 + (more if n % 16 else -short)) for k, (name, n) in enumerate(frames.items())}
    test["Normal_Videos_031_x264"] = make_rows(31, 40)
    truth = [f"{name},{count},Abuse,16,99" for name, count in frames.items()] + ["Normal_Videos_031_x264,,Normal,,"]
    done, found = doctor(tmp_path, {"Abuse077_x264": make_rows(7)}, test, "last-row", truth=truth)
    assert not done.err and len(found) == short, done
    if found:
        rule = "ceil" if more else "floor"
        assert found[0]["what"].startswith("all 4 videos whose frames divide by 16 have one row fewer than that;")
        assert f"others have {rule}(frames / 16)" in found[0]["what"] and "Abuse003_x264.npy" in found[0]["what"]
        assert found[0]["row"] == 4


def test_the_mean_is_compared_with_a_reference(tmp_path):
    train = {f"Abuse{k:03}_x264": make_rows(k) for k in range(1, 4)}
    test = {f"Normal_Videos_{k:03}_x264": make_rows(k) for k in range(4, 7)}
    mean = np.mean([rows.mean(axis=0) for rows in train.values()], axis=0)
    other = np.linalg.norm(mean) * np.eye(DIM)[0]
    for centroid, level, says in (
        (mean, "note", "1.00 with"),
        (mean[None] / 5, "warning", "5 times its length; they have another scale"),
        (other - mean * (other @ mean) / (mean @ mean), "warning", "they point elsewhere"),
        (np.ones(3), "error", "3 numbers a row, the features have 64"),
    ):
        np.save(tmp_path / "centroid.npy", centroid)
        done, found = doctor(tmp_path, train, test, "reference-features", "--reference", tmp_path / "centroid.npy")
        assert [item["level"] for item in found] == [level] * 2, done
        assert says in f"{found[0]['what']}; {found[0]['advice']}"
        sides = [tmp_path / "train", tmp_path / "centroid.npy"]
        codes = [quietly(main, strings(["compare-features", *pair])).code for pair in (sides, sides[::-1])]
        assert codes == [{"note": 0, "warning": 1, "error": 2}[level]] * 2
    # A folder of features is a reference, too; without the option, nothing is said.
    done, found = doctor(tmp_path, train, test, "reference-features", "--reference", tmp_path / "train")
    assert f"cosine of 1.00 with that of {tmp_path / 'train'}" in found[0]["what"]
    assert doctor(tmp_path, train, test, "reference-features")[1] == []
    for bad in (np.ones(5, int), np.ones((2, 2, 2)), np.full(DIM, np.nan)):
        np.save(tmp_path / "bad.npy", bad)
        done, _ = doctor(tmp_path, train, test, "reference-features", "--reference", tmp_path / "bad.npy")
        assert done.code == 2 and done.err.count("\n") == 1 and "bad.npy" in done.err


def test_compare_features_names_another_order(tmp_path):
    rows = make_rows(3, 150).astype(np.float32)
    one_based = rows[sorted(range(150), key=lambda row: str(row + 1))]
    cases = {"text": sorted_as_text(rows), "one": one_based, "any": shuffled(rows), "reversed": rows[::-1]}
    for name, other in cases.items():
        np.save(tmp_path / "a.npy", rows)
        np.save(tmp_path / "b.npy", other.astype(np.float16))
        done = quietly(main, ["compare-features", str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])
        cause = "rows of B sorted as text" if name in ("text", "one") else "rows in another order"
        assert done.code == 1 and f"1 × {cause}\n" in done.out, done.out
        if name == "text":
            done = quietly(main, ["compare-features", str(tmp_path / "b.npy"), str(tmp_path / "a.npy")])
            assert "1 × rows of A sorted as text\n" in done.out


@needs_real
def test_real_clip_features_are_in_order_until_they_are_not(tmp_path):
    videos = {}
    for path in sorted([*CLIP.glob("cctv10/[afn]*0*.npy"), *CLIP.glob("ucf5/*snip*.npy")]):
        videos[f"{'Abuse' if path.name[0] != 'n' else 'Normal_Videos'}{len(videos):03}_x264"] = np.load(path)
    train, test = dict(list(videos.items())[:10]), dict(list(videos.items())[10:])
    assert doctor(tmp_path, train, test, "row-order")[1] == []
    for change, level in ((sorted_as_text, "error"), (shuffled, "warning")):
        done, found = doctor(tmp_path, {name: change(rows) for name, rows in train.items()}, test, "row-order")
        assert [item["level"] for item in found] == [level] and "the first is Abuse000" in found[0]["what"], done
    for listed, scale in ((0, "1.18 times"), (1, "0.1")):
        flags = "--reference", CLIP / "ucf_ncentroid_f32.npy"
        found = doctor(tmp_path, train, test, "reference-features", *flags)[1][listed]
        assert scale in found["what"] and f"cosine of 0.8{(4, 6)[listed]}" in found["what"]
        assert found["level"] == ("note", "warning")[listed]
    # The centroids' cosine, from the data's README.
    for pair, cosine in {("ucf", "xd"): 0.8142, ("ucf", "sht"): 0.8132, ("xd", "sht"): 0.8294}.items():
        files = [CLIP / f"{name}_ncentroid_f32.npy" for name in pair]
        done = quietly(main, strings(["compare-features", *files, "--output", tmp_path / "out.json"]))
        found = json.loads((tmp_path / "out.json").read_text())["overall"]
        assert done.code == 0 and found["cosine"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.slow
@needs_real
def test_real_ucf_features_are_in_order_until_they_are_not(tmp_path):
    parts = np.load(REAL / "ucf_i3d" / "ucf_40seg_f16.npz")
    train, test = (dict(zip(parts[f"{side}_names"], parts[side], strict=True)) for side in ("train", "test"))
    assert doctor(tmp_path, train, test, "row-order")[1] == []
    for change, level, least in ((sorted_as_text, "error", 200), (shuffled, "warning", 200)):
        done, found = doctor(tmp_path, {}, {name: change(rows) for name, rows in test.items()}, "row-order")
        assert [item["level"] for item in found] == [level], done
        assert int(found[0]["what"].split()[3]) >= least, found
