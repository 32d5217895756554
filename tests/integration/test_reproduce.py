"""A paper's table by one command: planned, killed and continued, refused where the data is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_features import make_features
from tiny import quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.datasets import find_dataset
from clipfusionvad.tools.reproduce import find_annotations
from clipfusionvad.tools.tables.compare import Resampler

WIDTH = 12
SMALL = ["--clip", "toy", "--embed-dim", "32", "--visual-width", "32", "--feature-dim", f"{WIDTH}", "--device", "cpu"]
SMALL += ["--visual-layers", "1", "--visual-head", "2", "--visual-length", "16", "--attn-window", "8"]
SMALL += ["--prompt-prefix", "2", "--prompt-postfix", "2", "--max-epoch", "2", "--batch-size", "3", "--lr", "0.001"]
# Ends the process in a training step of the first run, as a power failure does.
KILLED = """
import os, signal, sys
from clipfusionvad.__main__ import main
from clipfusionvad.engine.trainer import Trainer
step, taken = Trainer._step, []
def kill_at_fourth(self, *batch):
    taken.append(1)
    if len(taken) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)
Trainer._step = kill_at_fourth
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A dozen made-up videos with names, annotations and split of UCF-Crime."""
    folder, videos = tmp_path_factory.mktemp("benchmark"), []
    annotations = folder / "annotations"
    annotations.mkdir()
    splits, timed = {"Train": [], "Test": []}, []
    for number in range(1, 7):
        for label in ("Abuse", "Robbery", "Normal_Videos_"):
            name, snippets = f"{label}{number:03d}_x264", 10 + 3 * number
            events = [] if "Normal" in label else [(4, 8)]
            videos.append((name, snippets, events))
            side = "Test" if number > 4 else "Train"
            splits[side].append(f"{'Normal' if 'Normal' in label else label}/{name}.mp4")
            if side == "Test":
                timed.append(
                    f"{name}.mp4  {label if events else 'Normal'}  {'64  128' if events else '-1  -1'}  -1  -1"
                )
    (annotations / "Temporal_Anomaly_Annotation.txt").write_text("\n".join(timed))
    for side, names in splits.items():
        (annotations / f"Anomaly_{side}.txt").write_text("\n".join(names))
    make_features(folder / "features", videos, WIDTH)
    return folder


def command(benchmark, output, *more):
    paths = ["--features", str(benchmark / "features"), "--annotations", str(benchmark / "annotations")]
    given = ["--methods", "vadclip", "--seeds", "2", "--output", str(output), *more]
    return ["reproduce", "--dataset", "ucf", *paths, *given, *SMALL]


@pytest.fixture(scope="module")
def reproduced(benchmark, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    done = quietly(package_main, command(benchmark, output, "--made-up"))
    assert done.code == 0, done.err
    return output, done


def test_dry_run_prints_estimate_and_commands_and_writes_nothing(benchmark, tmp_path):
    done = quietly(package_main, command(benchmark, tmp_path / "out", "--dry-run"))
    assert done.code == 0, done.err
    # 12 training videos in batches of 3 pairs, from 8 anomalous and 4 normal ones, two epochs.
    assert "vadclip" in done.out and "minutes a run" in done.out and "An estimate" in done.out
    lines = done.out.splitlines()
    assert [line.split()[3] for line in lines if line.startswith("python -m")] == ["lists", "pack", "sweep"]
    assert not list(tmp_path.iterdir())


def test_table_holds_mean_and_interval_and_says_why_no_paper_stands_beside_them(reproduced):
    output, done = reproduced
    runs = sorted((output / "runs" / "vadclip").glob("seed*"))
    values = [100 * json.loads((run / "metrics.json").read_text())["best"]["auc1"] for run in runs]
    low, high = Resampler(metrics=["auc1"]).interval(runs, "auc1")
    text = (output / "table.md").read_text(encoding="utf-8")
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "| AUC, coarse" in line).split("|")]
    measured = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert cells[1:-1] == [
        "vadclip", "AUC, coarse branch", "-", measured, "2", f"[{low:.2f}, {high:.2f}]", "-"
    ]  # fmt: skip
    latex = (output / "table.tex").read_text(encoding="utf-8")
    page = (output / "table.html").read_text(encoding="utf-8")
    for written in (text, latex, page, done.out):
        assert "NO COMPARISON WITH PAPERS" in written and "OTHER OPTIONS THAN PUBLISHED" in written
        assert "the features are made up" in written and "88.02" not in written
    assert "max_epoch 2 (published: 10)" in text and "clip toy (published: ViT-B/16)" in text


def test_killed_in_a_training_step_and_continued_equals_an_uninterrupted_run(benchmark, reproduced, tmp_path):
    argv = [sys.executable, "-c", KILLED, *command(benchmark, tmp_path / "out", "--made-up")]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(argv, env=environ, capture_output=True).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("out/runs/vadclip/seed*/last.pt")) and not (tmp_path / "out/table.md").exists()
    done = quietly(package_main, command(benchmark, tmp_path / "out", "--made-up"))
    assert done.code == 0, done.err
    assert "An estimate" not in done.out
    assert (tmp_path / "out/table.md").read_text() == (reproduced[0] / "table.md").read_text()


def refused(benchmark, output, *more):
    done = quietly(package_main, command(benchmark, output, *more))
    assert done.code == 2, done.out
    assert not (output / "runs").exists()
    return done.err


def test_what_cannot_be_reproduced_is_refused_in_a_line(benchmark, tmp_path):
    output = tmp_path / "out"
    assert "lacks Temporal_Anomaly_Annotation.txt" in refused(benchmark, output, "--annotations", str(tmp_path))
    assert "--methods reflipvad_repo has no published figure" in refused(
        benchmark, output, "--methods", "reflipvad_repo"
    )
    # SMALL comes last, so the width is that of another method's folder.
    error = quietly(package_main, [*command(benchmark, output), "--feature-dim", "13"]).err
    assert f"vadclip cannot be trained on these features: {benchmark}" in error and f"has dim {WIDTH}" in error
    assert "--seeds takes a number of at least 1" in refused(benchmark, output, "--seeds", "0")
    assert not output.exists()


def test_fewer_seeds_than_before_are_counted_alone(benchmark, reproduced):
    table = reproduced[0] / "table.md"
    before, counts = table.read_text(), []
    for seeds in ("1", "2"):
        done = quietly(package_main, command(benchmark, reproduced[0], "--made-up", "--seeds", seeds))
        assert done.code == 0, done.err
        counts.append({line.split("|")[5].strip() for line in table.read_text().splitlines() if "| vadclip" in line})
    assert counts == [{"1"}, {"2"}] and table.read_text() == before


def test_error_of_doctor_stops_before_training(benchmark, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for path in (benchmark / "features").iterdir():
        features = np.load(path)
        if path.stem == "Abuse001_x264":
            features[3, 2] = np.nan
        np.save(folder / path.name, features)
    error = refused(benchmark, tmp_path / "out", "--features", str(folder))
    assert "so nothing is trained (correct them, or continue with --ignore file-unreadable)" in error
    assert "Abuse001_x264" in error
    error = refused(benchmark, tmp_path / "out", "--ignore", "same-feature")
    assert "--ignore same-feature is not a check of doctor" in error and "same-features" in error


def test_annotations_are_found_by_their_official_names(tmp_path):
    for name in ("annotations.txt", "annotations_multiclasses.txt", "xd_CLIP_rgbtest.csv", "lengths.csv", "else.txt"):
        (tmp_path / name).touch()
    found = find_annotations(str(tmp_path), find_dataset("xd"))
    names = [[path.name for path in part] for part in found]
    assert names == [["annotations.txt", "annotations_multiclasses.txt", "lengths.csv"], ["xd_CLIP_rgbtest.csv"]]
