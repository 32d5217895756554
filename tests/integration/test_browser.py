"""The pages in a real browser, headless Chromium: light and dark, wide and narrow, and what happens at a click.

CHROMIUM names the browser if it is not called chromium on PATH; SCREENSHOTS is a folder for pictures to look at.
"""

import base64
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_report import HOSTILE, detection_page, index_page, made_test, write_test, write_training

from clipfusionvad.datasets import SHANGHAITECH
from clipfusionvad.engine.evaluator import VideoScores
from clipfusionvad.report.page import write_report
from clipfusionvad.tools.detect.page import index_row, write_index
from clipfusionvad.tools.tables.compare_page import write_comparison

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
FOUND = [shutil.which(name) for name in (os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")]
PROGRAM = next(filter(None, FOUND), None)
NEEDED = "no Chromium here: install it, or name it with CHROMIUM"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=NEEDED)]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
VIDEOS = 26


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Without the sandbox it also starts as root, as in a container.
        browser = driver.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A function that opens a page; at the end no script may have failed and nothing been fetched."""
    pages, problems = [], []

    def open_page(path, scheme="light", width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("dialog", lambda dialog: problems.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda one: one.url.startswith(("file:", "data:", "blob:")) or problems.append(one.url))
        page.goto(path.resolve().as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [text for text in problems if "ERR_FILE_NOT_FOUND" not in text] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a page of two, a detection page whose video plays, one whose video does not, and an index, by name."""
    folder = tmp_path_factory.mktemp("pages")
    write_training(folder / "run")
    write_test(folder / "run", *made_test(VIDEOS))
    scores, videos = made_test(VIDEOS)
    write_test(folder / "other", [VideoScores(1 - one.anomaly, one.classes) for one in scores], videos)
    write_film(folder / "film #1.webm")
    (folder / "text.mp4").write_text("no video")
    seconds = np.arange(0.25, 4, 0.5)
    anomaly = np.where(seconds > 2, 0.9, 0.1)
    classes = {"normal": 1 - anomaly, HOSTILE: 0.7 * anomaly, "fire": 0.2 * anomaly}
    values = {"seconds": seconds.tolist(), "anomaly": anomaly.tolist(), "duration": 4.0, "facts": {"length": "0:04"}}
    values |= {"segments": [{"start": 2.0, "end": 4.0, "label": HOSTILE, "confidence": 0.9}], "fps": 10}
    values |= {"classes": {label: shares.tolist() for label, shares in classes.items()}}
    moment = {"time": 3.25, "score": 0.9, "picture": thumbnail("white")}
    values |= {"moments": [moment | {"label": HOSTILE}, moment | {"time": 1.25, "label": None}]}
    values |= {"truth": [{"start": 1.0, "end": 2.0, "label": "fire"}]}
    for name, video in (("detection", "film #1.webm"), ("unplayable", "text.mp4")):
        (folder / f"{name}.html").write_text(detection_page(video=video, **values), encoding="utf-8")
    rows = [
        {"name": f"clip {i}", "line": "fire 0.12 (unsure)" if i % 3 else "normal"}
        | {"max_score": i / 30, "segments": i % 3, "seconds": 61.5 * i, "thumbnail": thumbnail("grey")}
        for i in range(30)
    ]
    rows.append({"name": "x" * 150, "line": f"not a video {HOSTILE}", "max_score": None})
    (folder / "index.html").write_text(index_page("31 videos", *rows), encoding="utf-8")
    two = write_comparison(folder / "run", folder / "other", folder / "comparison.html")
    return {"report": write_report(folder / "run"), "comparison": two} | {
        path.stem: path for path in folder.glob("*.html")
    }


