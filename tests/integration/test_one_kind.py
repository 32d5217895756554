"""Data of one kind only, and trainings that change nothing: a line says so, and a metric without a value says why."""

import json

import pytest
from refusal import assert_refused

from clipfusionvad.report.page import write_report


def keep(path, wanted):
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *(row for row in rows if wanted(row))]) + "\n")


def keep_kind(path, kind):
    keep(path, lambda row: row.endswith(",Normal") == (kind == "normal"))


@pytest.mark.parametrize("flag", ["--balanced", "--no-balanced"])
@pytest.mark.parametrize(("kind", "absent"), [("normal", "anomalous"), ("anomalous", "normal")])
def test_a_training_list_of_one_kind_is_refused(tiny, kind, absent, flag):
    keep_kind(tiny.train_list, kind)
    assert_refused(tiny.train, tiny, flag, says=f"{tiny.train_list} has no {absent} video")


NO_VALUES = "no abnormal frame in the test set"


def test_of_normal_videos_the_metrics_are_null_with_a_reason(tiny, tmp_path):
    keep_kind(tiny.test_list, "normal")
    path, folder = tmp_path / "metrics.json", tmp_path / "tested"
    truth = ["--gt-path", tiny.folder / "truth.csv"]
    outcome = tiny.test(*truth, "--metrics-json", path, "--output-dir", folder)
    assert outcome.code == 0
    assert outcome.err == f"warning: {tiny.test_list} has no anomalous video: AUC and AP cannot be computed\n"
    metrics = json.loads(path.read_text())
    assert metrics["auc1"] is None and metrics["ano_auc2"] is None and metrics["map_anomalous_only"]["0.1"] is None
    assert metrics["undefined"] == {
        **dict.fromkeys([f"{name}{n}" for n in (1, 2) for name in ("auc", "ap", "ap_trapezoid")], NO_VALUES),
        **dict.fromkeys(["ano_auc1", "ano_auc2"], "no abnormal frame in anomalous test videos"),
        **dict.fromkeys(["video_auc1", "video_auc2"], "no anomalous video in the test set"),
        "map_anomalous_only": "no segment of an anomalous class in the test set",
        **dict.fromkeys(["mauc", "mean_ap"], "no class with frames inside and outside it in the test set"),
    }
    titles = [f"{name}, {branch} branch" for branch in ("coarse", "fine") for name in ("AUC", "AP", "AP (trapezoid)")]
    for text in (outcome.out, write_report(folder).read_text()):
        assert f"undefined (-): {'; '.join(titles)}: {NO_VALUES}" in text


def test_of_anomalous_videos_the_metrics_have_values(tiny, tmp_path):
    keep_kind(tiny.test_list, "anomalous")
    path = tmp_path / "metrics.json"
    outcome = tiny.test("--gt-path", tiny.folder / "truth.csv", "--metrics-json", path)
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert "has no normal video: AUC and AP are those of the frames of anomalous videos" in outcome.err
    metrics = json.loads(path.read_text())
    assert metrics["auc1"] == metrics["ano_auc1"]
    assert set(metrics["undefined"].values()) == {"no normal video in the test set"}
    assert metrics["undefined"].keys() == {"far1", "video_auc1", "far2", "video_auc2"}


def test_a_class_without_normal_frames_says_so(tiny, tmp_path):
    """The annotation covers the whole of the only test video: neither it nor its class can be ranked."""
    name, path = tiny.videos[0].name, tmp_path / "metrics.json"
    keep(tiny.test_list, lambda row: name in row)
    truth = tmp_path / "truth.csv"
    truth.write_text(f"video,frames,label,start,end\n{name},528,Abuse,0,528\n")
    outcome = tiny.test("--gt-path", truth, "--metrics-json", path)
    assert outcome.code == 0 and outcome.err.count("\n") == 1, outcome.err
    reasons = json.loads(path.read_text())["undefined"]
    assert reasons["auc1"] == "no normal frame in the test set"
    assert reasons["per_class@Abuse@video_auc"] == "no normal frame in the videos of Abuse"
    assert reasons["per_class@Abuse@auc"] == "no frame outside Abuse in the test set"


def test_without_truth_of_frames_the_reason_names_videos(tiny, tmp_path):
    keep_kind(tiny.test_list, "anomalous")
    outcome = tiny.test("--gt-path", "none", "--metrics-json", tmp_path / "metrics.json")
    assert outcome.code == 0 and "has no normal video: AUC and AP cannot be computed" in outcome.err
    assert "Whole videos are judged, not frames" in outcome.out
    reasons = json.loads((tmp_path / "metrics.json").read_text())["undefined"]
    names = [f"{name}{n}" for n in (1, 2) for name in ("auc", "ap", "ap_trapezoid", "video_auc")]
    assert reasons == dict.fromkeys(names, "no normal video in the test set")


def test_a_training_that_cannot_select_says_which_weights_it_keeps(tiny, no_plots):
    keep_kind(tiny.test_list, "normal")
    outcome = tiny.train("--max-epoch", 1, "--gt-path", tiny.folder / "truth.csv", "--seeds", 0, 1)
    assert outcome.code == 0, outcome.err
    assert "seed 1, auc1 was never above 0: the last weights are the final model" in outcome.err
    assert f"AP (trapezoid), fine branch: {NO_VALUES}" in outcome.out


def test_a_rate_that_leaves_the_weights_unchanged_is_named_once(tiny, no_plots):
    assert "did not change the weights" not in tiny.train("--max-epoch", 1).err
    outcome = tiny.train("--lr", 1e-12, "--overwrite")
    said = "warning: --lr 1e-12 is too low: an epoch did not change the weights\n"
    assert outcome.code == 0 and outcome.err.count("did not change the weights") == 1 and said in outcome.err


def test_a_warm_up_that_begins_at_zero_is_not_taken_for_it(tiny, no_plots):
    schedule = ["--lr-schedule", "cosine", "--warmup-epochs", 1]
    outcome = tiny.train(*schedule)
    assert outcome.code == 0 and "did not change the weights" not in outcome.err
    outcome = tiny.train(*schedule, "--lr", 1e-12, "--overwrite")
    assert "did not change the weights" in outcome.err
