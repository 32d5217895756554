"""Two runs on one page: numbers, intervals and curves are those of the runs, and other videos are refused."""

import base64
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from small_report import OPTIONS, made_test, write_test
from test_report import Page
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import SHANGHAITECH
from clipfusionvad.engine.evaluator import VideoDataset, VideoScores
from clipfusionvad.metrics import count_frames
from clipfusionvad.report.page import write_report
from clipfusionvad.report.results import TEST_SCORES
from clipfusionvad.report.scores import save_scores
from clipfusionvad.tools.tables.compare import compare

COUNT = 12


def moved_scores(scores, seed=3):
    """Scores of another model: every curve moved by a constant of its video, the classes as they are."""
    moves = np.random.default_rng(seed).uniform(-0.4, 0.4, len(scores))
    moved = [np.clip(one.anomaly + move, 0, 1).astype(np.float32) for one, move in zip(scores, moves, strict=True)]
    return [VideoScores(anomaly, one.classes) for anomaly, one in zip(moved, scores, strict=True)]


def changed(videos, stride=16, **values):
    return VideoDataset(
        values.get("entries", videos.entries), values.get("dataset", videos.dataset), 4,
        values.get("truth", videos.truth), stride,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder of two tests, one with its own page, and the page of both; their scores and videos."""
    folder = tmp_path_factory.mktemp("pair")
    scores, videos = made_test(COUNT)
    other = moved_scores(scores)
    # In another order, as another list may have it.
    turned = list(range(COUNT))[::-1]
    write_test(folder / "one", scores, videos)
    backwards = changed(videos, entries=videos.entries[::-1], truth=videos.truth.only(turned))
    options = OPTIONS | {"method": "iefvad", "seed": 7, "smooth": 2.0}
    write_test(folder / "more/b #2", other[::-1], backwards, options=options)
    write_report(folder / "more/b #2")
    outcome = quietly(main, strings(["report", folder / "one", folder / "more/b #2"]))
    assert outcome.code == 0, outcome.err
    page = folder / "one_vs_more_b #2.html"
    assert outcome.out.strip().endswith(page.name)
    return folder, Page(page.read_text(encoding="utf-8")), scores, other, videos


def test_numbers_and_intervals_are_those_of_the_paired_comparison(pair):
    folder, page, scores, other, videos = pair
    found = {one.metric: one for one in compare([folder / "one"], [folder / "more/b #2"])}
    auc = found["auc1"]
    frames = np.concatenate(videos.truth.frames)
    for sides, value in ((scores, auc.reference), (other, auc.other)):
        repeated = [
            one.anomaly[0][np.minimum(np.arange(len(own)) // 16, one.anomaly.shape[1] - 1)]
            for one, own in zip(sides, videos.truth.frames, strict=True)
        ]
        assert value == pytest.approx(100 * roc_auc_score(frames, np.concatenate(repeated)), abs=1e-4)
    shown = f"{auc.reference:.2f} {auc.other:.2f} {auc.difference:+.2f} {auc.over_videos} {auc.p:.3f}"
    assert f"AUC, coarse branch {shown}" in page.words
    average = found["map_average"]
    assert f"detection mAP {average.reference:.2f} {average.other:.2f} {average.difference:+.2f}" in page.words


def test_videos_where_the_curves_differ_most_come_first_with_both_curves(pair):
    _, page, scores, other, videos = pair
    data = page.data("scores")
    gaps = [float(one["data-value"]) for one in page.all("td") if one.get("data-name") == "distance"]
    assert gaps == sorted(gaps, reverse=True) and len(gaps) == COUNT
    frames = [count_frames(own, one.anomaly.shape[1])[1] for one, own in zip(scores, videos.truth.frames, strict=True)]
    expected = [
        np.average(np.abs(one.anomaly[0] - two.anomaly[0]), weights=own)
        for one, two, own in zip(scores, other, frames, strict=True)
    ]
    order = sorted(range(COUNT), key=lambda index: -expected[index])
    assert gaps == pytest.approx([expected[index] for index in order], abs=1e-5)
    for index, packed in zip(order, data["curves"], strict=True):
        curves = np.frombuffer(base64.b64decode(packed), "<u2").reshape(2, -1) / data["scale"]
        assert np.abs(curves[0] - scores[index].anomaly[0]).max() <= 0.5 / data["scale"] + 1e-7
        assert np.abs(curves[1] - other[index].anomaly[0]).max() <= 0.5 / data["scale"] + 1e-7


def test_what_differs_is_named_and_the_page_that_exists_is_linked(pair):
    _, page, *_ = pair
    links = [one["href"] for one in page.all("a") if one["href"][0] != "#"]
    assert links == ["more/b%20%232/report.html"] and "A one: vadclip · B more/b #2: iefvad" in page.words
    for text in ("method A vadclip · B iefvad", "seed A - · B 7", "smooth A - · B 2.0"):
        assert text in page.words


def test_a_score_per_frame_is_compared_with_a_score_per_16_frames(tmp_path):
    scores, videos = made_test(COUNT)
    write_test(tmp_path / "a", scores, videos)
    each = [
        VideoScores(*(np.take(part, np.minimum(np.arange(len(own)) // 16, one.anomaly.shape[1] - 1), axis)
                      for part, axis in ((one.anomaly, 1), (one.classes, 0))))
        for one, own in zip(scores, videos.truth.frames, strict=True)
    ]  # fmt: skip
    write_test(tmp_path / "b", each, changed(videos, stride=1))
    for order in (("a", "b"), ("b", "a")):
        argv = ["report", *(tmp_path / name for name in order), "--output", tmp_path / "page.html"]
        assert quietly(main, strings(argv)).code == 0
        page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert {one["data-value"] for one in page.all("td") if one.get("data-name") == "distance"} == {"0.000000"}
        assert {one["data-value"] for one in page.all("td") if one.get("data-name") == "error B − A"} <= {
            "0.000000",
            "-0.000000",
        }


def test_without_classes_without_truth_and_under_another_protocol(tmp_path):
    scores, videos = made_test(COUNT)
    write_test(tmp_path / "a", scores, videos)
    write_test(tmp_path / "plain", [VideoScores(one.anomaly[:1], None) for one in scores], videos)
    write_test(tmp_path / "clean", scores, videos, options=OPTIONS | {"protocol": "clean"})
    for name in ("x", "y"):
        save_scores(tmp_path / name / TEST_SCORES, scores, changed(videos, truth=None), OPTIONS)

    def page(one, two):
        output = tmp_path / "page.html"
        assert quietly(main, strings(["report", tmp_path / one, tmp_path / two, "--output", output])).code == 0
        return Page(output.read_text(encoding="utf-8"))

    words = page("a", "plain").words
    assert "AUC, coarse branch" in words and "AUC, fine branch" not in words
    words = page("a", "clean").words
    assert "detection mAP, as released" in words and not re.search(r"detection mAP \d", words)
    unjudged = page("x", "y")
    assert "percent" not in unjudged.words and "Error" not in unjudged.words and "error A" not in unjudged.words
    assert "no truth of frames" in unjudged.words
    assert sum("data-index" in one for one in unjudged.all("tbody")) == COUNT


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("fewer", "different videos (12 and 10; not in both: v10"),
        ("moved", "different truth (<img"),
        ("longer", "different truth (<img"),
        ("cut", "were tested on other features: <img"),
        ("unjudged", "and 0 of 0)"),
        ("label", "different labels (v11"),
        ("dataset", "different classes (UCF-Crime, ShanghaiTech)"),
    ],
)
def test_tests_that_contradict_each_other_are_one_clear_line(tmp_path, what, said):
    scores, videos = made_test(COUNT)
    write_test(tmp_path / "a", scores, videos)
    truth, entries = videos.truth, videos.entries
    moved, longer = ([change(own) for own in truth.frames] for change in (lambda a: np.roll(a, 1), lambda a: [*a, 0]))
    others = {
        "fewer": lambda: (scores[:10], changed(videos, entries=entries[:10], truth=truth.only(range(10)))),
        "moved": lambda: (scores, changed(videos, truth=replace(truth, frames=moved))),
        "longer": lambda: (scores, changed(videos, truth=replace(truth, frames=[*map(np.uint8, longer)]))),
        "unjudged": lambda: (scores, changed(videos, truth=None)),
        "label": lambda: (scores, changed(videos, entries=[*entries[:-1], replace(entries[-1], label="Arson")])),
        "dataset": lambda: made_test(COUNT, dataset=SHANGHAITECH),
        "cut": lambda: ([VideoScores(one.anomaly[:, 1:], None) for one in scores], changed(videos, truth=None)),
    }
    if what == "cut":
        save_scores(tmp_path / "a" / TEST_SCORES, scores, changed(videos, truth=None), OPTIONS)
    save_scores(tmp_path / "b" / TEST_SCORES, *others[what](), OPTIONS)
    refused(tmp_path, ["a", "b"], said)


def refused(folder, names, said, *flags):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    outcome = quietly(main, strings(["report", *(folder / name for name in names), *flags]))
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folders_that_cannot_be_compared_are_refused(tmp_path):
    write_test(tmp_path / "a", *made_test(4))
    write_test(tmp_path / "seeds/seed1", *made_test(4))
    (tmp_path / "seeds/options.yaml").write_text("seeds: [1]\n")
    (tmp_path / "seeds/seed1/options.yaml").write_text("seed: 1\n")
    refused(tmp_path, ["a", "b"], "no such folder")
    refused(tmp_path, ["a", "seeds"], "give the folder of one of its runs (seed1)")
    refused(tmp_path, ["a", "a", "a"], "give two folders")
    refused(tmp_path, ["a", "seeds/seed1"], "no option but --output", "--csv")
    (tmp_path / "metrics.json").write_text("{}\n")
    for folders in (["a", "seeds/seed1"], ["a"]):
        refused(tmp_path, folders, "is not a page and is not replaced", "--output", tmp_path / "metrics.json")
    assert (tmp_path / "metrics.json").read_text() == "{}\n"
