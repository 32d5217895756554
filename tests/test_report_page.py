"""The page of a run: the maths behind it, what is in it, and that nothing in it is taken for code."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from small_report import HOSTILE, OPTIONS, made_test, write_test, write_training
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import UCF, XD
from clipfusionvad.errors import UserError
from clipfusionvad.report import curves
from clipfusionvad.report.page import figure_html, render
from clipfusionvad.report.run_folder import RUN_SCORES, TEST_SCORES, read_run
from clipfusionvad.report.run_page import SCALE, report_page, write_report
from clipfusionvad.report.scores import read_scores, save_scores


def by_frame(scores, videos):
    """Score of the first branch, truth and snippet of every single frame of all videos."""
    rows, start = [], 0
    for video, truth in zip(scores, videos.truth.frames, strict=True):
        count = video.anomaly.shape[1]
        for frame, abnormal in enumerate(truth):
            snippet = min(frame // 16, count - 1)
            rows.append((video.anomaly[0, snippet], abnormal, start + snippet))
        start += count
    return tuple(np.array(column) for column in zip(*rows, strict=True))


# Curves.


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_curves_are_those_of_single_frames(seed):
    scores, videos = made_test(4, seed=seed)
    pooled = curves.pool(scores, videos)
    score, truth, _ = by_frame(scores, videos)
    roc = curves.roc(pooled.anomaly[0], pooled.positives, pooled.frames)
    for x, y, threshold in zip(*roc, strict=True):
        taken = score >= threshold
        assert (x, y) == pytest.approx((taken[truth == 0].mean(), taken[truth == 1].mean()))
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc_auc_score(truth, score))
    found = curves.precision_recall(pooled.anomaly[0], pooled.positives, pooled.frames)
    precision, recall, thresholds = precision_recall_curve(truth, score)
    assert np.allclose(found.x, recall) and np.allclose(found.y, precision)
    assert np.allclose(found.thresholds[:-1], thresholds)
    assert -np.sum(np.diff(found.x) * found.y[:-1]) == pytest.approx(average_precision_score(truth, score))


def test_curves_need_frames_of_both_kinds():
    for positives in (np.zeros(3, int), np.full(3, 16)):
        assert curves.roc(np.array([0.1, 0.2, 0.3]), positives, np.full(3, 16)) is None
        assert curves.precision_recall(np.array([0.1, 0.2, 0.3]), positives, np.full(3, 16)) is None


def test_best_threshold_is_the_best_of_all():
    scores, videos = made_test(seed=3)
    pooled = curves.pool(scores, videos)
    score, truth, _ = by_frame(scores, videos)

    def gain(threshold):
        return (score[truth == 1] >= threshold).mean() - (score[truth == 0] >= threshold).mean()

    best = curves.best_threshold(curves.roc(pooled.anomaly[0], pooled.positives, pooled.frames))
    assert gain(best) == pytest.approx(max(map(gain, np.unique(score))))


@given(st.integers(2, 3000), st.integers(2, 100), st.integers(0, 100))
def test_thinned_curve_stays_close(count, points, seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random((2, count)), axis=1)
    whole = curves.Curve(x, y, np.arange(count))
    thin = curves.thin(whole, points)
    assert len(thin.x) <= max(points, 2) and {0, count - 1} <= set(thin.thresholds)
    assert np.isin(thin.thresholds, whole.thresholds).all() and (np.diff(thin.thresholds) > 0).all()
    # A monotone curve is at most a step of its way from its neighbours that were kept.
    way = x[-1] - x[0] + y[-1] - y[0]
    steps = np.diff(thin.x) + np.diff(thin.y)
    jumps = np.diff(x) + np.diff(y)
    assert steps.max() <= way / (points - 1) + 2 * jumps.max() + 1e-9


@pytest.mark.parametrize("dataset", [UCF, XD], ids=["ucf", "xd"])
def test_confusion_counts_frames_one_by_one(dataset):
    scores, videos = made_test(10, dataset=dataset, seed=4)
    pooled = curves.pool(scores, videos)
    found = curves.class_confusion(dataset.labels, pooled)
    probabilities = np.concatenate([video.classes for video in scores])
    score, truth, snippets = by_frame(scores, videos)
    expected = np.zeros((len(dataset.labels),) * 2, int)
    places = [(index, frame) for index, frames in enumerate(videos.truth.frames) for frame in range(len(frames))]
    for value, abnormal, snippet, (video, frame) in zip(score, truth, snippets, places, strict=True):
        best = max(range(1, len(dataset.labels)), key=lambda c: probabilities[snippet, c])
        taken = best if value >= found.threshold else 0
        named = zip(videos.truth.segments[video], videos.truth.labels[video], strict=True)
        # A frame of two classes is one of each.
        classes = {label for (start, end), label in named if start <= frame < end} if abnormal else {dataset.labels[0]}
        for label in classes:
            expected[dataset.labels.index(label), taken] += 1
    assert found.labels == dataset.labels and (found.table == expected).all()
    assert expected[1:, 1:].sum() > 0


def test_confusion_without_classes_has_two_of_them():
    scores, videos = made_test(classes=False)
    found = curves.class_confusion(UCF.labels, curves.pool(scores, videos))
    score, truth, _ = by_frame(scores, videos)
    taken = score >= found.threshold
    assert found.labels == ["Normal", "anomalous"]
    assert found.table.tolist() == [
        [int((taken[truth == kind] == says).sum()) for says in (False, True)] for kind in (0, 1)
    ]


def test_video_error_is_a_mean_over_frames():
    scores, videos = made_test(1, seed=5)
    score, truth, _ = by_frame(scores, videos)
    pooled = curves.pool(scores, videos)
    found = curves.video_error(pooled.anomaly[0], pooled.positives, pooled.frames)
    assert found == pytest.approx(np.abs(score - truth).mean())
    assert np.isnan(curves.video_error(np.ones(2), np.zeros(2), np.zeros(2)))


@given(st.integers(1, 500), st.integers(1, 50))
def test_bucket_means(count, points):
    steps, values = np.arange(1, count + 1), np.random.default_rng(count).random((count, 2))
    last, means = curves.bucket_means(steps, values, points)
    size = -(-count // points)
    assert len(last) <= points and last[-1] == count
    for end, mean in zip(last, means, strict=True):
        start = (end - 1) // size * size
        assert np.allclose(mean, values[start:end].mean(axis=0))


# The file of scores.


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("truth", [True, False])
def test_scores_come_back(tmp_path, classes, truth):
    scores, videos = made_test(classes=classes, truth=truth)
    save_scores(tmp_path / "s.npz", scores, videos, OPTIONS)
    found = read_scores(tmp_path / "s.npz")
    assert [(e.video, e.label) for e in found.videos.entries] == [(e.video, e.label) for e in videos.entries]
    for one, other in zip(found.scores, scores, strict=True):
        assert (one.anomaly == other.anomaly).all()
        assert one.classes is None if not classes else (one.classes == other.classes).all()
    assert found.options == OPTIONS and found.environment["packages"]["torch"]
    assert (found.videos.anomalous == videos.anomalous).all() and found.videos.dataset.labels == UCF.labels
    if truth:
        old, new = videos.truth, found.videos.truth
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(old.frames, new.frames, strict=True))
        assert (old.segments, old.labels) == (new.segments, new.labels)
    else:
        assert found.videos.truth is None


def test_damaged_scores_are_one_clear_line(tmp_path):
    save_scores(tmp_path / "s.npz", *made_test(), OPTIONS)
    whole = (tmp_path / "s.npz").read_bytes()
    rng = np.random.default_rng(0)
    for spoiled in (b"", b"no zip", whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "s.npz").write_bytes(spoiled)
        with pytest.raises(UserError, match="not readable"):
            read_scores(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", about=np.array({"an": "object"}, dtype=object))
    with pytest.raises(UserError, match="not readable"):
        read_scores(tmp_path / "s.npz")
    for _ in range(40):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 20):
            broken[place] = rng.integers(256)
        (tmp_path / "s.npz").write_bytes(broken)
        try:
            read_scores(tmp_path / "s.npz")
        except UserError as error:
            assert "not readable" in str(error)


# Pages.


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, text in scripts by id."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.words, self._inside = [], [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        kind = self._inside[0] if self._inside else None
        if kind == "script":
            self.scripts.append((self._inside[1], data))
        elif kind == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self, name):
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == name))


def detection(**changed):
    values = {
        "title": HOSTILE,
        "video": "a b/#1 100%?.mp4",
        "fps": 30.0,
        "seconds": [0.27, 0.8, 1.33],
        "anomaly": [0.1, 0.9, float("nan")],
        "classes": {"normal": [0.5, 0.2, 0.3], "</script>" + HOSTILE: [0.5, 0.8, 0.7]},
        "segments": [{"start": 0.5, "end": 1.1, "label": "</script>" + HOSTILE, "confidence": 0.9}],
        "threshold": 0.5,
    }
    return render("detection.html.j2", **values | changed)


def index():
    row = {"name": HOSTILE, "page": "a b#.html", "verdict": HOSTILE, "max_score": 0.5, "segments": 1, "seconds": 3.0}
    failed = {"name": "broken", "page": None, "verdict": "no", "max_score": None, "segments": None, "seconds": None}
    return render("index.html.j2", title=HOSTILE, rows=[row, failed])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a test into the folder of a training run, and its metrics."""
    folder = tmp_path_factory.mktemp("report")
    write_training(folder)
    metrics = write_test(folder)
    return write_report(folder).read_text(encoding="utf-8"), metrics


