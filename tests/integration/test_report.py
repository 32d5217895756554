"""The printed table, the pictures, and the page of a run: what is in it, and that nothing in it is taken for code."""

import base64
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score
from small_report import HOSTILE, OPTIONS, detection_page, index_page, made_test, write_test, write_training
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import DATASETS, UCF, Convention
from clipfusionvad.engine.evaluator import evaluate
from clipfusionvad.io.files import write_json, write_text
from clipfusionvad.models import method_names
from clipfusionvad.report.curves import pool
from clipfusionvad.report.page import SCALE, report_page, write_report
from clipfusionvad.report.plots import draw_score_curves, draw_training
from clipfusionvad.report.results import RUN_SCORES, TEST_SCORES, read_run
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.tools.evaluate.score_files import read_score_file


def cells(table):
    """Values by row title."""
    return {title: values for title, *values in (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())}


def test_the_table_holds_the_metrics_in_percent_and_the_papers_beside_them():
    metrics = evaluate(*made_test())
    table = cells(metrics_table({"last": metrics, "best": metrics}, {"auc1": 0.8677, "map@0.3": 6.4}))
    assert table["percent"] == ["last", "best", "paper"]
    assert table["AUC, coarse branch"] == [f"{100 * metrics['auc1']:.2f}"] * 2 + ["86.77"]
    assert table["Ano-AUC, fine branch"][0] == f"{100 * metrics['ano_auc2']:.2f}"
    assert table["detection mAP@0.3"] == [f"{metrics['map']['0.3']:.2f}"] * 2 + ["6.40"]
    assert table["corrected: anomalous videos only"][0] == f"{metrics['map_anomalous_only']['average']:.2f}"


def test_a_metric_that_is_undefined_is_a_dash_and_a_method_without_classes_has_no_map():
    table = cells(metrics_table({"here": {"auc1": 0.5, "ap1": float("nan"), "ano_auc1": None}}, {}))
    shown = {"AUC, coarse branch": ["50.00"], "AP, coarse branch": ["-"], "Ano-AUC, coarse branch": ["-"]}
    assert table == {"percent": ["here"]} | shown


def test_published_figures_are_of_known_methods_and_in_range():
    assert published("vadclip", "ucf")["auc1"] == 0.8802 and published("no such method", "ucf") == {}
    for method, dataset in itertools.product(method_names(), DATASETS):
        for name, value in published(method, dataset).items():
            assert 0 < value <= (100 if name.startswith("map") else 1), (method, dataset, name)


def test_pictures_of_few_and_many_videos_and_of_a_training(tmp_path):
    for count in (1, 2, 17):
        draw_score_curves(tmp_path / "scores.png", *made_test(count))
        height, width, _ = imread(tmp_path / "scores.png").shape
        assert width > 1000 and (height > 800) == (count > 6)
    write_training(tmp_path)
    draw_training(tmp_path / "training.png", tmp_path)
    assert imread(tmp_path / "training.png").shape[1] > 1000


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, scripts, and its words."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self._words, self._inside = [], [], [], (None, {})
        self.feed(text)
        self.close()
        self.words = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attributes):
        self._inside = (tag, dict(attributes))
        self.elements.append(self._inside)

    def handle_endtag(self, tag):
        self._inside = (None, {})

    def handle_data(self, data):
        tag, attributes = self._inside
        if tag == "script":
            self.scripts.append((attributes, data))
        elif tag != "style":
            self._words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self, name):
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == name))


