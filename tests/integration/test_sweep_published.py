"""Published figures in a sweep: read with their cells, shown beside the same thing only, refused where wrong."""

import re

import pandas as pd
import pytest
import yaml
from tiny import make_tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.errors import UserError
from clipfusionvad.tools.sweep.plan import Published, read_sweep
from clipfusionvad.tools.sweep.table import sweep_text

TABLE = {
    "method": "vadclip",
    "dataset": "ucf",
    "source": "a paper, Table 3",
    "published": {"auc1": 88.02, "map_average": 6.68},
    "cells": {"bare": {"graph": False, "published": {"auc1": 80.5}}, "windows": {"attn_window": 16}},
}


def write(folder, name="table", **changes):
    path = folder / f"{name}.yaml"
    content = {key: value for key, value in {**TABLE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_figures_come_with_their_cells(tmp_path):
    plan = read_sweep([write(tmp_path)])
    full, bare, windows = plan.cells
    assert plan.method == "vadclip" and windows.published is None
    assert full.published == Published({"auc1": 88.02, "map_average": 6.68}, "vadclip", "ucf", "a paper, Table 3")
    assert bare.published.figures == {"auc1": 80.5} and bare.options == {"graph": False}


def test_full_has_the_figures_of_all_files(tmp_path):
    other = write(tmp_path, "other", published={"ano_auc1": 70.23}, cells={"more": {"visual_layers": 1}})
    full = read_sweep([write(tmp_path), other]).cells[0]
    assert full.published.figures == {"auc1": 88.02, "map_average": 6.68, "ano_auc1": 70.23}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"published": {"auc": 80}}, "published of the file: unknown metric 'auc' (did you mean"),
        ({"published": {"auc1": 101}}, "published of the file: auc1 must be a percentage, not 101"),
        ({"published": {"auc1": "80"}}, "auc1 must be a percentage, not '80'"),
        ({"published": {"auc1": True}}, "auc1 must be a percentage, not True"),
        ({"published": {"auc1": float("nan")}}, "auc1 must be a percentage, not nan"),
        ({"published": [80]}, "published of the file must hold metrics and percentages"),
        ({"cells": {"a": {"published": {"mapp": 1}}}}, "published of cell 'a': unknown metric 'mapp'"),
        ({"dataset": None}, "published figures need 'dataset: NAME'"),
        ({"dataset": "uff"}, "published figures need 'dataset: NAME'"),
        ({"source": None}, "published figures need 'source: …'"),
        ({"method": None}, "published figures need 'method: NAME'"),
        ({"method": "vadclap"}, "unknown method 'vadclap' (did you mean 'vadclip'?)"),
    ],
    ids=str,
)
def test_wrong_figures_are_refused_in_one_line(tmp_path, changes, says):
    with pytest.raises(UserError) as refused:
        read_sweep([write(tmp_path, **changes)])
    assert says in str(refused.value) and "table.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_files_of_two_methods_have_no_full_in_common(tmp_path):
    other = write(tmp_path, "other", method="clipfusionvad", cells={"more": {"gam": False}})
    with pytest.raises(UserError, match="name different methods"):
        read_sweep([write(tmp_path), other])


def columns(text):
    """The table of a summary: by cell what stands under each title."""
    header, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in text.split("\n\n")[0].splitlines()]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_figures_stand_beside_what_was_measured():
    rows = [
        {"cell": "full", "seed": 1, "state": "done", "auc1": 0.9, "map_average": 7.0},
        {"cell": "bare", "seed": 1, "state": "done", "auc1": 0.85, "map_average": 6.5},
        {"cell": "open", "seed": 1, "state": "open"},
    ]
    papers = {
        "full": Published({"auc1": 88.02, "mauc": 70}, "vadclip", "ucf", "a paper"),
        "bare": Published({"auc1": 80.5}, "vadclip", "ucf", "a paper"),
    }
    text = sweep_text(pd.DataFrame(rows), "full", papers, ["a note"])
    table = columns(text)
    assert [*table["full"]] == ["cell", "seeds", "auc1", "auc1, paper", "mauc", "mauc, paper", "map_average"]
    assert table["full"]["auc1, paper"] == "88.02" and table["full"]["mauc, paper"] == "70.00"
    assert table["full"]["mauc"] == "-" and table["bare"]["map_average"] == "6.50 (-0.50)"
    assert table["bare"]["auc1"] == "85.00 (-5.00)" and table["bare"]["auc1, paper"] == "80.50"
    assert table["open"]["auc1, paper"].strip() == ""
    assert text.endswith("\npaper: a paper (UCF-Crime)\na note\n") and text.count("paper: a paper") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "flags"), [("ucf", []), ("ucf", ["--protocol", "clean"]), ("xd", [])])
def test_a_sweep_shows_figures_of_its_own_dataset_only(tmp_path, dataset, flags, monkeypatch):
    """None beside the toy CLIP's numbers, and under --protocol clean none of detection mAP."""
    data = make_tiny(dataset, tmp_path / "data").of("vadclip")
    argv = strings(["sweep", write(tmp_path), "--dataset", dataset], data.train_flags("--max-epoch", 1, *flags))
    cut = argv.index("--method")
    command = [*argv[:cut], *argv[cut + 2 :], "--seeds", "1", "--output-dir", str(tmp_path / "out")]
    done = quietly(package_main, command)
    assert done.code == 0, done.err
    assert "not shown: the weights of CLIP are made up" in done.out and "88.02" not in done.out
    # As if it were the whole test set and the real CLIP: the trained cells only make their tables again.
    monkeypatch.setattr("clipfusionvad.tools.sweep.sweep.no_comparison", lambda *_: "")
    assert quietly(package_main, command).code == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert ("auc1, paper" in text) == (dataset == "ucf")
    assert ("map_average, paper" in text) == (dataset == "ucf" and not flags)
    assert ("published figures are of vadclip on ucf: not shown" in text) == (dataset == "xd")
    if dataset == "ucf":
        table = columns(text)
        assert table["full"]["auc1, paper"] == "88.02" and table["bare"]["auc1, paper"] == "80.50"
        assert "paper: a paper, Table 3 (UCF-Crime)" in text