@pytest.fixture(scope="module", params=["report", "detection", "index"])
def page(request, report):
    return {"report": lambda: report[0], "detection": detection, "index": index}[request.param]()


def test_names_are_never_taken_for_code(page):
    found = Page(page)
    assert not found.all("img") and HOSTILE.split('"')[0] in "".join(found.words)
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert not any(
        "alert" in text for attributes, text in found.scripts if attributes.get("type") != "application/json"
    )


def test_page_needs_nothing_but_itself(page):
    found = Page(page)
    places = [value for _, attributes in found.elements for name in ("src", "href") if (value := attributes.get(name))]
    assert all(re.match(r"#|data:,$|a%20b", place) for place in places), places
    own = [text for attributes, text in found.scripts if "plotly.js" not in text[:300] and "type" not in attributes]
    assert own and not any(re.search(r"https?:|fetch\(|XMLHttp|import\(", text) for text in own)
    assert not any("@import" in text or "url(" in text for text in found.styles)


def test_plotly_is_in_the_page_that_draws_with_it_once(report):
    sizes = [len(re.findall(r"plotly\.js v\d", text)) for text in (report[0], detection(), index())]
    assert sizes == [1, 0, 0]
    assert len(detection()) < 100_000 and len(index()) < 100_000


def test_report_holds_the_numbers_beside_the_papers(report):
    words = " ".join(" ".join(Page(report[0]).words).split())
    assert f"AUC, coarse branch {100 * report[1]['auc1']:.2f} 88.02" in words
    assert f"AUC, coarse branch {100 * report[1]['auc1']:.2f} paper 88.02" in words
    assert f"as released {' '.join(f'{value:.2f}' for value in report[1]['map_released'].values())}" in words
    assert "paper 11.72 7.83 6.40 4.53 2.93 6.68" in words
    judged = {label: values for label, values in report[1]["per_class"].items() if "video_auc" in values}
    assert len(judged) == 4
    for label, values in judged.items():
        assert f"{label} {100 * values['video_auc']:.2f} {100 * values['video_ap']:.2f}" in words


