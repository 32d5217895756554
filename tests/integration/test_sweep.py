"""Sweeps: what they train, that interrupted ones end as others do, and what their tables say."""

import json
import math
import os
import re
import shutil
import signal
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusal import snapshot
from tiny import make_tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.tools.sweep.plan import cell_name, read_sweep
from clipfusionvad.tools.sweep.table import sweep_text
from clipfusionvad.tools.tables.compare import Difference, compare

ABLATIONS = {"no_gam": {"gam": False}, "same": {"max_epoch": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny("ucf", tmp_path_factory.mktemp("swept") / "data")


def sweep(data, folder, *configs, flags=(), seeds=(1, 2)):
    argv = strings(["sweep"], configs, ["--dataset", data.dataset], data.train_flags())
    return quietly(package_main, strings(argv, ["--seeds", *seeds, "--output-dir", folder], flags))


def write(folder, **contents):
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(content))
    return paths


def results(folder):
    return pd.read_csv(folder / "results.csv")


def weights(run):
    return torch.load(run / "best.pt", weights_only=True)["model_state_dict"]


def assert_same_runs(one, other):
    a, b = (results(folder) for folder in (one, other))
    pd.testing.assert_frame_equal(a, b)
    for row in a.itertuples():
        run = f"{row.cell}/seed{row.seed}"
        assert (one / run / "losses.csv").read_text() == (other / run / "losses.csv").read_text()
        first, second = weights(one / run), weights(other / run)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    configs = write(folder, **ABLATIONS)
    done = sweep(data, folder / "out", *configs)
    assert done.code == 0, done.err
    return folder / "out", done, configs


def test_every_cell_is_trained_with_every_seed(swept):
    folder, done, _ = swept
    table = results(folder)
    assert list(zip(table["cell"], table["seed"], strict=True)) == [
        ("full", 1), ("full", 2), ("no_gam", 1), ("no_gam", 2),
    ]  # fmt: skip
    assert set(table["state"]) == {"done"}
    assert "same is the same as full" in done.out
    for row in table.itertuples():
        options = yaml.safe_load((folder / row.cell / f"seed{row.seed}" / "options.yaml").read_text())
        assert (options["gam"], options["seed"]) == (row.cell == "full", row.seed)
        metrics = json.loads((folder / row.cell / f"seed{row.seed}" / "metrics.json").read_text())
        assert row.auc1 == metrics["best"]["auc1"]
    summary = json.loads((folder / "no_gam" / "metrics.json").read_text())
    assert summary["mean"]["auc1"] == pytest.approx(table["auc1"][2:].mean())
    assert (folder / "no_gam" / "report.html").is_file()


def test_the_summary_says_what_is_more_than_chance(swept):
    """Its differences are those of the table of results, its intervals those of the paired bootstrap."""
    folder, _, _ = swept
    text = (folder / "summary.md").read_text()
    _, _, below = text.partition("Difference from full, in points:\n\n")
    header, _, *rows = [re.split(r" *\| *", line.strip("| ")) for line in below.splitlines() if line.startswith("|")]
    table = results(folder).set_index(["cell", "seed"])
    cells = [cell for cell in table.index.unique("cell") if cell != "full"]
    assert [row[0] for row in rows] == cells and header[1:3] == ["auc1", "ap1"]
    for row in rows:
        runs = [[folder / cell / f"seed{seed}" for seed in (1, 2)] for cell in ("full", row[0])]
        for one in compare(*runs, metrics=["auc1", "ap1"]):
            said = re.match(r"(\S+) \[(\S+), (\S+)\]( \*)?$", row[header.index(one.metric)])
            gap = (table.loc[row[0], one.metric] - table.loc["full", one.metric]).mean() * 100
            assert float(said[1]) == pytest.approx(gap, abs=0.006)
            assert [float(said[2]), float(said[3])] == pytest.approx([one.low, one.high], abs=0.006)
            assert bool(said[4]) == (one.p < 0.05 and one.seed_p < 0.05)


@pytest.mark.parametrize(
    ("p", "seed_p", "clear"), [(0.01, 0.02, True), (0.01, None, True), (0.2, 0.01, False), (0.01, 0.2, False)]
)
def test_a_difference_is_clear_when_neither_videos_nor_seeds_explain_it(p, seed_p, clear):
    one = Difference("auc1", 90, 88, -2, -3, -1, p, 2000, 0, 3, None, None, seed_p)
    assert one.clear == clear


def test_a_run_is_the_one_that_training_alone_makes(swept, data, tmp_path):
    alone = data.at(tmp_path)
    assert alone.train("--seed", 2, "--no-gam").code == 0
    run = swept[0] / "no_gam" / "seed2"
    assert (run / "losses.csv").read_text() == (tmp_path / "run" / "losses.csv").read_text()


def test_what_is_done_is_not_repeated(swept, data):
    folder, _, configs = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed*/*")}
    assert sweep(data, folder, *configs).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/seed*/*")}


def test_other_options_in_the_same_folder_are_refused(swept, data):
    folder, _, configs = swept
    before = snapshot(folder)
    done = sweep(data, folder, *configs, flags=["--lr", 1e-4])
    assert done.code == 2
    assert "was trained with another lr" in done.err and done.err.count("\n") == 1
    assert snapshot(folder) == before


def test_a_sweep_made_before_an_option_came_goes_on_where_the_option_has_its_default(swept, data, tmp_path):
    folder, _, configs = swept
    shutil.copytree(folder, tmp_path / "old")
    for path in (tmp_path / "old").glob("*/seed*/done.json"):
        record = json.loads(path.read_text())
        for name in ("weight_decay", "product", "betas"):
            del record["options"][name]
        path.write_text(json.dumps(record))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "old").glob("*/seed*/losses.csv")}
    assert sweep(data, tmp_path / "old", *configs).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    done = sweep(data, tmp_path / "old", *configs, flags=["--no-product", "--weight-decay", 0.2])
    assert done.code == 2 and "was trained with another product, weight_decay" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 9])