def index(name=HOSTILE):
    row = {"name": name, "page": "a b#.html", "line": HOSTILE, "seconds": 3725.04}
    return index_page(HOSTILE, row, {"name": "broken", "line": "no", "max_score": None})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a test into the folder of a training run, and its metrics."""
    folder = tmp_path_factory.mktemp("report")
    write_training(folder)
    metrics = write_test(folder)
    with pytest.MonkeyPatch.context() as patch:
        # As if these eight videos were the whole test set.
        patch.setitem(DATASETS, "ucf", replace(UCF, conventions=(Convention("floor16", "floor", 8),)))
        return write_report(folder).read_text(encoding="utf-8"), metrics


@pytest.mark.parametrize(("name", "largest"), [("report", 250_000), ("detection", 50_000), ("index", 50_000)])
def test_pages_are_small_need_nothing_else_and_take_no_name_for_code(name, largest, report):
    text = {"report": lambda: report[0], "detection": detection_page, "index": index}[name]()
    found = Page(text)
    assert len(text) < largest and not found.all("img") and HOSTILE.split('"')[0] in found.words
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    places = [value for _, attributes in found.elements for name in ("src", "href") if (value := attributes.get(name))]
    assert all(re.match(r"#|data:,$|a%20b|(test_)?[a-z]+\.(csv|npz|json)$", place) for place in places), places
    (own,) = (text for attributes, text in found.scripts if "type" not in attributes)
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(|alert", own)
    assert not re.search(r"@import|url\(", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])


def test_report_holds_the_numbers_beside_the_papers(report):
    words, metrics = Page(report[0]).words, report[1]
    assert f"AUC, coarse branch {100 * metrics['auc1']:.2f} 88.02" in words
    assert f"AUC, coarse branch {100 * metrics['auc1']:.2f} paper 88.02" in words
    assert f"as released {' '.join(f'{value:.2f}' for value in metrics['map_released'].values())}" in words
    assert "paper 11.72 7.83 6.40 4.53 2.93 6.68" in words
    judged = {label: values for label, values in metrics["per_class"].items() if "video_auc" in values}
    assert len(judged) == 4
    for label, values in judged.items():
        assert f"{label} {100 * values['video_auc']:.2f} {100 * values['video_ap']:.2f}" in words


def test_report_holds_every_video_with_its_curve_truth_and_error(report):
    scores, videos = made_test()
    found = Page(report[0])
    data = found.data("scores")
    assert sum("data-index" in element for element in found.all("tbody")) == len(scores)
    errors = [element["data-value"] for element in found.all("td") if element.get("data-name") == "error"]
    shown = zip(scores, data["curves"], videos.truth.frames, data["spans"], errors, strict=True)
    for video, packed, truth, spans, error in shown:
        curve = np.frombuffer(base64.b64decode(packed), "<u2").reshape(2, -1) / data["scale"]
        assert np.abs(curve - video.anomaly).max() <= 0.5 / SCALE + 1e-7
        abnormal = np.zeros(len(truth), int)
        for begin, end, label in spans:
            abnormal[round(begin * UCF.fps) : round(end * UCF.fps)] = 1
            assert label
        assert (abnormal == truth).all()
        snippet = np.minimum(np.arange(len(truth)) // 16, video.anomaly.shape[1] - 1)
        assert float(error) == pytest.approx(np.abs(video.anomaly[0][snippet] - truth).mean(), abs=1e-5)


def test_report_shows_charts_in_the_colours_of_the_page_options_and_environment(report):
    found = Page(report[0])
    titles = ["ROC", "Precision and recall", "Confusion of classes", "Training loss", "Learning rate", "Evaluations"]
    assert [element["aria-label"] for element in found.all("svg")] == [*titles, "Detection mAP, average"]
    assert OPTIONS["model_path"] in found.words and ": vadclip on UCF-Crime" in found.words and "numpy" in found.words
    charts = re.findall(r"<svg class=.*?</svg>", report[0], re.DOTALL)
    for chart in charts:
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart)) <= {"#000000"} and "var(--text)" in chart
    hints = [re.findall(r"<title>(.*?)</title>", chart) for chart in charts]
    assert re.fullmatch(r"coarse: threshold \S+, false positive rate \S+, true positive rate \S+", hints[0][3])
    assert "AUC coarse, step 300, percent 65" in hints[5] and len(hints[3]) == 80
    counted = [int(re.search(r"([\d,]+) frames", hint)[1].replace(",", "")) for hint in hints[2]]
    assert sum(counted) == pool(*made_test()).truth.sum() and "Normal predicted as Normal: " in " ".join(hints[2])


def test_a_constant_learning_rate_is_drawn_as_what_it_is(tmp_path):
    write_training(tmp_path)
    log = (tmp_path / "losses.csv").read_text().replace(",0.001\n", ",1e-05\n")
    (tmp_path / "losses.csv").write_text(log)
    chart = re.findall(r"<svg class=.*?</svg>", report_page(read_run(tmp_path)), re.DOTALL)[1]
    ticks = re.findall(r">(?:<!--)?\s*([\d.]+e?[−-]?\d*)\s*<", chart)
    assert "Learning rate" in chart and "1e−05" in ticks and "−1" not in chart


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "8 videos were tested; the test set of UCF-Crime has 290"),
        ({"clip": "toy"}, "the weights of CLIP are made up"),
        ({"demo": True}, "the data are made up"),
    ],
)
def test_a_page_says_why_the_papers_figures_are_not_there(tmp_path, changed, reason):
    write_test(tmp_path, options=OPTIONS | changed)
    words = Page(report_page(read_run(tmp_path))).words
    assert f"The paper's figures are not shown: {reason}" in words and "88.02" not in words


def test_long_series_are_shown_as_means_over_stretches(tmp_path):
    write_training(tmp_path, steps=1601)
    chart = re.findall(r"<svg class=.*?</svg>", report_page(read_run(tmp_path)), re.DOTALL)[0]
    rows = np.genfromtxt(tmp_path / "losses.csv", delimiter=",", names=True)
    assert f"coarse, step 4, loss {rows['coarse'][:4].mean():.4g}" in re.findall(r"<title>(.*?)</title>", chart)


def test_report_without_classes_without_truth_and_of_an_interrupted_run(tmp_path):
    plain, unjudged, broken = (tmp_path / name for name in ("plain", "unjudged", "broken"))
    write_test(plain, *made_test(classes=False), options=OPTIONS | {"demo": True})
    text = report_page(read_run(plain))
    words = Page(text).words
    assert 'id="detection"' not in text and "88.02" not in words and "made-up data" in words
    assert "Normal predicted as anomalous: " in text
    scores, videos = made_test(truth=False)
    write_json(unjudged / "test_metrics.json", evaluate(scores, videos))
    save_scores(unjudged / TEST_SCORES, scores, videos, OPTIONS)
    text = report_page(read_run(unjudged))
    assert "Whole videos are judged, not frames" in text
    assert len(re.findall("data-index=", text)) == len(scores)
    assert 'data-name="error"' not in text and 'id="ranking"' not in text and 'id="classes"' not in text
    outcome = quietly(main, strings(["report", unjudged, "--formats", "png"]))
    assert outcome.code == 2 and "truth" in outcome.err
    write_training(broken)
    (broken / "metrics.csv").write_text("")
    text = report_page(read_run(broken))
    assert "Training loss" in text and "not tested yet" in text and "ucf_train.py &#39;a b&#39;" in text


def test_results_are_those_of_the_later_test(tmp_path):
    write_training(tmp_path)
    scores, videos = made_test(4)
    save_scores(tmp_path / RUN_SCORES, scores, videos, OPTIONS)
    (tmp_path / "metrics.json").write_text('{"last": {"auc1": 0.1}, "best": {"auc1": 0.2}}')
    assert list(read_run(tmp_path).results) == ["last", "best"]
    write_test(tmp_path)
    run = read_run(tmp_path)
    assert list(run.results) == ["test"] and len(run.tested.scores) == 8
    save_scores(tmp_path / RUN_SCORES, scores, videos, OPTIONS)
    assert len(read_run(tmp_path).tested.scores) == 4


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "no such folder"),
        ({"notes.txt": "x"}, "neither a run"),
        ({"options.yaml": ": ["}, "not readable YAML"),
        ({"options.yaml": "- 1"}, "option: value"),
        ({"options.yaml": "seed: 1", "metrics.json": "{"}, "not readable JSON"),
        ({"options.yaml": "seed: 1", "environment.json": "3"}, "names and values"),
        ({"options.yaml": "seed: 1", "losses.csv": "a,b\n1,2\n"}, "log of a run"),
        ({"test_scores.npz": "x"}, "not readable"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, files, said):
    folder = tmp_path / "run"
    for name, text in (files or {}).items():
        write_text(folder / name, text)
    outcome = quietly(main, strings(["report", folder]))
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_folder_of_runs_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_training(tmp_path / "runs/ucf")
    write_test(tmp_path / "runs/sweep/full/seed1")
    (tmp_path / "runs/sweep/full/seed1/report.html").write_text("page")
    outcome = quietly(main, ["report", "runs"])
    assert outcome.code == 0 and outcome.out.splitlines() == [
        "runs in runs; compare them: python -m clipfusionvad table runs",
        "  runs/sweep/full/seed1/report.html",
        "  python -m clipfusionvad report runs/ucf",
    ]
    outcome = quietly(main, ["report", "runs", "--output", "page.html"])
    assert outcome.code == 2 and "give the folder of one of its runs (ucf)" in outcome.err
    for command in ("rerun runs", "export runs --output x.pth", "insight attention runs --output x.png"):
        outcome = quietly(main, command.split())
        assert outcome.code == 2 and "give the folder of one of its runs (ucf)" in outcome.err, outcome.err
    assert "run runs/ucf" in quietly(main, ["doctor", "--run", "runs", "--only", "run"]).out


def test_command_writes_page_and_figures(tmp_path):
    write_test(tmp_path / "test")
    argv = ["report", tmp_path / "test", "--output", tmp_path / "page.html", "--formats", "png", "pdf"]
    outcome = quietly(main, strings(argv, ["--videos", "v1.a__#1_Normal", HOSTILE]))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "page.html").is_file() and not (tmp_path / "test/report.html").exists()
    names, kinds = ("roc", "precision_recall", "confusion", "curves"), {"png": b"\x89PNG", "pdf": b"%PDF"}
    for name, suffix in itertools.product(names, kinds):
        path = tmp_path / "figures" / f"{name}.{suffix}"
        assert path.read_bytes().startswith(kinds[suffix]) and str(path) in outcome.out
    outcome = quietly(main, strings(argv, ["--videos", "v1.a__#1_Norma"]))
    assert outcome.code == 2 and "did you mean 'v1.a__#1_Normal'" in outcome.err


@pytest.mark.parametrize(("classes", "truth"), [(True, True), (False, True), (True, False)])
def test_csv_files_hold_every_video_and_snippet_with_the_numbers_of_the_page(tmp_path, classes, truth):
    scores, videos = made_test(classes=classes, truth=truth)
    save_scores(tmp_path / TEST_SCORES, scores, videos, OPTIONS)
    assert quietly(main, strings(["report", tmp_path, "--csv"])).code == 0
    rows, snippets = (pd.read_csv(tmp_path / f"test_{name}.csv") for name in ("videos", "snippets"))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for name, column in (("error", "error1"), ("highest score", "peak1")):
        shown = [one["data-value"] for one in page.all("td") if one.get("data-name") == name]
        assert shown == ([f"{value:.6f}" for value in rows[column]] if truth or name == "highest score" else [])
    assert rows["video"].tolist() == [entry.video for entry in videos.entries]
    assert [one["href"] for one in page.all("a") if "download" in one] == [
        TEST_SCORES, "test_snippets.csv", "test_videos.csv"
    ]  # fmt: skip
    stacked = np.concatenate([one.anomaly for one in scores], axis=1)
    for branch, curve in enumerate(stacked, start=1):
        assert (snippets[f"score{branch}"].to_numpy(np.float32) == curve).all()
    if classes:
        found = snippets[videos.dataset.labels].to_numpy(np.float32)
        assert (found == np.concatenate([one.classes for one in scores])).all()
    if not truth:
        assert rows[["error1", "auc1"]].isna().all(axis=None) and "truth" not in snippets
        assert (rows["frames"] == 16 * rows["snippets"]).all()
        return
    whole = np.repeat(stacked[0], snippets["end_frame"] - snippets["start_frame"])
    for row, frames in zip(rows.itertuples(), videos.truth.frames, strict=True):
        own, whole = whole[: len(frames)], whole[len(frames) :]
        assert row.frames == len(frames) and row.seconds == pytest.approx(len(frames) / UCF.fps, abs=1e-5)
        assert row.mean1 == pytest.approx(own.mean(), abs=1e-5)
        expected = roc_auc_score(frames, own) if frames.any() else np.nan
        assert row.auc1 == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert len(whole) == 0 and snippets["abnormal_frames"].sum() == sum(map(np.sum, videos.truth.frames))
    spans = list(zip(videos.truth.segments[0], videos.truth.labels[0], strict=True))
    for row in snippets[snippets["video"] == HOSTILE].itertuples():
        named = {label for (begin, end), label in spans if begin < row.end_frame and row.start_frame < end}
        assert set(row.truth.split(", ")) == (named or {"Normal"})


def test_a_later_test_replaces_the_csv_of_its_snippets(tmp_path):
    write_test(tmp_path)
    assert quietly(main, strings(["report", tmp_path, "--csv"])).code == 0
    scores, videos = made_test(4, seed=1)
    write_test(tmp_path, scores, videos)
    write_report(tmp_path)
    assert len(pd.read_csv(tmp_path / "test_snippets.csv")) == sum(one.anomaly.shape[1] for one in scores)
    assert len(pd.read_csv(tmp_path / "test_videos.csv")) == 4
    # As a score file of "evaluate" it is what the test was.
    read = read_score_file(tmp_path / "test_snippets.csv", UCF)
    assert (read.scores.astype(np.float32) == np.concatenate([one.anomaly[0] for one in scores])).all()
    assert read.classes.shape[1] == len(UCF.labels) and read.rows.tolist() == [one.anomaly.shape[1] for one in scores]


def test_a_page_elsewhere_links_to_the_files_of_its_run_and_writes_nothing_there(tmp_path):
    write_test(tmp_path / "a #1")
    before = {path.name for path in (tmp_path / "a #1").iterdir()}
    assert quietly(main, strings(["report", tmp_path / "a #1", "--output", tmp_path / "pages/one.html"])).code == 0
    found = Page((tmp_path / "pages/one.html").read_text(encoding="utf-8"))
    links = [unquote(one["href"]) for one in found.all("a") if "download" in one]
    assert {(tmp_path / "pages" / link).resolve().name for link in links} == before
    assert {path.name for path in (tmp_path / "a #1").iterdir()} == before
    (tmp_path / "a #1" / TEST_SCORES).unlink()
    write_text(tmp_path / "a #1/options.yaml", "seed: 1\n")
    outcome = quietly(main, strings(["report", tmp_path / "a #1", "--csv"]))
    assert outcome.code == 2 and "holds no scores.npz" in outcome.err and outcome.err.count("\n") == 1


def test_detection_page_and_index_hold_what_they_are_given():
    found = Page(detection_page())
    data = found.data("detection")
    assert data["curves"][0]["values"] == [0.1, 0.9, None] and data["duration"] == 1.33
    assert found.all("video")[0]["src"] == "a%20b/%231%20100%25%3F.mp4"
    assert "0:00.5" in found.words and "1 anomalous segment" in found.words
    nothing = {"segments": [], "classes": {}, "seconds": [], "anomaly": []}
    without = detection_page(video=None, duration=2.0, facts={"x": HOSTILE}, **nothing)
    assert not Page(without).all("video") and "nothing anomalous" in without
    # A name of bytes that are not text can be shown.
    assert "v?.mp4" in index("v\udcff.mp4") and "1:02:05.0" in index()
