"""Run folders: which one, and records that an interrupted run may leave behind."""

from __future__ import annotations

import json

import pytest

from clipfusionvad.errors import UserError
from clipfusionvad.origin import Sources, environment
from clipfusionvad.runs import LAST, RunLog, choose_folder, record_run


def test_a_folder_of_its_own_for_every_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = choose_folder(None, "ucf_x", resume=False, overwrite=False)
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == ["runs/ucf_x", "runs/ucf_x-2", "runs/ucf_x-3"]
    assert str(choose_folder(None, "ucf_x", resume=True, overwrite=False)) == "runs/ucf_x-3"
    assert str(choose_folder(None, "xd_x", resume=True, overwrite=False)) == "runs/xd_x"


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / LAST).write_bytes(b"state")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run.*--use-checkpoint.*--overwrite"):
        choose_folder(str(tmp_path), "x", resume=False, overwrite=False)
    assert choose_folder(str(tmp_path), "x", resume=True, overwrite=False) == tmp_path
    assert (tmp_path / LAST).exists()
    choose_folder(str(tmp_path), "x", resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def write_run(folder, steps, evaluations):
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.log_step(step, 0, {"coarse": 0.5, "fine": 0.1 * step}, lr=1e-3)
        if step in evaluations:
            metrics = {"auc1": step / 10, "ano_auc1": float("nan"), "map": {"0.1": 1.0}}
            log.log_evaluation({"step": step, "epoch": 0, "improved": True, "metrics": metrics})
    log.close()


def test_a_resumed_log_drops_what_came_after_its_step(tmp_path):
    write_run(tmp_path, steps=6, evaluations=(2, 5))
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("7,0,0.")  # killed in the middle of a line
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "ep')
    log = RunLog(tmp_path, step=4, evaluations=1)
    log.log_step(5, 0, {"coarse": 0.5, "fine": 0.5}, lr=1e-3)
    log.close()
    write_run(tmp_path / "plain", steps=5, evaluations=(2,))
    assert (tmp_path / "losses.csv").read_text() == (tmp_path / "plain" / "losses.csv").read_text()
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "plain" / "metrics.jsonl").read_text()


def test_records_are_strict_json_and_a_table(tmp_path):
    write_run(tmp_path, steps=4, evaluations=(2, 4))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert records[0]["metrics"]["ano_auc1"] is None  # NaN is no JSON
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,auc1,ano_auc1,map@0.1" and lines[2].startswith("4,0,0.4,")
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_environment_is_recorded(tmp_path):
    record_run(tmp_path, {"lr": 1e-3, "method": "x"}, environment(), Sources())
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["packages"]["torch"] and written["python"] and written["command"] and written["sources"]
    assert (tmp_path / "options.yaml").read_text() == "lr: 0.001\nmethod: x\n"
