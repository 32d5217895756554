"""``compare-features``: every cause is made on purpose, and must be named; real features where they are at hand."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.tools.features.compare import IDENTICAL, SAME, compare_rows

DIM = 64
SHARED = Path(os.environ.get("SHARED_DIR") or Path(__file__).resolve().parents[3] / "shared")
REAL = SHARED / "data" / "real_clip_features"


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_frames(count=800, seed=0, view=None):
    """Per-frame features of length near 10: a scene, slow and quick motion; ``view`` is the seed of a crop."""
    rng = np.random.default_rng(seed)
    scene = 1.2 * rng.normal(size=DIM)
    slow = np.cumsum(rng.normal(size=(count // 8 + 2, DIM)) * 0.35, axis=0)
    at = np.arange(count) / 8
    rows = scene + interp1d(np.arange(len(slow)), slow, axis=0)(at) + 0.25 * rng.normal(size=(count, DIM))
    if view is not None:
        rows += 0.7 * np.random.default_rng(view).normal(size=DIM)
    norms = 10 + 0.4 * np.sin(at) + 0.05 * rng.normal(size=count)
    return (unit(rows) * norms[:, None]).astype(np.float32)


def means(frames, stride=16):
    return frames[: len(frames) // stride * stride].reshape(-1, stride, frames.shape[1]).mean(axis=1)


FRAMES = make_frames()
ROWS = means(FRAMES)


def noise(size, seed=5):
    return np.random.default_rng(seed).normal(size=ROWS.shape).astype(np.float32) * size


def other_resize(rows):
    """The same few percent everywhere, and a little of its own in each row; as long as before."""
    fixed = np.random.default_rng(9).normal(size=DIM)
    changed = unit(rows) + 0.12 * fixed / np.linalg.norm(fixed) + 0.06 * unit(noise(1))
    return (unit(changed) * np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def turned(rows):
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))
    return (rows @ turn).astype(np.float32)


CASES = {
    "the same": (ROWS, ROWS.copy(), IDENTICAL),
    "stored in half precision": (ROWS, ROWS.astype(np.float16), SAME),
    "computed in half precision": (ROWS, ROWS + noise(1e-3), SAME),
    "a row more": (ROWS, ROWS[:-1], "rows differ by one (tail rule)"),
    "another last row": (ROWS, np.vstack([ROWS[:-1], 0.5 * ROWS[-1:] + 3]), "last row differs (tail rule)"),
    "cut short": (ROWS[:30], ROWS, "one is cut short"),
    "L2-normalised": (ROWS, unit(ROWS), "L2-normalised"),
    "normalised per frame": (ROWS, means(unit(FRAMES)), "normalised per frame"),
    "another scale": (ROWS, 2.5 * ROWS, "other scale"),
    "scale by row": (ROWS, ROWS * np.linspace(0.5, 2, len(ROWS))[:, None], "other scale by row"),
    "means over frames, the other way round": (ROWS, FRAMES, "means of 16 frames"),
    "means over eight frames": (FRAMES, means(FRAMES, 8), "means of 8 frames"),
    "means and normalised": (FRAMES, unit(ROWS), "means of 16 frames + L2-normalised"),
    "a frame against a mean": (ROWS, FRAMES[8::16], "one frame instead of the mean (B)"),
    "a mean against a frame": (FRAMES[8::16], ROWS, "one frame instead of the mean (A)"),
    "shifted by rows, and normalised": (ROWS[2:], unit(ROWS), "shifted by 2 rows + L2-normalised"),
    "other resize": (ROWS, other_resize(ROWS), "other resize or decoder"),
    "other resize, and normalised": (ROWS, unit(other_resize(ROWS)), "other resize or decoder + L2-normalised"),
    "other model": (ROWS, turned(ROWS), "other model"),
    "other width": (ROWS, ROWS[:, :32], "other model"),
    "other video": (ROWS, unit(means(make_frames(seed=8)) + 1.2 * ROWS.mean(axis=0)) * 10, "other video"),
    "a few rows": (ROWS, np.vstack([ROWS[:20], turned(ROWS[20:25]), ROWS[25:]]), "some rows differ"),
}


@pytest.mark.parametrize(("a", "b", "cause"), CASES.values(), ids=CASES)
def test_cause_is_named(a, b, cause):
    found = compare_rows(a, b)
    assert found.cause == cause, found
    assert found.agree == (cause in (IDENTICAL, SAME))
    assert found.rows == (len(a), len(b)) and found.evidence


@pytest.mark.parametrize("count", [1, 2, 3])
def test_hardly_any_rows(count):
    rows = ROWS[:count]
    assert compare_rows(rows, rows.astype(np.float16)).cause == SAME
    assert not compare_rows(rows, turned(rows)).agree and not compare_rows(rows, ROWS[: len(rows) + 1]).agree


def test_figures_are_those_of_a_plain_loop():
    other = other_resize(ROWS)[:-3] * 1.5
    found, pairs = compare_rows(ROWS, other), list(zip(ROWS, other, strict=False))
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
    ratios = [np.linalg.norm(y) / np.linalg.norm(x) for x, y in pairs]
    figures = [found.mean_cosine, found.min_cosine, found.norm_ratio, found.max_difference]
    largest = max(abs(x - y).max() for x, y in pairs)
    assert figures == pytest.approx([np.mean(cosines), min(cosines), np.mean(ratios), largest], abs=1e-5)


@given(shift=st.integers(-12, 12).filter(bool), seed=st.integers(0, 20), half=st.booleans())
def test_rows_shifted_by_any_number_are_found(shift, seed, half):
    rows = means(make_frames(900, seed))
    other = rows[shift:] if shift > 0 else np.vstack([noise(3, seed)[:-shift], rows])
    found = compare_rows(rows, other.astype(np.float16 if half else np.float32))
    assert found.cause == f"shifted by {abs(shift)} row{'s' if abs(shift) > 1 else ''}", found
    assert found.offset == shift


@given(shift=st.integers(-15, 15), first=st.integers(0, 15), seed=st.integers(0, 20))
def test_any_frame_and_any_shift_in_frames_is_found(shift, first, seed):
    frames = make_frames(640, seed)
    late = frames[shift:] if shift >= 0 else np.vstack([noise(3, seed)[:-shift], frames])
    found = compare_rows(frames, means(late))
    assert found.cause == (f"means of 16 frames, shifted by {abs(shift)} frames" if shift else "means of 16 frames")
    found = compare_rows(frames, frames[first::16].astype(np.float16))
    name = "the middle one of 16" if first == 8 else f"number {first} of 16"
    assert found.cause == f"one frame instead of the mean ({name})"


@pytest.mark.parametrize("frames", [3, 5, 8, -4])
def test_means_that_start_some_frames_later_are_told_from_rows_alone(frames):
    later = means(FRAMES[frames:]) if frames > 0 else means(np.vstack([FRAMES[:-frames], FRAMES]))
    found = compare_rows(ROWS, later[: len(ROWS)])
    assert found.cause.startswith("shifted by about "), found
    assert abs(int(found.cause.split()[3]) - abs(frames)) <= 1, found
    assert ("next" if frames > 0 else "previous") in found.evidence


@pytest.fixture
def folders(tmp_path):
    """Two folders of two videos with three crops each, equal so far."""
    (tmp_path / "a/Arson").mkdir(parents=True)
    for video, crop in itertools.product(range(2), (0, 1, 5)):
        rows = means(make_frames(480, seed=video, view=100 + crop))
        np.save(tmp_path / "a/Arson" / f"Arson00{video}_x264__{crop}.npy", rows)
    return shutil.copytree(tmp_path / "a", tmp_path / "b").parent


def compare(*argv):
    return quietly(main, ["compare-features", *map(str, argv)])


def test_folders_that_agree_whole_or_in_part(folders):
    for flags, says in (((), "6 pairs compared: 6 × identical"), (("--limit", 3), "3 pairs compared")):
        done = compare(folders / "a", folders / "b", *flags)
        assert done.code == 0 and says in done.out
    # Where folders differ, files are paired by name.
    renamed = (folders / "b" / "Arson").rename(folders / "b" / "test")
    (renamed / "Arson000_x264__0.npy").unlink()
    done = compare(folders / "a", folders / "b")
    assert done.code == 0 and "5 pairs compared" in done.out
    assert "1 files below" in done.err and "Arson000_x264__0.npy" in done.err
    # A file that cannot be read is named; the others are compared.
    path = renamed / "Arson001_x264__0.npy"
    path.write_bytes(path.read_bytes()[:-8])
    done = compare(folders / "a", folders / "b")
    assert done.code == 2 and "is truncated" in done.err and "4 pairs compared" in done.out


def test_crops_that_were_exchanged_are_named(folders, tmp_path):
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own/Arson001_x264.npy", np.load(folders / "a/Arson/Arson001_x264__1.npy"))
    done = compare(tmp_path / "own", folders / "b")
    assert done.code == 1 and "1 × other crop (1)" in done.out
    one, other = (folders / "b" / "Arson" / f"Arson001_x264__{crop}.npy" for crop in (0, 5))
    centre = np.load(one)
    shutil.copy(other, one)
    np.save(other, unit(centre))
    assert compare(folders / "a", folders / "b", "--output", folders / "out.json").code == 1
    record = json.loads((folders / "out.json").read_text())
    # The worst come first.
    assert {pair["file"]: pair["cause"] for pair in record["pairs"][:2]} == {
        "Arson/Arson001_x264__0.npy": "other crop (5 for 0, mirrored) + L2-normalised",
        "Arson/Arson001_x264__5.npy": "other crop (0 for 5, mirrored)",
    }
    assert record["causes"][IDENTICAL] == 4 and not record["agree"]
    assert record["overall"]["min_cosine"] == min(pair["min_cosine"] for pair in record["pairs"])
    assert record["overall"]["norm_ratio"] == pytest.approx(np.mean([pair["norm_ratio"] for pair in record["pairs"]]))


def test_single_files_pair_under_any_names_and_missing_rows_may_agree(tmp_path):
    rows = ROWS.copy()
    rows[3] = np.nan
    for name in ("one.npy", "two.npy"):
        np.save(tmp_path / name, rows)
    assert compare(tmp_path / "one.npy", tmp_path / "two.npy").code == 0
    np.save(tmp_path / "two.npy", rows[:, :32])
    done = compare(tmp_path / "one.npy", tmp_path / "two.npy")
    assert done.code == 1 and "mean cosine nan" in done.out and "1 × other model" in done.out


def test_unusable_input_is_one_line(folders):
    for name in ("empty", "strange"):
        (folders / name).mkdir()
    np.save(folders / "strange" / "z.npy", ROWS)
    for other, says in {
        "nowhere": "not found",
        "empty": "no feature files (.npy) below",
        "a/Arson/Arson001_x264__0.npy": "two files or two folders",
        "strange": "neither by path nor by name",
    }.items():
        done = compare(folders / "a", folders / other)
        assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs real CLIP features, {REAL} (SHARED_DIR)")
def test_causes_are_named_for_real_features():
    done = compare(*(REAL / "ucf5" / f"Abuse023_x264_{kind}.npy" for kind in ("frames_fp16", "snip16mean_fp32")))
    assert done.code == 1 and "1 × means of 16 frames\n" in done.out
    frames = np.load(REAL / "ucf5" / "Abuse023_x264_frames_fp16.npy").astype(np.float32)
    for frame in (0, 8, 15):
        assert compare_rows(means(frames), frames[frame::16]).cause == "one frame instead of the mean (B)"
    for shift in (1, 2, 4, 6, 8):
        found = compare_rows(means(frames), means(frames[shift:]))
        assert found.cause == f"shifted by about {shift} frame{'s' if shift > 1 else ''} of 16"
        assert compare_rows(frames, means(frames[shift:])).cause == f"means of 16 frames, shifted by {shift} frames"
    videos = [np.load(path).astype(np.float32) for path in sorted((REAL / "cctv10").glob("*0*.npy"))]
    for rows in videos:
        assert compare_rows(rows, unit(rows)).cause == "L2-normalised"
        assert compare_rows(rows, rows[:-1]).cause == "rows differ by one (tail rule)"
        assert compare_rows(rows, rows[3:]).cause == "shifted by 3 rows"
    for one, other in zip(videos, videos[1:], strict=False):
        assert compare_rows(one, other).cause == "other video"
