"""The app in Chromium: what its page shows and lets download is what ``detect`` writes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made_videos import write_video
from small_detect import detect, write_model
from test_browser import FLAGS, NEEDED, PROGRAM
from test_build_lists import SHARED
from tiny import quietly

from clipfusionvad.__main__ import main as package_main

ROOT = Path(__file__).resolve().parents[2]
REAL = SHARED / "data/ucf_clips/Fighting033_x264.mp4"
CLIPS = [
    "made",
    pytest.param("real", marks=pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")),
]


def app(*flags):
    return quietly(package_main, ["app", *map(str, flags)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, a video and a file that is not one."""
    folder = tmp_path_factory.mktemp("app")
    write_model(folder / "vadclip.pt", "vadclip")
    write_model(folder / "other.pt", "clipfusionvad")
    write_video(folder / "my film #1.mp4", 300)
    # Its number of frames is unknown before the end.
    (folder / "long.h264").write_bytes(40 * write_video(folder / "short.h264", 150).read_bytes())
    (folder / "notes.mp4").write_text("not a video")
    return folder


def test_missing_package_wrong_checkpoint_and_taken_port_are_one_line(place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setitem(sys.modules, "gradio", None)
        missing = app("--checkpoint", place / "vadclip.pt")
        monkeypatch.setitem(sys.modules, "gradio", object())
        port = taken.getsockname()[1]
        in_use = app("--checkpoint", place / "vadclip.pt", "--port", port)
    wrong = app("--checkpoint", place / "vadclip.pt", place / "notes.mp4", "--port", port)
    says = "pip install gradio", f"127.0.0.1:{port} (Address already in use): pass another --port", "notes.mp4"
    for outcome, words in zip((missing, in_use, wrong), says, strict=True):
        assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
        assert words in outcome.err


@pytest.fixture(scope="module")
def served(place):
    """The address of a running app. Ctrl-C ends it with code 0, without an error and without a file that is left."""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install gradio")
    if PROGRAM is None:
        pytest.skip(NEEDED)
    (place / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["app", "--checkpoint", place / "vadclip.pt", place / "other.pt", "--device", "cpu", "--port", port]
    with open(place / "log", "w") as log:
        program = subprocess.Popen(
            [sys.executable, "-m", "clipfusionvad", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT)},
        )
    first = program.stdout.readline()
    assert f"http://127.0.0.1:{port}/" in first, (first, (place / "log").read_text())
    yield f"http://127.0.0.1:{port}/"
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 0 and not list((place / "tmp").iterdir())
    assert "Traceback" not in (place / "log").read_text()


@pytest.fixture
def page(served, playwright_page):
    """The app's page; at the end no script may have failed and nothing been fetched from elsewhere."""
    problems = []
    playwright_page.on("pageerror", lambda error: problems.append(str(error)))
    playwright_page.on(
        "request", lambda one: one.url.startswith((served, "data:", "blob:")) or problems.append(one.url)
    )
    playwright_page.goto(served)
    yield playwright_page
    assert problems == []


@pytest.fixture
def playwright_page():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def drop(page, video):
    if page.locator("[aria-label=Clear]").count():
        page.click("[aria-label=Clear]")
    page.set_input_files("input[type=file]", video)


def downloaded(page, name):
    with page.expect_download() as download:
        page.get_by_role("link", name=name, exact=True).click()
    assert download.value.suggested_filename == name
    return Path(download.value.path()).read_bytes()


def same_as_detect(page, folder, stem):
    """Compare the files, and the rows of the shown page, with those that ``detect`` wrote."""
    expected, got = json.loads((folder / f"{stem}.json").read_text()), json.loads(downloaded(page, f"{stem}.json"))
    for own in "pages", "annotated", "file":
        del expected["settings"][own]
    assert got["video"].pop("path") == Path(expected["video"].pop("path")).name
    assert got == expected
    for ending in ".csv", "_seconds.csv", "_segments.csv":
        assert downloaded(page, f"{stem}{ending}") == (folder / f"{stem}{ending}").read_bytes()
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS)
def test_a_dropped_video_shows_and_gives_what_detect_writes(clip, page, place, tmp_path):
    video = REAL if clip == "real" else place / "my film #1.mp4"
    drop(page, video)
    result = page.frame_locator("iframe")
    result.locator("#timeline polyline").first.wait_for()
    flags = [video, "--checkpoint", place / "vadclip.pt", "--device", "cpu"]
    assert detect([*flags, "--output", tmp_path]).code == 0
    expected = same_as_detect(page, tmp_path, video.stem)
    shown = result.locator("#segments tbody tr")
    assert shown.count() == len(expected["segments"]) and result.locator(".moments img").count()
    result.locator("#video").evaluate(
        "film => new Promise(done => film.readyState ? done() : film.onloadeddata = done)"
    )
    timeline = result.locator("#timeline")
    timeline.click(position={"x": timeline.bounding_box()["width"] / 2, "y": 50})
    middle = expected["video"]["seconds"] / 2
    assert abs(result.locator("#video").evaluate("film => film.currentTime") - middle) < 0.02 * middle

    # A threshold between the scores: other segments, without scoring again.
    scores = expected["snippets"]["anomaly"]
    high = round(sorted(scores)[len(scores) // 2], 2)
    slider = page.get_by_label("number input for Threshold")
    slider.fill(str(high))
    result.get_by_text(f"threshold {high:.3g}", exact=True).wait_for()
    low = page.get_by_label("number input for Low threshold")
    low.fill("1")
    page.wait_for_function("high => document.querySelector('[aria-label*=\"for Low\"]').value == high", arg=high)
    page.wait_for_timeout(1500)
    flags += ["--threshold", high, "--low-threshold", high, "--output", tmp_path / "moved"]
    assert detect(flags).code == 0
    moved = same_as_detect(page, tmp_path / "moved", video.stem)
    assert moved["segments"] != expected["segments"]


@pytest.mark.slow
def test_not_a_video_is_said_in_the_page_and_a_long_one_can_be_stopped(page, place):
    page.get_by_role("button", name="Detect").click()
    page.get_by_text("Choose a video first.").wait_for()
    drop(page, place / "notes.mp4")
    page.get_by_text("notes.mp4 is not a video").wait_for()
    assert str(place) not in page.inner_text("[role=alert]")
    drop(page, place / "long.h264")
    page.get_by_text("frames |").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("frames |").wait_for(state="hidden")
    # The next one need not wait for the rest of it.
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="other.pt").click()
    drop(page, place / "my film #1.mp4")
    page.frame_locator("iframe").get_by_role("heading", name="my film #1 · other.pt").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_looks(page, place, tmp_path, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    drop(page, place / "my film #1.mp4")
    page.frame_locator("iframe").locator("#timeline").wait_for()
    page.wait_for_timeout(1000)
    height = page.locator("iframe").bounding_box()["height"]
    assert page.frame_locator("iframe").locator("html").evaluate("all => all.scrollHeight") <= height + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"app_{scheme}_{width}.png"
    page.screenshot(path=picture, full_page=True)