def write_film(path):
    """Four seconds of grey, white from second 2 on: tells where a browser has gone to."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for index in range(40):
            shade = np.full((120, 160, 3), 60 if index < 20 else 255, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        file.mux(stream.encode())


def thumbnail(colour):
    """A JPEG of one colour, in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), colour).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def overflowing(page):
    """Elements that stick out of the window, those that may be scrolled by themselves aside."""
    return page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll"))
        .map((one) => one.outerHTML.slice(0, 80))"""
    )


def curves(page, selector):
    """How many points each curve in an element has."""
    return page.locator(f"{selector} polyline").evaluate_all("(lines) => lines.map((line) => line.points.length)")


@pytest.mark.parametrize("name", ["report", "comparison", "detection", "unplayable", "index"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_looks(pages, opened, tmp_path, name, scheme, width):
    page = opened(pages[name], scheme, width)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and overflowing(page) == []
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"{name}_{scheme}_{width}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000
    # The button switches between light and dark; the text of charts follows.
    dark, fills = [], []
    for _ in range(2):
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark.append(sum(map(int, ground.strip("rgb()").split(", "))) < 200)
        fills.append(page.evaluate("getComputedStyle(document.querySelector('#ranking text') ?? document.body).fill"))
        page.click("#theme")
        page.wait_for_timeout(200)
    assert dark == [scheme == "dark", scheme != "dark"] and (fills[0] != fills[1]) == (name == "report")


def test_report_finds_and_sorts_videos_and_opens_curves(pages, opened):
    page = opened(pages["report"])
    rows = page.locator("#videos tbody")
    assert rows.count() == VIDEOS and page.inner_text(".toolbar output") == f"{VIDEOS} videos"
    page.fill(".toolbar input", "V3.A normal")
    assert page.locator("#videos tbody:visible").count() == 1
    assert page.inner_text(".toolbar output") == f"1 of {VIDEOS} videos"
    page.fill(".toolbar input", "")
    page.select_option(".toolbar select", "Arson")
    assert {row.split("\t")[1] for row in page.locator("#videos tbody:visible").all_inner_texts()} == {"Arson"}
    page.select_option(".toolbar select", "")
    assert page.locator("#videos tbody:visible").count() == VIDEOS
    large = "#videos tbody[data-index='2'] .timeline"
    page.click("#videos tbody[data-index='2'] .open")
    assert len(curves(page, large)) == 2
    page.hover(large)
    time, *shown = page.inner_text("#videos tbody[data-index='2'] .readout").split(" · ")
    minutes, seconds = time.split(":")
    snippet = int((60 * int(minutes) + float(seconds)) / (16 / 30))
    near = made_test(VIDEOS)[0][2].anomaly[:, max(snippet - 1, 0) : snippet + 2]
    shown = [float(part.split()[-1]) for part in shown]
    assert any(np.allclose(near[:, at], shown, atol=0.006) for at in range(near.shape[1]))
    page.click("#videos .steps button >> text=next")
    assert page.locator(large).count() == 0 and page.locator("#videos tbody[data-index='3'] .timeline").count() == 1
    page.keyboard.press("Enter")
    page.click("#videos .steps button >> text=previous")
    assert page.locator("#videos tbody[data-index='3'] .timeline").count() == 1
    page.click("#videos .steps button >> text=all videos")
    assert page.locator("#videos .timeline").count() == 0

    def errors():
        return page.eval_on_selector_all("td[data-name=error]", "(all) => all.map((one) => Number(one.dataset.value))")

    heading, before = page.locator("#videos th", has_text="error"), errors()
    heading.locator("button").click()
    assert errors() == sorted(before, reverse=True) and heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert errors() == sorted(before) != before


def test_comparison_shows_both_curves_and_the_video_that_differs_most_first(pages, opened):
    page = opened(pages["comparison"])
    rows = "(all) => all.map((one) => Number(one.dataset.value))"
    assert (gaps := page.eval_on_selector_all("td[data-name=distance]", rows)) == sorted(gaps, reverse=True)
    page.locator("#videos .open").first.click()
    assert len(curves(page, "#videos .timeline")) == 2
    page.hover("#videos .timeline")
    shown = re.fullmatch(r".* · A run (\S+) · B other (\S+)", page.inner_text("#videos .readout"))
    assert float(shown[1]) + float(shown[2]) == pytest.approx(1, abs=0.011)


def test_report_of_the_most_classes_fits_a_narrow_window_and_draws_curves_when_they_come_into_sight(opened, tmp_path):
    write_test(tmp_path, *made_test(50, dataset=SHANGHAITECH))
    page = opened(write_report(tmp_path), width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and overflowing(page) == []
    assert "throwing_object predicted as" in page.content()
    last = "#videos tbody[data-index='49'] .small"
    assert curves(page, last) == []
    page.locator(last).scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert len(curves(page, last)) == 2


def test_curve_and_video_move_together(pages, opened):
    page = opened(pages["detection"])
    page.wait_for_function("document.getElementById('video').readyState >= 1")
    place = page.locator("#timeline")
    place.click(position={"x": 0.75 * place.bounding_box()["width"], "y": 100})
    page.wait_for_function("Math.abs(document.getElementById('video').currentTime - 3) < 0.1")
    assert page.locator("#segments tr.now").count() == 1
    page.evaluate("document.getElementById('video').currentTime = 1")
    page.wait_for_function("Math.abs(Number(document.getElementById('timeline').ariaValueNow) - 1) < 0.11")
    assert page.locator("#segments tr.now").count() == 0
    page.click("#segments button")
    page.wait_for_function("Math.abs(document.getElementById('video').currentTime - 2) < 0.1")
    page.evaluate("const film = document.getElementById('video'); film.muted = true; film.play()")
    page.wait_for_function("Number(document.getElementById('timeline').ariaValueNow) > 2.2")
    page.focus("#timeline")
    page.evaluate("document.getElementById('video').pause()")
    page.keyboard.press("PageDown")
    page.wait_for_function("document.getElementById('video').currentTime < 0.1")


def test_a_picture_goes_to_its_moment_and_the_annotation_is_shaded(pages, opened):
    page = opened(pages["detection"])
    page.wait_for_function("document.getElementById('video').readyState >= 1")
    assert page.locator("#moments img").evaluate_all("(all) => all.map((one) => one.naturalWidth)") == [160, 160]
    page.click("#moments button >> nth=0")
    page.wait_for_function("Math.abs(document.getElementById('video').currentTime - 3.25) < 0.1")
    assert "anomaly 0.90" in page.inner_text("#readout") and page.locator("#segments tr.now").count() == 1
    page.click("#moments img >> nth=1")
    page.wait_for_function("Math.abs(document.getElementById('video').currentTime - 1.25) < 0.1")
    band, place = page.locator("#timeline rect.truth").bounding_box(), page.locator("#timeline").bounding_box()
    left, right = ((x - place["x"]) / place["width"] for x in (band["x"], band["x"] + band["width"]))
    assert (round(left, 2), round(right, 2)) == (0.25, 0.5)
    assert "annotated: fire 0:01.0 to 0:02.0" in page.inner_text("#legend")
    # A class has one colour: in the list, the curve and under the picture.
    shown = ["#segments .mark >> background-color", "#moments img >> border-bottom-color", "#timeline rect >> fill"]
    colours = [
        page.eval_on_selector(selector, f"(one) => getComputedStyle(one)['{name}']")
        for selector, name in (one.split(" >> ") for one in shown)
    ]
    assert len(set(colours)) == 1, colours


def test_one_gets_from_the_index_to_a_video_to_the_next_and_back(opened, tmp_path):
    names, rows = ["a", "deep/b #1", "c"], []
    for name in names:
        path = tmp_path / f"{name}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(detection_page(title=name, video=None), encoding="utf-8")
        record = {"verdict": "normal", "max_score": 0.1, "segments": [], "video": {"seconds": 3}}
        rows.append(index_row(name, record | {"thumbnail": thumbnail("grey")}))
    write_index(tmp_path, "three", [rows[0], index_row("broken", error="no video"), *rows[1:]])
    page = opened(tmp_path / "index.html")
    assert page.locator("#index img").evaluate_all("(all) => all.map((one) => one.naturalWidth)") == [160] * 3
    page.click("#index img >> nth=0")
    for step, title in [("next", names[1]), ("next", names[2]), ("previous", names[1]), ("all videos", "three")]:
        page.click(f"nav.pages >> text={step}")
        page.wait_for_function(f"document.title === {title!r}")


def test_video_that_cannot_be_played_leaves_curves_segments_and_classes_to_use(pages, opened):
    page = opened(pages["unplayable"])
    page.wait_for_selector("#unplayable", state="visible")
    assert not page.is_visible("#video") and "text.mp4" in page.inner_text("#unplayable")
    page.click("summary")
    assert page.locator("#classes label").all_inner_texts() == [HOSTILE, "normal", "fire"]
    assert len(curves(page, "#timeline")) == 1
    page.locator("#classes input").nth(2).check()
    assert len(curves(page, "#timeline")) == 2 and "fire 0.02" in page.inner_text("#readout")
    page.click("#segments button")
    assert float(page.get_attribute("#timeline", "aria-valuenow")) == 2
    assert "anomaly 0.90" in page.inner_text("#readout")


def test_index_sorts_and_leads_to_its_pages(pages, opened):
    page = opened(pages["index"], width=420)
    page.locator("#index th", has_text="highest score").locator("button").click()
    names = page.locator("#index tbody tr td:first-child").all_inner_texts()
    assert names[0] == "clip 29" and names[-1] == "x" * 150
    page.fill(".toolbar input", "clip 29")
    page.click("#index a:visible")
    page.wait_for_selector("#timeline")