def test_report_holds_every_video(report):
    scores, videos = made_test()
    found = Page(report[0])
    data = found.data("scores")
    rows = [element for element in found.all("tbody") if "data-index" in element]
    assert len(rows) == len(scores) == len(data["snippets"]) == len(data["spans"])
    packed = np.frombuffer(base64.b64decode(data["curves"]), "<u2") / data["scale"]
    start = 0
    for video, count, truth, spans in zip(scores, data["snippets"], videos.truth.frames, data["spans"], strict=True):
        curve = packed[start : (start := start + video.anomaly.size)].reshape(2, count)
        assert np.abs(curve - video.anomaly).max() <= 0.5 / SCALE + 1e-7
        seconds = np.zeros(len(truth), int)
        for begin, end, label in spans:
            seconds[round(begin * UCF.fps) : round(end * UCF.fps)] = 1
            assert label
        assert (seconds == truth).all()
    assert start == len(packed)


def test_report_holds_errors_that_sort(report):
    values = [element["data-value"] for element in Page(report[0]).all("td") if element.get("data-name") == "error"]
    scores, videos = made_test()
    for index, (value, video) in enumerate(zip(values, scores, strict=True)):
        truth = videos.truth.frames[index]
        snippet = np.minimum(np.arange(len(truth)) // 16, video.anomaly.shape[1] - 1)
        assert float(value) == pytest.approx(np.abs(video.anomaly[0][snippet] - truth).mean(), abs=1e-5)


def test_report_shows_training_options_and_environment(report):
    found = Page(report[0])
    figures = [json.loads(text) for attributes, text in found.scripts if attributes.get("type") and '"layout"' in text]
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    assert titles == [
        "ROC",
        "Precision and recall",
        "Training loss",
        "Learning rate",
        "Evaluations",
        "Detection mAP, average",
    ]
    losses = figures[2]["data"][0]
    assert len(losses["x"]) <= 400 and losses["x"][-1] == 899
    words = " ".join(found.words)
    assert OPTIONS["model_path"] in words and "vadclip on UCF-Crime" in words and "numpy" in words


def test_method_without_classes(tmp_path):
    write_test(tmp_path, *made_test(classes=False), options=OPTIONS | {"demo": True})
    text = report_page(read_run(tmp_path))
    words = " ".join(Page(text).words)
    assert 'id="detection"' not in text and "88.02" not in words and "made-up data" in words
    assert len(re.findall(r"<th><span>", text)) == 2


def test_without_truth(tmp_path):
    scores, videos = made_test(truth=False)
    save_scores(tmp_path / TEST_SCORES, scores, videos, OPTIONS)
    text = report_page(read_run(tmp_path))
    assert len(re.findall("data-index=", text)) == len(scores)
    assert 'data-name="error"' not in text and 'id="ranking"' not in text and 'id="classes"' not in text
    outcome = quietly(main, strings(["report", tmp_path, "--formats", "png"]))
    assert outcome.code == 2 and "truth" in outcome.err


def test_run_that_was_interrupted(tmp_path):
    write_training(tmp_path)
    (tmp_path / "metrics.csv").write_text("")
    text = report_page(read_run(tmp_path))
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
        ({}, "neither a run"),
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
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    outcome = quietly(main, strings(["report", folder]))
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_command_writes_page_and_figures(tmp_path):
    write_test(tmp_path / "test")
    argv = ["report", tmp_path / "test", "--output", tmp_path / "page.html", "--formats", "png", "pdf"]
    outcome = quietly(main, strings(argv, ["--videos", "v1.a__#1_Normal", HOSTILE]))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "page.html").is_file() and not (tmp_path / "test/report.html").exists()
    names = ("roc", "precision_recall", "confusion", "curves")
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        for name in names:
            path = tmp_path / "figures" / f"{name}.{suffix}"
            assert path.read_bytes().startswith(magic) and str(path) in outcome.out
    outcome = quietly(main, strings(argv, ["--videos", "v1.a__#1_Norma"]))
    assert outcome.code == 2 and "did you mean 'v1.a__#1_Normal'" in outcome.err


