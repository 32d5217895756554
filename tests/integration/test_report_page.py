"""The page of a run: what is in it, and that nothing in it is taken for code."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from small_report import HOSTILE, OPTIONS, made_test, write_test, write_training
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import UCF
from clipfusionvad.report.page import SCALE, render, report_page, write_report
from clipfusionvad.report.results import RUN_SCORES, TEST_SCORES, read_run
from clipfusionvad.report.scores import save_scores


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
    own = [text for attributes, text in found.scripts if "type" not in attributes]
    assert len(own) == 1 and not any(re.search(r"https?:|fetch\(|XMLHttp|import\(", text) for text in own)
    assert not any("@import" in text or "url(" in text for text in found.styles)


def test_pages_are_small(report):
    assert len(report[0]) < 250_000 and len(detection()) < 50_000 and len(index()) < 50_000


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
    assert len(rows) == len(scores)
    for video, packed, truth, spans in zip(scores, data["curves"], videos.truth.frames, data["spans"], strict=True):
        curve = np.frombuffer(base64.b64decode(packed), "<u2").reshape(2, -1) / data["scale"]
        assert np.abs(curve - video.anomaly).max() <= 0.5 / SCALE + 1e-7
        seconds = np.zeros(len(truth), int)
        for begin, end, label in spans:
            seconds[round(begin * UCF.fps) : round(end * UCF.fps)] = 1
            assert label
        assert (seconds == truth).all()


def test_report_holds_errors_that_sort(report):
    values = [element["data-value"] for element in Page(report[0]).all("td") if element.get("data-name") == "error"]
    scores, videos = made_test()
    for index, (value, video) in enumerate(zip(values, scores, strict=True)):
        truth = videos.truth.frames[index]
        snippet = np.minimum(np.arange(len(truth)) // 16, video.anomaly.shape[1] - 1)
        assert float(value) == pytest.approx(np.abs(video.anomaly[0][snippet] - truth).mean(), abs=1e-5)


def test_report_shows_training_options_and_environment(report):
    charts = [element["aria-label"] for element in Page(report[0]).all("svg")]
    training = ["Training loss", "Learning rate", "Evaluations", "Detection mAP, average"]
    assert charts == ["ROC", "Precision and recall", *training]
    words = " ".join(Page(report[0]).words)
    assert OPTIONS["model_path"] in words and "vadclip on UCF-Crime" in words and "numpy" in words


def test_charts_follow_the_colours_of_the_page_and_show_values(report):
    charts = re.findall(r"<svg class=.*?</svg>", report[0], re.DOTALL)
    for chart in charts:
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart)) <= {"#000000"} and "var(--text)" in chart
    hints = [re.findall(r"<title>(.*?)</title>", chart) for chart in charts]
    assert re.fullmatch(r"coarse: threshold \S+, false positive rate \S+, true positive rate \S+", hints[0][3])
    assert "AUC coarse, step 300, AUC, AP 0.65" in hints[4] and len(hints[2]) == 80


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
    assert data["curves"][0]["values"] == [0.1, 0.9, None] and data["duration"] == 1.33
    assert found.all("video")[0]["src"] == "a%20b/%231%20100%25%3F.mp4"
    assert "0:00.5" in found.words and "1 anomalous segment" in " ".join(" ".join(found.words).split())
    without = detection(video=None, segments=[], classes={}, seconds=[], anomaly=[], duration=2.0, facts={"x": HOSTILE})
    assert not Page(without).all("video") and "nothing anomalous" in without


def test_a_name_that_is_no_text_can_be_shown():
    assert "v?.mp4" in index_of("v\udcff.mp4")


def index_of(name):
    row = {"name": name, "page": None, "verdict": "", "max_score": None, "segments": None, "seconds": 3725.04}
    text = render("index.html.j2", title="t", rows=[row])
    assert "1:02:05.0" in text
    return text
