"""python -m clipfusionvad pack, and training and testing with what it made: the same run to the last bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_resume import stopping_at
from tiny import package, quietly


def pack(tiny, *more):
    return quietly(package("pack", tiny.dataset), tiny.train_flags(*more))


def assert_same_run(one, other):
    for name in ("losses.csv", "metrics.json"):
        assert (one / "run" / name).read_text() == (other / "run" / name).read_text(), name
    states = [torch.load(work / "model.pth", weights_only=True)["model_state_dict"] for work in (one, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def lose_features(tiny):
    for folder in ("features", "events"):
        shutil.rmtree(tiny.folder / folder)


@pytest.mark.parametrize("method", ["clipfusionvad", "anomalyclip", "iefvad"])
def test_training_stopping_and_testing_are_the_same_with_nothing_but_the_store(tiny, method, tmp_path, monkeypatch):
    tiny = tiny.of(method)
    files, packed = tiny.at(tmp_path / "files"), tiny.at(tmp_path / "packed")
    more = ["--max-epoch", 2, "--eval-every", 6]
    assert files.train(*more).code == 0
    made = pack(tiny)
    assert made.code == 0, made.err
    assert all(f"{tiny.folder / name}.pack: " in made.out for name in ("train", "test"))
    assert made.out.count("float16 (exact)") == 2 and made.out.count(" MB, packed in ") == 2
    lose_features(tiny)
    assert tiny.at(tmp_path / "none").train("--no-packed").code == 2
    with stopping_at(monkeypatch, 6):
        stopped = packed.train(*more)
    assert stopped.code == 130 and f"features of {tiny.train_list} from {tiny.folder / 'train.pack'}" in stopped.out
    assert packed.train(*more, "--use-checkpoint").code == 0
    assert_same_run(files.work, packed.work)

    tested = packed.test("--metrics-json", tmp_path / "m.json")
    assert tested.code == 0 and f"features of {tiny.test_list} from" in tested.out
    best = json.loads((files.work / "run" / "metrics.json").read_text())["best"]
    assert json.loads((tmp_path / "m.json").read_text()) == best


def test_packing_again_does_nothing_until_something_has_changed(tiny):
    assert pack(tiny).code == 0
    train, test = (tiny.folder / f"{name}.pack/features.npy" for name in ("train", "test"))
    before, whole = train.stat().st_mtime_ns, test.read_bytes()
    again = pack(tiny)
    assert again.code == 0 and again.out.count("is up to date") == 2
    test.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = pack(tiny)
    assert "train.pack is up to date" in again.out and "test.pack: " in again.out
    assert train.stat().st_mtime_ns == before and test.read_bytes() == whole

    path = next((tiny.folder / "features").glob("*__1.npy"))
    np.save(path, np.load(path)[:-1])
    refused = tiny.train()
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"{path.name} has changed since; pack again" in refused.err and "--no-packed" in refused.err
    assert "train.pack: " in pack(tiny).out
    assert tiny.train("--max-epoch", 1).code == 0

    train.write_bytes(train.read_bytes()[:-100])
    refused = tiny.train("--overwrite")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "train.pack is damaged: features.npy is missing, truncated" in refused.err


def test_another_folder_and_another_dtype(tiny, tmp_path):
    features = next((tiny.folder / "features").glob("*__5.npy"))
    np.save(features, np.load(features).astype(np.float32) + np.float32(1e-5))
    rounded = pack(tiny, "--output", tmp_path / "half")
    exact = pack(tiny, "--output", tmp_path / "single", "--dtype", "float32")
    assert "float16 (rounded by at most" in rounded.out and exact.out.count("float32 (exact)") == 2
    assert not list(tiny.folder.glob("*.pack"))
    assert tiny.test("--metrics-json", tmp_path / "files.json").code == 0
    tested = tiny.test("--metrics-json", tmp_path / "packed.json", "--packed-dir", tmp_path / "single")
    assert f"from {tmp_path / 'single' / 'test.pack'}" in tested.out
    assert (tmp_path / "packed.json").read_text() == (tmp_path / "files.json").read_text()


def test_the_clean_protocol_takes_whole_videos_from_the_files(tiny, tmp_path):
    more = ["--protocol", "clean", "--max-epoch", 1, "--holdout", 0.3]
    assert pack(tiny).code == 0
    trained = tiny.at(tmp_path / "packed").train(*more)
    assert trained.code == 0 and "train.pack" in trained.out
    lose_features(tiny)
    refused = tiny.at(tmp_path / "none").train(*more)
    assert refused.code == 2 and "feature file not found" in refused.err


def test_one_list_for_training_and_testing_is_packed_whole(tiny, tmp_path):
    same = ["--test-list", tiny.train_list, "--gt-path", "none", "--max-epoch", 1]
    made = pack(tiny, *same)
    assert made.out.count("train.pack: ") == 1 and "whole videos" in made.out
    lose_features(tiny)
    assert tiny.at(tmp_path / "packed").train(*same, "--workers", 1).code == 0


def test_help_names_its_own_options_and_those_of_training():
    shown = quietly(package("pack", "ucf"), ["--help"])
    assert shown.code == 0
    assert {"--output", "--dtype", "--train-list", "--feature-root"} <= set(shown.out.replace(",", " ").split())
