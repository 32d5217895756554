"""Names and texts at the edges: bytes that are not UTF-8, encodings that lack a letter, scripts without a font."""

import io
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from made_videos import write_video
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from small_detect import detect, write_model
from small_report import made_test, write_test
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.datasets import UCF
from clipfusionvad.extraction.jobs import FeatureManifest, find_videos
from clipfusionvad.io.errors import UserError, run_main
from clipfusionvad.io.files import write_csv
from clipfusionvad.report.fonts import drawing, font_file, fonts_for
from clipfusionvad.report.plots import save_figure
from clipfusionvad.tools.detect import page

GBK = os.fsdecode("黑色".encode("gbk"))
BAD = {GBK: "bytes that are not UTF-8", "a\nb": "control characters", "长" * 80: "longer than 220 bytes"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos with good names, of which one comes last, and videos with names that cannot be those of results."""
    folder = tmp_path_factory.mktemp("videos")
    first = write_video(folder / "a.mp4", 20)
    for name in [*BAD, "黑色", "📹 z"]:
        (folder / f"{name}.mp4").write_bytes(first.read_bytes())
    return folder


def test_detect_reports_a_bad_name_in_one_line_and_scores_the_others(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "draw_scores", lambda *args: None)
    write_model(tmp_path / "model.pt", "vadclip")
    outcome = detect([videos, "--checkpoint", tmp_path / "model.pt", "--device", "cpu", "--output", tmp_path / "out"])
    assert outcome.code == 1
    *errors, count = outcome.err.splitlines()
    assert count == "3 of 6 failed" and len(errors) == 3 and all(line.isprintable() for line in errors)
    for why in BAD.values():
        assert any("cannot be the name of its results" in line and why in line for line in errors)
    assert [path.stem for path in sorted((tmp_path / "out").glob("*.json"))] == ["a", "黑色", "📹 z"]
    assert (tmp_path / "out/index.csv").read_text(encoding="utf-8").count("cannot be the name") == 3
    assert len(list((tmp_path / "out").glob("*_seconds.csv"))) == 3


def test_extract_and_lists_leave_out_bad_names_and_go_on(videos, tmp_path):
    argv = ["extract", "--videos", videos, "--output", tmp_path / "train/Abuse", "--clip", "toy", "--device", "cpu"]
    outcome = quietly(main, strings(argv, ["--crops", 1]))
    assert outcome.code == 1 and outcome.err.count("failed: ") == 3 and "3 of 6 videos failed" in outcome.err
    made = sorted((tmp_path / "train/Abuse").glob("*.npy"))
    assert [path.stem for path in made] == ["a__0", "黑色__0", "📹 z__0"]
    (tmp_path / f"train/Abuse/{GBK}__0.npy").write_bytes(made[0].read_bytes())
    outcome = quietly(
        main, strings(["lists", "--dataset", "ucf"], ["--features", tmp_path / "train"], ["--output", tmp_path])
    )
    assert outcome.code == 0 and "1 files left out because their names have control characters" in outcome.err
    assert (tmp_path / "ucf_CLIP_rgb.csv").read_text(encoding="utf-8").count("Abuse\n") == 3


def test_a_manifest_with_a_failed_video_gives_the_others(tmp_path):
    manifest = FeatureManifest(tmp_path)
    for name in (GBK, "good"):
        manifest.append(name, "begun", {"source": f"{name}.mp4"})
    assert find_videos([tmp_path / "manifest.jsonl"]) == [("good.mp4", "good")]


def test_convert_features_names_an_array_whose_name_is_not_text(tmp_path):
    for name in (GBK, "good"):
        np.save(tmp_path / f"{name}.npy", np.zeros((3, 512), np.float32))
    outcome = quietly(main, ["convert-features", str(tmp_path), str(tmp_path / "out")])
    assert outcome.code == 0 and "1 arrays" in outcome.err and "'??ɫ' has" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.npy"]


def test_a_table_is_not_written_with_a_name_that_is_not_text(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*t.csv: bytes that are not UTF-8 are in '\\udcba.*,Abuse'"):
        write_csv(tmp_path / "t.csv", ["video", "label"], [["a", "Normal"], [GBK, "Abuse"]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_what_an_encoding_lacks_is_replaced(encoding, monkeypatch):
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(streams[name], encoding=encoding, write_through=True))

    def body():
        print("黑色 📹 é")
        raise UserError("no video 火灾 ก")

    assert run_main(body) == 2
    assert streams["stdout"].getvalue().decode(encoding).count("?") == {"ascii": 4, "cp1252": 3, "gbk": 1}[encoding]
    assert streams["stderr"].getvalue().startswith(b"error: no video ")


def test_a_program_ends_well_where_the_log_file_is_ascii(tmp_path):
    """Also with file names that arrive as bytes, in a locale without UTF-8."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.getcwd()}
    (tmp_path / "视频").mkdir()
    command = [sys.executable, "-m", "clipfusionvad", "extract", "--videos", ".", "--output", "out", "--clip", "toy"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: no videos") and done.stderr.count(b"\n") == 1
    done = subprocess.run([*command[:3], "detect", "--help"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"v4l2, dshow, ?" in done.stdout


@pytest.fixture
def han_font(tmp_path, monkeypatch):
    """A font with two letters, installed during a test after matplotlib has listed the fonts, and a broken one."""
    glyphs = {".notdef": None, "black": "黑", "colour": "色"}
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 900))
    pen.lineTo((900, 0))
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord(letter): name for name, letter in glyphs.items() if letter})
    font.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Test Han", "styleName": "Regular", "psName": "TestHan"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "han.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    found = [str(tmp_path / name) for name in ("broken.ttf", "han.ttf")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
    fonts_for.cache_clear()
    font_file.cache_clear()
    yield "Test Han"
    fonts_for.cache_clear()
    font_file.cache_clear()


def figure_of(title, tick):
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    axis.set_title(title)
    axis.set_xticks([0, 1], [tick, "b"])
    return figure


def test_an_installed_font_draws_the_letters_that_the_usual_one_lacks(han_font, tmp_path):
    assert fonts_for("normal·é") == () and fonts_for("a黑色") == (han_font,)
    figure = figure_of("video 黑", "色")
    with drawing(figure):
        assert figure.axes[0].title.get_fontfamily()[-1] == han_font
        assert figure.axes[0].get_xticklabels()[0].get_fontfamily()[-1] == han_font
    for suffix in ("png", "pdf", "svg"):
        save_figure(figure, tmp_path / f"figure.{suffix}")
    assert "TestHan" in (tmp_path / "figure.pdf").read_bytes().decode("latin-1")
    assert font_file("0.93 黑") == str(tmp_path / "han.ttf") and "DejaVuSans" in font_file("0.93 é")
    plain = figure_of("video", "a")
    with drawing(plain):
        assert han_font not in plain.axes[0].title.get_fontfamily()


def test_no_warning_where_no_font_has_the_letters(tmp_path, recwarn):
    warnings.simplefilter("always")
    save_figure(figure_of("\U000e0041 黑色 한국 العربية", "ก" * 300), tmp_path / "figure.png")
    assert not recwarn.list and (tmp_path / "figure.png").stat().st_size > 1000


def test_names_with_other_letters_and_dollar_signs_in_every_figure(tmp_path, recwarn):
    names = {"正常": "normal", "火灾$x$": "fire", "打架$\\q$": "fight"}
    scores, videos = made_test(dataset=replace(UCF, name="own", title="中文 $\\q$", classes=names))
    write_test(tmp_path / "test", scores, videos)
    for argv in (["report", "--formats", "png"], ["insight", "classes", "--output", tmp_path / "classes.png"]):
        split = 2 if argv[0] == "insight" else 1
        outcome = quietly(main, strings(argv[:split], [tmp_path / "test"], argv[split:]))
        assert outcome.code == 0 and not outcome.err
    assert "火灾$x$" in (tmp_path / "test/report.html").read_text(encoding="utf-8")
    assert not recwarn.list


def test_powers_on_a_logarithmic_axis_stay_formulas(tmp_path):
    figure = figure_of("a", "b")
    figure.axes[0].set_yscale("log")
    figure.axes[0].set_ylim(1, 1000)
    save_figure(figure, tmp_path / "figure.svg")
    assert "mathdefault{10^" in figure.axes[0].get_yticklabels()[1].get_text()
    assert all(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
