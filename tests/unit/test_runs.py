"""Run folders: which one, and records that an interrupted run may leave behind."""

import json

import pytest

from clipfusionvad.datasets import UCF
from clipfusionvad.engine import run_folder
from clipfusionvad.engine.loggers import RunLog
from clipfusionvad.engine.run_folder import LAST, PREVIOUS, check_folder, choose_folder
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import Sources, environment


def test_a_folder_of_its_own_for_every_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = choose_folder(None, "ucf_x", resume=False)
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == ["runs/ucf_x", "runs/ucf_x-2", "runs/ucf_x-3"]
    assert str(choose_folder(None, "ucf_x", resume=True)) == "runs/ucf_x-3"
    assert str(choose_folder(None, "xd_x", resume=True)) == "runs/xd_x"


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / LAST).write_bytes(b"state")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run.*--use-checkpoint.*--overwrite"):
        check_folder(tmp_path, may_be_taken=False)
    check_folder(tmp_path, may_be_taken=True)
    assert (tmp_path / LAST).exists()
    run_folder.clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_runs_of_one_and_of_several_seeds_are_not_mixed(tmp_path):
    (tmp_path / "seed3").mkdir()
    # A state before the last is a run, too.
    (tmp_path / "seed3" / PREVIOUS).write_bytes(b"state")
    assert run_folder.seeds_in(tmp_path) == ["seed3"]
    for folder, taken, seeds, message in (
        (tmp_path, True, (), "several seeds"),
        (tmp_path / "seed3", False, (), "already holds a run:"),
        (tmp_path / "seed3", True, (3, 5), "holds the run of one seed"),
        (tmp_path, False, (3, 5), "already holds a run of seed 3: "),
    ):
        with pytest.raises(UserError, match=message):
            check_folder(folder, taken, seeds)
    check_folder(tmp_path, True, (3, 5))


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
    for name, cut_line in (("losses.csv", "7,0,0."), ("metrics.jsonl", '{"step": 7, "ep')):
        with (tmp_path / name).open("a") as file:
            file.write(cut_line)
    log = RunLog(tmp_path, step=4, evaluations=1)
    log.log_step(5, 0, {"coarse": 0.5, "fine": 0.5}, lr=1e-3)
    log.close()
    write_run(tmp_path / "plain", steps=5, evaluations=(2,))
    for name in ("losses.csv", "metrics.jsonl"):
        assert (tmp_path / name).read_text() == (tmp_path / "plain" / name).read_text()


def test_records_are_strict_json_and_a_table(tmp_path):
    write_run(tmp_path, steps=4, evaluations=(2, 4))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert records[0]["metrics"]["ano_auc1"] is None  # NaN is no JSON
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,auc1,ano_auc1,map@0.1" and lines[2].startswith("4,0,0.4,")
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "losses.csv"])
@pytest.mark.parametrize("content", ["", "x\n" * 9])
def test_records_that_a_state_does_not_know_are_refused(tmp_path, name, content):
    write_run(tmp_path, steps=4, evaluations=(2, 4))
    sums = RunLog(tmp_path, 3, 1).checksums
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        RunLog(tmp_path, 3, 1, sums)


def test_the_curves_are_those_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, steps=6, evaluations=(2, 5))
    RunLog(tmp_path, step=4, evaluations=1).close()
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    points = [(point.step, round(point.value, 6)) for point in curves.Scalars("train/fine")]
    assert points == [(step, round(0.1 * step, 6)) for step in range(1, 5)]
    assert [point.step for point in curves.Scalars("eval/map@0.1")] == [2]


def test_the_environment_is_recorded(tmp_path):
    run_folder.record_run(tmp_path, UCF, {"lr": 1e-3, "method": "x"}, environment(), Sources())
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["packages"]["torch"] and written["python"] and written["command"] and written["sources"]
    assert (tmp_path / "options.yaml").read_text() == "lr: 0.001\nmethod: x\n"
