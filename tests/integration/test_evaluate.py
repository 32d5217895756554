"""The evaluate command: figures of published systems, formats, truths, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from test_build_lists import SHARED, needs_shared
from tiny import quietly

from clipfusionvad.__main__ import main
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import UCF
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.report.scores import save_scores

SCORES, BENCHMARKS = SHARED / "data/scores", SHARED / "data/benchmarks"
PEL4VAD = ["--truth", SCORES / "truth_ucf_pel4vad_1109680_uint8.npy"]
PEL4VAD += ["--lengths", SCORES / "truth_ucf_pel4vad_1109680_lengths_int64.npy"]
XD_TRUTH = ["--truth", BENCHMARKS / "xd_test_gt_i3d_uint8.npy"]
#: Snippets of each video, and its abnormal frames.
VIDEOS = {
    "Abuse028_x264": (4, (10, 40)),
    "Arson007_x264": (6, (33, 80)),
    "Normal_Videos_003_x264": (5, None),
    "Normal_Videos_006_x264": (3, None),
}


def evaluate(*argv, **more):
    return quietly(main, ["evaluate", *map(str, argv)], **more)


def records(folder, *argv):
    outcome = evaluate(*argv, "--json", folder / "out.json")
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "out.json").read_text())


@needs_shared
@pytest.mark.parametrize(
    "file, dataset, truth, figures",
    [
        ("ucf_498a3b28.csv", "ucf", PEL4VAD, (89.8843, 41.2762, 41.2588, 75.1319, 0.0295)),
        ("ucf_dddd7ccf.csv", "ucf", PEL4VAD, (85.2695, 26.6219, 26.6071, 68.1815, 0.0728)),
        ("pel4vad_ucf_test_scores_69355_float32.npy", "ucf", PEL4VAD, (86.7580, 33.9173, 33.9992, 70.1797, 0.0047)),
        ("xd_4294be31.csv", "xd", XD_TRUTH, (94.7848, 82.3869, 83.6394, None, None)),
        ("xd_c2fpl_pred_raw_seg.npy", "xd", XD_TRUTH, (66.5606, 35.3727, None, None, None)),
        (
            "sh_d18b5dcf.csv",
            "shanghaitech",
            ["--truth", SCORES / "rtfm_gt-sh.npy"],
            (98.6945, 77.8361, 77.8036, None, None),
        ),
    ],
)
def test_published_scores_have_the_figures_that_their_authors_state(tmp_path, file, dataset, truth, figures):
    path = str(SCORES / file)
    (found,) = records(tmp_path, path, "--dataset", dataset, *truth, "--resamples", 20).values()
    for key, figure in zip(("auc", "ap", "ap_trapezoid", "ano_auc"), figures, strict=False):
        assert figure is None or round(100 * found[key], 4) == figure, key
    assert figures[4] is None or round(found["far"], 4) == figures[4]


@needs_shared
def test_the_difference_of_two_systems_has_its_interval(tmp_path):
    paths = [str(SCORES / f"ucf_{name}.csv") for name in ("dddd7ccf", "498a3b28")]
    found = records(tmp_path, *paths, "--dataset", "ucf", *PEL4VAD)
    assert "difference" not in found[paths[0]] and found[paths[0]]["convention"] == "floor16-short"
    auc = found[paths[1]]["difference"]["auc"]
    assert round(100 * auc["difference"], 1) == 4.6
    np.testing.assert_allclose(100 * np.array(auc["interval"]), [1.8, 7.6], atol=0.5)
    low, high = found[paths[1]]["intervals"]["auc"]
    assert 0.03 < (high - low) / 2 < 0.045


@needs_shared
def test_annotations_and_true_lengths_are_a_truth_and_a_wrong_convention_names_the_right_one(tmp_path):
    path = SCORES / "ucf_498a3b28.csv"
    annotation = SHARED / "data/lists/ucf/Temporal_Anomaly_Annotation.txt"
    given = ["--dataset", "ucf", "--annotations", annotation, "--lengths", BENCHMARKS / "ucf_test_videos.csv"]
    (found,) = records(tmp_path, path, *given, "--resamples", 0).values()
    assert found["convention"] == "floor16-short" and round(100 * found["auc"], 4) == 89.8843
    outcome = evaluate(path, *given, "--convention", "floor16")
    assert outcome.code == 2 and "--convention floor16-short fits, which differs in 9 videos: Assault006" in outcome.err
    outcome = evaluate(path, "--dataset", "ucf", "--truth", BENCHMARKS / "ucf_test_gt_floor16_uint8.npy")
    assert outcome.code == 2 and "--convention floor16-short" in outcome.err


@pytest.fixture
def made(tmp_path):
    """Scores of four videos in all formats, and their truth as array, keyed file and official text."""
    rng = np.random.default_rng(0)
    parts = {name: rng.random(count).round(2) for name, (count, _) in VIDEOS.items()}
    joined = np.concatenate([*parts.values()])
    np.save(tmp_path / "joined.npy", joined[:, None])
    np.save(tmp_path / "frames.npy", np.repeat(joined, 16))
    names = np.repeat([*parts], [len(part) for part in parts.values()])
    pd.DataFrame({"video": names, "pred": joined, "gt": 0}).to_csv(tmp_path / "rows.csv", index=False)
    backwards = dict(reversed(parts.items()))
    (tmp_path / "names.json").write_text(json.dumps({f"{name}.mp4": part.tolist() for name, part in backwards.items()}))
    np.savez(tmp_path / "arrays.npz", **backwards)
    (tmp_path / "folder").mkdir()
    for name, part in parts.items():
        np.save(tmp_path / "folder" / f"{name}__5.npy", part)
    truth = {name: np.zeros(16 * count, np.uint8) for name, (count, _) in VIDEOS.items()}
    rows, lines = [], []
    for name, (count, span) in VIDEOS.items():
        if span:
            truth[name][slice(*span)] = 1
        label = UCF.label_of(name)
        rows.append((name, 16 * count, label, *(span or ("", ""))))
        lines.append(f"{name}  {label}  {' '.join(map(str, span or (-1, -1)))}  -1  -1  \n")
    pd.DataFrame(rows, columns=["video", "frames", "label", "start", "end"]).to_csv(tmp_path / "truth.csv", index=False)
    pd.DataFrame(rows, columns=["video", "frames", "a", "b", "c"]).to_csv(tmp_path / "lengths.csv", index=False)
    (tmp_path / "text.txt").write_text("".join(lines))
    np.save(tmp_path / "gt.npy", np.concatenate([*truth.values()]))
    np.save(tmp_path / "lengths.npy", [16 * count for count, _ in VIDEOS.values()])
    return tmp_path


FILES = ["joined.npy", "frames.npy", "rows.csv", "names.json", "arrays.npz", "folder"]


@pytest.mark.parametrize(
    "truth",
    [["--truth", "truth.csv"], ["--truth", "gt.npy", "--lengths", "lengths.npy"],
     ["--truth", "gt.npy", "--lengths", "lengths.csv"], ["--annotations", "text.txt", "--lengths", "lengths.csv"]],
    ids=["keyed", "array", "array with names", "text"],
)  # fmt: skip
def test_the_same_scores_in_any_format_by_any_truth_give_scikit_learns_numbers(made, monkeypatch, truth):
    monkeypatch.chdir(made)
    found = records(made, *FILES, "--dataset", "ucf", *truth, "--resamples", 50)
    scores, gt = np.load("frames.npy"), np.load("gt.npy")
    precision, recall, _ = precision_recall_curve(gt, scores)
    expected = {"auc": roc_auc_score(gt, scores), "ap": average_precision_score(gt, scores)}
    expected |= {"ap_trapezoid": auc(recall, precision), "ano_auc": roc_auc_score(gt[:160], scores[:160])}
    expected |= {"far": np.mean(scores[160:] > 0.5)}
    top = [np.sort(part)[::-1][:1].mean() for part in np.split(np.load("joined.npy").ravel(), [4, 10, 15])]
    expected |= {"video_auc": roc_auc_score([1, 1, 0, 0], top)}
    assert [*found] == FILES
    for path in FILES:
        for key, value in expected.items():
            assert found[path][key] == pytest.approx(value, abs=1e-12), (path, key)
        for key, interval in found["joined.npy"]["intervals"].items():
            assert found[path]["intervals"][key] == pytest.approx(interval, abs=1e-12), (path, key)
        assert found[path]["smooth"] == 0


def test_each_sigma_is_a_row_and_a_record(made, monkeypatch):
    monkeypatch.chdir(made)
    found = records(made, "joined.npy", "frames.npy", "--dataset", "ucf", "--truth", "truth.csv", "--smooth", 2, 0)
    from scipy.ndimage import gaussian_filter1d

    parts = np.split(np.load("joined.npy").ravel(), [4, 10, 15])
    smooth = np.concatenate([gaussian_filter1d(part, 2) for part in parts])
    first = found["joined.npy"]
    assert first["smooth"] == 2 and first["auc"] == pytest.approx(
        roc_auc_score(np.load("gt.npy"), np.repeat(smooth, 16))
    )
    assert first["by_smooth"]["0"]["auc"] == pytest.approx(roc_auc_score(np.load("gt.npy"), np.load("frames.npy")))


def test_scores_without_borders_have_no_interval_and_borrow_borders_of_another_file(made, monkeypatch):
    monkeypatch.chdir(made)
    outcome = evaluate("joined.npy", "--dataset", "ucf", "--truth", "gt.npy", "--json", "out.json")
    alone = json.loads((made / "out.json").read_text())["joined.npy"]
    assert outcome.code == 0 and "give --lengths FILE" in outcome.out
    assert alone["ano_auc"] is None and alone["far"] is None and alone["intervals"]["auc"] is None
    found = records(made, "joined.npy", "rows.csv", "--dataset", "ucf", "--truth", "gt.npy")
    assert found["joined.npy"]["intervals"] == found["rows.csv"]["intervals"]


def test_class_columns_give_class_metrics_and_detection(made, monkeypatch):
    monkeypatch.chdir(made)
    table = pd.read_csv("rows.csv")
    probabilities = np.random.default_rng(1).dirichlet(np.ones(len(UCF.labels)), len(table))
    for label, column in zip(UCF.labels, probabilities.T, strict=True):
        table[label] = column
    table.to_csv("classes.csv", index=False)
    np.save("classes.npy", np.column_stack([table.pred, probabilities]))
    found = records(made, "classes.csv", "classes.npy", "--dataset", "ucf", "--truth", "truth.csv")
    one, two = found.values()
    gt = np.load("gt.npy")[:64]
    abuse = np.concatenate([gt, np.zeros(16 * 14, np.uint8)])
    assert one["per_class"]["Abuse"]["auc"] == pytest.approx(
        roc_auc_score(abuse, np.repeat(probabilities[:, UCF.labels.index("Abuse")], 16))
    )
    assert set(one["map"]) == {"0.1", "0.2", "0.3", "0.4", "0.5"} and "mauc" in one["intervals"]
    assert one["map_average"] == two["map_average"] and one["mauc"] == pytest.approx(two["mauc"])


def edit(name, change):
    def apply():
        table = pd.read_csv("rows.csv").drop(columns="gt")
        change(table).to_csv(name, index=False)

    return apply


@pytest.mark.parametrize(
    "prepare, file, message",
    [
        (lambda: np.save("bad.npy", np.zeros(17)), "bad.npy", "bad.npy holds 17 scores"),
        (lambda: np.save("bad.npy", np.append(np.zeros(17), np.nan)), "bad.npy", "not finite, the first is score 17"),
        (edit("bad.csv", lambda t: t.replace("Abuse028_x264", "Foo1")), "bad.csv", "the truth lacks, 1 video: Foo1"),
        (edit("bad.csv", lambda t: t[t.video != "Abuse028_x264"]), "bad.csv", "bad.csv lacks 1 video: Abuse028_x264"),
        (edit("bad.csv", lambda t: t.assign(pred=["x", *t.pred[1:]])), "bad.csv", "row 2: pred is 'x', not a number"),
        (edit("bad.csv", lambda t: t.rename(columns={"pred": "value"})), "bad.csv", "no column of scores"),
        (edit("bad.csv", lambda t: t.iloc[[0, 4, *range(1, 4), *range(5, 18)]]), "bad.csv", "comes again"),
        (lambda: None, "none.npy", "scores not found: none.npy"),
        (lambda: Path("bad.json").write_text('{"a": [1], "a": [2]}'), "bad.json", "'a' is there more than once"),
    ],
    ids=["length", "nan", "unknown", "missing", "text", "column", "order", "file", "twice"],
)  # fmt: skip
def test_scores_that_do_not_fit_are_refused_in_one_line(made, monkeypatch, prepare, file, message):
    monkeypatch.chdir(made)
    prepare()
    outcome = evaluate(file, "--dataset", "ucf", "--truth", "truth.csv", "--json", "never.json")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (made / "never.json").exists()


def test_files_that_are_read_are_not_replaced(made, monkeypatch):
    monkeypatch.chdir(made)
    before = {path: path.read_bytes() for path in made.iterdir() if path.is_file()}
    for name in ("rows.csv", "truth.csv"):
        outcome = evaluate("rows.csv", "--dataset", "ucf", "--truth", "truth.csv", "--json", name)
        assert outcome.code == 2 and f"--json {name} would replace a file that is read" in outcome.err
    assert before == {path: path.read_bytes() for path in before}


def test_numbered_videos_and_snippets_are_sorted_by_their_numbers(made, monkeypatch):
    monkeypatch.chdir(made)
    table = pd.read_csv("rows.csv")
    numbers = table.assign(video=pd.factorize(table.video)[0], snippet=table.groupby("video").cumcount())
    numbers.sort_values("snippet", ascending=False).sort_values("video", key=lambda v: -v, kind="stable").to_csv(
        "b.csv"
    )
    found = records(made, "rows.csv", "b.csv", "--dataset", "ucf", "--truth", "gt.npy", "--resamples", 0)
    assert all(found["b.csv"][key] == found["rows.csv"][key] for key in ("auc", "ap", "ano_auc"))


def test_truth_of_one_kind_is_warned_of(made, monkeypatch):
    monkeypatch.chdir(made)
    np.save("none.npy", np.zeros_like(np.load("gt.npy")))
    outcome = evaluate("joined.npy", "--dataset", "ucf", "--truth", "none.npy", "--resamples", 0)
    assert outcome.code == 0 and "the truth of joined.npy has no abnormal frame: AUC and AP cannot" in outcome.err


def test_constant_scores_are_warned_of(made, monkeypatch):
    monkeypatch.chdir(made)
    np.save("constant.npy", np.full(18, 0.3))
    outcome = evaluate("constant.npy", "--dataset", "ucf", "--truth", "truth.csv", "--resamples", 0)
    assert outcome.code == 0 and "every score of constant.npy is 0.3" in outcome.err


def test_equal_parts_need_no_number_of_frames(made, monkeypatch):
    monkeypatch.chdir(made)
    parts = {name: np.random.default_rng(2).random(5) for name in VIDEOS}
    np.savez("parts.npz", **parts)
    found = records(made, "parts.npz", "--dataset", "ucf", "--truth", "truth.csv", "--frames-per-score", "equal")
    frames = [np.repeat(own, np.diff(np.arange(6) * 16 * VIDEOS[name][0] // 5)) for name, own in parts.items()]
    assert found["parts.npz"]["auc"] == pytest.approx(roc_auc_score(np.load("gt.npy"), np.concatenate(frames)))


def test_a_test_of_ours_brings_its_truth_and_has_the_same_numbers(made, monkeypatch):
    monkeypatch.chdir(made)
    parts = np.split(np.load("joined.npy").ravel(), [4, 10, 15])
    entries = [Entry(Path(f"{name}__5.npy"), UCF.label_of(name), row) for row, name in enumerate(VIDEOS, 2)]
    truth = read_truth("truth.csv", None, None, entries, [len(part) for part in parts], UCF)
    save_scores(
        made / "ours.npz", [VideoScores(part[None], None) for part in parts], VideoDataset(entries, UCF, 1, truth), {}
    )
    found = records(made, "ours.npz", "joined.npy", "--dataset", "ucf", "--truth", "truth.csv")
    alone = records(made, "ours.npz", "--dataset", "ucf")["ours.npz"]
    for key in ("auc", "ap", "far", "video_auc", "intervals"):
        assert found["ours.npz"][key] == found["joined.npy"][key] == alone[key], key
