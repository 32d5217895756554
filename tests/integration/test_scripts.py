"""The programs as a user runs them, on a tiny made-up benchmark."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny import TRAIN, make_tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli import command_names, training, typed
from clipfusionvad.data.lists import read_list
from clipfusionvad.engine import evaluator

ROOT = Path(__file__).resolve().parents[2]
FILES = {"options.yaml", "environment.json", "metrics.json", "metrics.jsonl", "metrics.csv", "losses.csv"}
FILES |= {"last.pt", "previous.pt", "best.pt", "data.csv", "scores.png", "training.png", "tensorboard", "scores.npz"}
FILES |= {"report.html", "videos.csv"}


def run_script(name, argv, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *strings([ROOT / name] if name.endswith(".py") else ["-m", name]), *strings(argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def read_json(path):
    return json.loads(Path(path).read_text())


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=[("ucf", "clipfusionvad"), ("xd", "clipfusionvad"), ("xd", "vadclip")])
def trained(request, tmp_path_factory):
    """A tiny benchmark with a trained model: --no-gam where there is a GAM."""
    dataset, method = request.param
    tiny = make_tiny(dataset, tmp_path_factory.mktemp(dataset) / "data").at(tmp_path_factory.mktemp("work"))
    options = ["--method", method] + (["--no-gam"] if method == "clipfusionvad" else [])
    outcome = tiny.train(*options, "--metrics-json", tiny.work / "metrics.json")
    assert outcome.code == 0, outcome.err
    return tiny, method


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("ucf") / "data")


def test_metrics(trained):
    """Testing gives what training reported, in the agreed form; the switches of the model need no repeating."""
    tiny, method = trained
    outcome = tiny.test("--method", method, "--metrics-json", tiny.work / "tested.json")
    assert outcome.code == 0, outcome.err
    metrics = read_json(tiny.work / "tested.json")
    assert metrics == read_json(tiny.work / "metrics.json") == read_json(tiny.work / "run/metrics.json")["best"]
    names = [f"{name}{branch}" for name in ("auc", "ap", "ano_auc") for branch in (1, 2)]
    assert {*names, "map", "map_average"} <= metrics.keys()
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert list(metrics["map"]) == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    assert all(0 <= value <= 100 for value in metrics["map"].values())
    assert metrics["map_average"] == pytest.approx(np.mean(list(metrics["map"].values())))
    assert f"{100 * metrics['auc1']:.2f}" in outcome.out and str(tiny.work / "model.pth") in outcome.out


def test_run_folder(trained):
    tiny, method = trained
    run = tiny.work / "run"
    assert {path.name for path in run.iterdir()} == FILES
    assert set(read_json(run / "metrics.json")) == {"last", "best"}
    evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Evaluated after each of two epochs; best.pt is the best by the metric of the option file.
    steps = len((run / "losses.csv").read_text().splitlines()) - 1
    assert [item["step"] for item in evaluations] == [steps // 2, steps]
    select = yaml.safe_load((run / "options.yaml").read_text())["select"]
    best = max(evaluations, key=lambda item: item["metrics"][select])
    assert torch.load(run / "best.pt", weights_only=True)["step"] == best["step"]
    assert_same_weights(weights(run / "best.pt"), weights(tiny.work / "model.pth"))
    assert read_json(run / "environment.json")["packages"]["torch"]


def test_options_file_repeats_the_run_and_another_seed_does_not(trained, tmp_path, no_plots):
    tiny, method = trained
    again = tiny.at(tmp_path / "again")
    argv = ["--config", tiny.work / "run/options.yaml", "--output-dir", again.work / "run"]
    argv += ["--model-path", again.work / "model.pth", "--checkpoint-path", again.work / "checkpoint.pth"]
    assert quietly(TRAIN[tiny.dataset], strings(argv)).code == 0
    assert_same_weights(weights(again.work / "model.pth"), weights(tiny.work / "model.pth"))
    for name in ("losses.csv", "metrics.jsonl"):
        assert (again.work / "run" / name).read_text() == (tiny.work / "run" / name).read_text()
    assert tiny.at(tmp_path / "other").train("--method", method, "--seed", 1).code == 0
    assert (tmp_path / "other/run/losses.csv").read_text() != (tiny.work / "run/losses.csv").read_text()


def test_the_same_data_in_another_form_gives_the_same_metrics(trained, tmp_path):
    """Keyed truth for the arrays, and a list with the paths of another machine."""
    tiny, method = trained
    found = tmp_path / "found.json"
    assert tiny.test("--method", method, "--gt-path", tiny.folder / "truth.csv", "--metrics-json", found).code == 0
    assert read_json(found) == read_json(tiny.work / "metrics.json")
    listed = tiny.test_list.read_text().replace("features/", "/far/away/UCF/features/")
    (tmp_path / "foreign.csv").write_text(listed)
    flags = ["--method", method, "--test-list", tmp_path / "foreign.csv"]
    outcome = tiny.test(*flags)
    assert outcome.code == 2 and "--feature-root" in outcome.err
    outcome = tiny.test(*flags, "--feature-root", tiny.folder, "--metrics-json", found)
    assert outcome.code == 0, outcome.err
    assert read_json(found) == read_json(tiny.work / "metrics.json")


# The clean protocol.


def test_clean_protocol_trains_and_selects_without_the_test_set(trained, tmp_path, no_plots, monkeypatch):
    tiny, method = trained
    trained_on, scored, selection = set(), [], []

    def watch(place, name, before=lambda *args: None, after=lambda *args: None):
        original = getattr(place, name)

        def watched(*args):
            before(*args)
            result = original(*args)
            after(*args)
            return result

        monkeypatch.setattr(place, name, watched)

    watch(training.BagDataset, "__getitem__", lambda bags, item: trained_on.add(bags.entries[item[0]].path))
    watch(evaluator, "score_videos", lambda model, features, *args: scored.append(features))
    watch(training.Trainer, "fit", after=lambda *args: selection.extend(scored))
    work = tiny.at(tmp_path)
    outcome = work.train("--method", method, "--protocol", "clean", "--holdout", 0.3, "--batch-size", 2)
    assert outcome.code == 0, outcome.err

    entries = read_list(tiny.train_list)
    videos = {entry.path: entry.video for entry in entries}
    contents = {np.load(entry.path).tobytes(): entry.video for entry in entries}
    held_out = {contents[features.tobytes()] for group in selection for features in group}
    assert selection and held_out
    # Whole videos: no crop of a video that selects is trained on.
    assert held_out.isdisjoint(videos[path] for path in trained_on)
    assert {entry.video for entry in entries} == held_out | {videos[path] for path in trained_on}
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        assert not {"map", "ano_auc1"} & json.loads(line)["metrics"].keys()
    # The test set is met once, for the last and the best weights.
    final = read_json(tmp_path / "run/metrics.json")
    assert all("map" in final[name] for name in ("last", "best"))
    assert len(scored) == len(selection) + 2
    assert all(len(group) == len(tiny.videos) for group in scored[len(selection) :])


@pytest.mark.parametrize("kept", ["Normal", "anomalous"])
def test_clean_protocol_needs_both_kinds(ucf, tmp_path, kept):
    """One normal video, or one of each anomalous label, cannot be both trained on and held out."""
    rows = pd.read_csv(ucf.folder / "train.csv")
    rows["path"] = [str(ucf.folder / path) for path in rows["path"]]
    of_kind = (rows["label"] == "Normal") == (kept == "Normal")
    pd.concat([rows[of_kind], rows[~of_kind].drop_duplicates("label")]).to_csv(tmp_path / "train.csv", index=False)
    outcome = ucf.at(tmp_path).train("--protocol", "clean", "--no-balanced", "--train-list", tmp_path / "train.csv")
    assert outcome.code == 2 and "--protocol clean" in outcome.err
    assert not (tmp_path / "run").exists()


# Through processes.


@pytest.mark.slow
def test_scripts_and_commands_are_one(ucf, tmp_path):
    """python ucf_train.py and python -m clipfusionvad train --dataset ucf do the same, from any folder."""
    script, command = ucf.at(tmp_path / "script"), ucf.at(tmp_path / "command")
    outcome = run_script("ucf_train.py", script.train_flags(), tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "detection mAP" in outcome.stdout and str(script.work / "model.pth") in outcome.stdout
    assert "Traceback" not in outcome.stderr and "arning" not in outcome.stderr
    outcome = run_script("clipfusionvad", ["train", "--dataset", "ucf", *command.train_flags()], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert_same_weights(weights(script.work / "model.pth"), weights(command.work / "model.pth"))
    assert script.test("--metrics-json", tmp_path / "m.json").code == 0
    tested = ["test", "--dataset", "ucf", *command.test_flags("--metrics-json", tmp_path / "n.json")]
    assert quietly(package_main, tested).code == 0
    assert read_json(tmp_path / "m.json") == read_json(tmp_path / "n.json")


def test_demo(tmp_path, monkeypatch):
    """Made-up data, one epoch of training on it, and the command that finds both and only tests."""
    monkeypatch.chdir(tmp_path)
    run = Path("demo/ucf/run_clipfusionvad")
    outcome = quietly(TRAIN["ucf"], strings(["--demo", "--max-epoch", 1, "--output-dir", run]))
    assert outcome.code == 0, outcome.err
    assert "untrained" in outcome.out
    made = {path: path.stat().st_mtime_ns for path in Path("demo").rglob("*.npy")}
    assert len(read_list("demo/ucf/list/ucf_CLIP_rgb.csv")) == len(
        list(Path("demo/ucf/features/rgb/train").rglob("*.npy"))
    )
    outcome = quietly(package_main, ["demo"])
    assert outcome.code == 0, outcome.err
    assert "testing the model" in outcome.out and "detection mAP" in outcome.out
    assert read_json(run / "test_metrics.json") == read_json(run / "metrics.json")["best"]
    assert made == {path: path.stat().st_mtime_ns for path in Path("demo").rglob("*.npy")}


# What a shell offers after a few letters.

OFFERED = {
    "tra": {"train"},
    "train --max": {"--max-epoch"},
    "train --num-refine": {"--num-refinement-steps"},
    "train --method v": {"vadclip"},
    "sweep --job": {"--jobs"},
    "sweep --no-ga": {"--no-gam"},
    "pack --dt": {"--dtype"},
    "extract --crop": {"--crops", "--crop-ids"},
    "test --dataset s": {"shanghaitech"},
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_every_command(shell, tmp_path):
    done = quietly(package_main, ["completion", shell])
    assert done.code == 0 and all(typed(name) in done.out for name in command_names())
    if shell == "bash" and shutil.which("bash"):
        (tmp_path / "script").write_text(done.out)
        for words, expected in OFFERED.items():
            asked = f"COMP_WORDS=(clipfusionvad {words}); COMP_CWORD={len(words.split())}; _shtab_clipfusionvad"
            code = f'source {tmp_path}/script; {asked} 2> /dev/null; echo "${{COMPREPLY[@]}}"'
            found = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout.split()
            assert set(found) == expected, words