def test_interrupted_and_continued(swept, data, tmp_path, monkeypatch, step):
    folder, _, configs = swept
    made, train_step = [], Trainer._step

    def stop_after(self, *batch):
        made.append(1)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", stop_after)
    done = sweep(data, tmp_path, *configs)
    assert done.code == 130
    assert "the same command continues from here" in done.out
    monkeypatch.undo()
    assert sweep(data, tmp_path, *configs).code == 0
    assert_same_runs(folder, tmp_path)


@pytest.mark.slow
def test_two_at_a_time_are_stopped_and_continued(swept, data, tmp_path):
    folder, _, configs = swept
    begun = tmp_path / "out" / "full" / "seed1" / "losses.csv"

    def stop():
        while not begun.exists():
            if finished.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    finished = threading.Event()
    killer = threading.Thread(target=stop)
    killer.start()
    first = sweep(data, tmp_path / "out", *configs, flags=["--jobs", 2])
    finished.set()
    killer.join()
    assert first.code == 130, first.err
    assert sweep(data, tmp_path / "out", *configs).code == 0
    assert_same_runs(folder, tmp_path / "out")


def test_a_cell_that_fails_leaves_the_others(data, tmp_path):
    configs = write(tmp_path, bad={"cells": {"lost": {"clip": "nowhere.pt"}, "bare": {"gam": False}}})
    done = sweep(data, tmp_path / "out", *configs, seeds=[1], flags=["--no-full", "--max-epoch", 1])
    assert done.code == 1
    table = results(tmp_path / "out").set_index("cell")
    assert table["state"].to_dict() == {"lost": "failed", "bare": "done"}
    assert table["error"]["lost"] in done.err


def test_methods_are_compared_with_the_first_and_by_cost(data, tmp_path):
    sizes = {"visual_length": 32, "hidden_width": 16, "second_width": 8}
    cells = {"first": {"method": "rtfm", "visual_length": 32}, "small": {"method": "deepmil", **sizes}}
    places = [*data.arrays.items(), ("--train-list", data.train_list), ("--test-list", data.test_list)]
    flags = strings(["--dataset", "ucf", "--seeds", 1, 2, "--output-dir", tmp_path / "out"], *places)
    flags += strings(["--visual-width", 64, "--frames-per-snippet", 16, "--max-epoch", 1, "--batch-size", 3])
    done = quietly(package_main, ["sweep", *strings(write(tmp_path, methods={"cells": cells})), *flags])
    assert done.code == 0, done.err
    whole, differences = done.out.split("Difference from first, in points:")
    header, _, *rows = [re.split(r" *\| *", line.strip("| ")) for line in whole.splitlines() if line.startswith("|")]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(found) == ["first", "small"] and "| small" in differences and "| first" not in differences
    assert {"auc1", "ano_auc1", "ap1", "ap_trapezoid1", "far1"} <= found["small"].keys()
    products = 64 * 16 + 16 * 8 + 8
    assert float(found["small"]["MMACs"]) == pytest.approx(256 * products / 1e6, abs=0.06)
    assert found["small"]["parameters"] == f"{(products + 16 + 8 + 1) / 1e6:.2f}" and float(found["small"]["ms"]) > 0