# Parts.


def test_detection_page_holds_what_it_is_given():
    found = Page(detection())
    data = found.data("detection")
    assert data["anomaly"] == [0.1, 0.9, None] and data["duration"] == 1.33
    assert found.all("video")[0]["src"] == "a%20b/%231%20100%25%3F.mp4"
    assert "0:00.5" in found.words and "1 anomalous segment" in " ".join(" ".join(found.words).split())
    without = detection(video=None, segments=[], classes={}, seconds=[], anomaly=[], duration=2.0, facts={"x": HOSTILE})
    assert not Page(without).all("video") and "nothing anomalous" in without


def test_figure_is_strict_json_that_no_name_can_leave():
    text = figure_html({"data": [{"y": [1.0, float("inf")], "name": "</script><b>"}], "layout": {}})
    inside = Page(text).scripts[0][1]
    assert json.loads(inside)["data"][0] == {"y": [1.0, None], "name": "</script><b>"}


def test_a_name_that_is_no_text_can_be_shown():
    assert "v?.mp4" in index_of("v\udcff.mp4")


def index_of(name):
    row = {"name": name, "page": None, "verdict": "", "max_score": None, "segments": None, "seconds": 3725.04}
    text = render("index.html.j2", title="t", rows=[row])
    assert "1:02:05.0" in text
    return text
