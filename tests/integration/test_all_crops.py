"""``--test-crops all``: the scores of a video are means over all files of its crops."""

import numpy as np
import pytest
from tiny import make_tiny

from clipfusionvad.report.scores import read_scores

METHODS = ["deepmil", "vadclip", "iefvad"]  # no classes, classes, two streams
CROPS = [5, 0, 1, 10]  # the listed one first


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_means_over_the_files_of_the_crops(method, tmp_path):
    data = make_tiny("ucf", tmp_path / "data").of(method).at(tmp_path)
    rng = np.random.default_rng(0)
    listed = data.test_list.read_text().splitlines()[1:]
    for folder in ("features", "events"):
        for line in listed:
            path = data.folder / folder / line.split(",")[0].split("/")[1]
            features, stem = np.load(path), path.stem.partition("__")[0]
            for crop in CROPS[1:]:
                other = features + rng.normal(0, 0.3, features.shape).astype(features.dtype)
                np.save(path.with_name(f"{stem}__{crop}.npy"), other)
    assert data.train("--max-epoch", 1).code == 0
    found = {}
    for crop in CROPS:
        rows = [line.replace("__5.npy", f"__{crop}.npy") for line in listed]
        data.test_list.write_text("\n".join(["path,label", *rows]))
        for name in ("listed", "all") if crop == CROPS[0] else ("listed",):
            out = tmp_path / f"{name}{crop}"
            done = data.test("--test-crops", name, "--output-dir", out)
            assert done.code == 0, done.err
            found[f"{name}{crop}"] = read_scores(out / "test_scores.npz").scores
    for whole, *parts in zip(*(found[key] for key in ("all5", *(f"listed{n}" for n in CROPS))), strict=True):
        np.testing.assert_allclose(whole.anomaly, np.mean([part.anomaly for part in parts], axis=0), atol=1e-6)
        if whole.classes is not None:
            np.testing.assert_allclose(whole.classes, np.mean([part.classes for part in parts], axis=0), atol=1e-6)


def test_videos_have_the_same_number_of_crops(tmp_path):
    data = make_tiny("ucf", tmp_path / "data").of("deepmil").at(tmp_path)
    assert data.train("--max-epoch", 1).code == 0
    listed = [data.folder / line.split(",")[0] for line in data.test_list.read_text().splitlines()[1:]]
    for path in listed:
        np.save(path.with_name(path.name.replace("__5", "__007")), np.load(path))
    done = data.test("--test-crops", "all")
    assert done.code == 0 and "mean over 2 crops of each video" in done.out
    listed[1].with_name(listed[1].name.replace("__5", "__007")).unlink()
    done = data.test("--test-crops", "all")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "has 2 crops, but" in done.err and listed[1].stem.partition("__")[0] in done.err


def test_crops_that_are_not_known_are_one_line(tmp_path):
    data = make_tiny("ucf", tmp_path / "data").of("deepmil").at(tmp_path)
    assert data.train("--max-epoch", 1).code == 0
    lines = data.test_list.read_text().splitlines()
    name = lines[1].split(",")[0]
    (data.folder / name).rename(data.folder / "features/other.npy")
    data.test_list.write_text("\n".join([lines[0], lines[1].replace(name, "features/other.npy"), *lines[2:]]))
    done = data.test("--test-crops", "all")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "other.npy is not named NAME__k.npy" in done.err