@pytest.mark.slow
def test_a_search_goes_on_as_it_would_have(data, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="a search needs Optuna: pip install optuna")
    space = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "visual_layers": [1, 2]}
    content = {"options": {"max_epoch": 1}, "search": space, "trials": 4, "maximize": "auc2"}
    configs = write(tmp_path, tune=content)
    flags = ["--no-full"]
    assert sweep(data, tmp_path / "whole", *configs, seeds=[1], flags=flags).code == 0
    made, train_step = [], Trainer._step

    def stop_after(self, *batch):
        made.append(1)
        if len(made) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", stop_after)
    assert sweep(data, tmp_path / "parts", *configs, seeds=[1], flags=flags).code == 130
    monkeypatch.undo()
    assert sweep(data, tmp_path / "parts", *configs, seeds=[1], flags=flags).code == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    table = results(tmp_path / "whole")
    assert list(table["cell"]) == [f"tune-{number:03d}" for number in range(4)]
    assert table["lr"].between(1e-4, 1e-1).all() and table["lr"].nunique() == 4
    assert set(table["visual_layers"]) <= {1, 2}
    told = json.loads((tmp_path / "whole" / "tune.json").read_text())["trials"]
    assert [trial["value"] for trial in told] == table["auc2"].tolist()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"cells": {"a": {"gamm": False}}}, "unknown key 'gamm' (did you mean 'gam'?)"),
        ({"cells": {"a": {"gam": "perhaps"}}}, "gam must be true or false"),
        ({"cells": {"a/b": {}}}, "cannot be the name of a folder"),
        ({"cells": {"..": {}}}, "cannot be the name of a folder"),
        ({"cells": {"Full": {}}}, "two cells are named 'Full'"),
        ({"cells": {"a": 1}}, "must hold options and values"),
        ({"cells": [1]}, "cells must hold names and values"),
        ({"grid": {"lr": 0.1}}, "must list the values"),
        ({"grid": {"lr": [0.1]}, "gird": {}}, "unknown section 'gird' (did you mean 'grid'?)"),
        ({"grid": {"lr": [-1]}}, "lr"),
        ({"grid": {"prompt_length": [4, 8]}}, "prompt_length is an option of reflipvad"),
        ({"search": {"gamm": [1, 2]}, "trials": 2, "maximize": "auc1"}, "unknown key 'gamm' (did you mean 'gam'?)"),
        ({"search": {"lr": {"low": -1, "high": 1}}, "trials": 2, "maximize": "auc1"}, "lr"),
        ({"search": {"lr": {"low": 1}}, "trials": 2, "maximize": "auc1"}, "give low and high"),
        ({"search": {"lr": {"low": 2, "high": 1}}, "trials": 2, "maximize": "auc1"}, "give low and high"),
        ({"search": {"lr": {"low": 0, "high": 1, "log": True}}, "trials": 2, "maximize": "auc1"}, "give low and high"),
        ({"search": {"lr": [1e-3]}, "maximize": "auc1"}, "trials: N"),
        ({"search": {"lr": [1e-3]}, "trials": 2}, "maximize: METRIC"),
        ({"grid": {"lr": [1e-3]}, "trials": 2}, "belongs to a search"),
    ],
    ids=str,
)
def test_bad_files_are_refused_before_anything_is_trained(data, tmp_path, content, says):
    configs = write(tmp_path, plan=content)
    before = snapshot(tmp_path)
    done = sweep(data, tmp_path / "out", *configs)
    assert done.code == 2
    assert says in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_bad_seeds_are_refused(data, tmp_path):
    for seeds in ([0], [3, 3]):
        done = sweep(data, tmp_path / "out", *write(tmp_path, bare={"gam": False}), seeds=seeds)
        assert done.code == 2 and "--seeds" in done.err
    assert not (tmp_path / "out").exists()


def test_a_grid_is_every_combination(tmp_path):
    (path,) = write(tmp_path, plan={"options": {"max_epoch": 1}, "grid": {"attn-window": [8, 16], "lr": [1e-3, 1e-4]}})
    plan = read_sweep([str(path)], full=False)
    assert not plan.searches and plan.method is None
    assert [dict(cell.options) for cell in plan.cells] == [
        {"max_epoch": 1, "attn_window": window, "lr": lr} for window in (8, 16) for lr in (1e-3, 1e-4)
    ]
    assert plan.cells[0].name == "attn_window=8,lr=0.001"


@given(st.dictionaries(st.sampled_from(["lr", "gam", "betas", "clip"]), st.one_of(
    st.floats(1e-6, 1e3), st.booleans(), st.integers(), st.lists(st.integers(0, 9), min_size=1), st.just("a/b"),
), min_size=1))  # fmt: skip
def test_names_of_settings_are_names_of_folders(options):
    assert "/" not in cell_name(options) and cell_name(options).count("=") == len(options)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_the_table_is_that_of_numpy(pairs):
    rows = []
    for seed, (full, bare) in enumerate(pairs):
        rows += [{"cell": "full", "seed": seed, "auc1": full}, {"cell": "bare", "seed": seed, "auc1": bare}]
    rows.append({"cell": "bare", "seed": 99, "state": "failed", "error": "too little memory"})
    table = pd.DataFrame(rows)
    table["state"] = table["state"].fillna("done")
    text = sweep_text(table, "full")
    full, bare = np.array(pairs).T * 100
    line = next(line for line in text.splitlines() if line.startswith("| bare"))
    counted, value = (cell.strip() for cell in line.strip("|").split("|")[1:])
    assert counted == f"{len(pairs)} of {len(pairs) + 1}"
    numbers = [float(part.strip("()")) for part in value.replace("±", " ").split()]
    expected = [bare.mean(), bare.std(ddof=1), (bare - full).mean()] if len(pairs) > 1 else [bare[0], bare[0] - full[0]]
    assert all(math.isclose(a, b, abs_tol=0.0051) for a, b in zip(numbers, expected, strict=True))
    assert "failed: bare, seed 99: too little memory" in text
