"""Tables as spreadsheets, pandas and other systems write them, and names as other programs change them."""

import codecs
from dataclasses import replace

import numpy as np
import pytest
from test_truth import ENTRIES, SNIPPETS, objects, released

from clipfusionvad.data.annotations import match_names, read_annotations
from clipfusionvad.data.lists import read_list, read_split
from clipfusionvad.data.truth import fitting_stride, read_truth
from clipfusionvad.datasets import UCF
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import walk_files

TABLE = "video,frames,label,start,end\nAbuse001,48,Abuse,5,20\nNormal_003,16,Normal,,\n"
PANDAS = ",video,frames,label,start,end\n0,Abuse001,48.0,Abuse,5.0,20.0\n1,Normal_003,16.0,Normal,nan,NaN\n"
TABLES = {
    "as documented": TABLE.encode(),
    "semicolons": TABLE.replace(",", ";").encode(),
    "tabs in UTF-16, as Excel writes": codecs.BOM_UTF16_LE + TABLE.replace(",", "\t").encode("utf-16-le"),
    "big-endian, with CRLF": codecs.BOM_UTF16_BE + TABLE.replace("\n", "\r\n").encode("utf-16-be"),
    "capitals": TABLE.replace("video,frames,label,start,end", "Video,Frames,LABEL,Start,End").encode(),
    "quoted header": TABLE.replace("video,frames,label,start,end", '"Video";"Frames";"Label";"Start";"End"')
    .replace(",", ";")
    .encode(),
    "pandas, with its index": PANDAS.encode(),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=list(TABLES))
def test_annotations_of_other_programs(tmp_path, content):
    path = tmp_path / "truth.csv"
    path.write_bytes(content)
    found = read_annotations(path, UCF)
    assert [(v.video, v.frames, v.segments) for v in found.values()] == [
        ("Abuse001", 48, [(5, 20)]),
        ("Normal_003", 16, []),
    ]


@pytest.mark.parametrize("line", ["Abuse001,Abuse,5,20,-1,-1", "Abuse001; Abuse; 5; 20", "Abuse001\tAbuse\t5.0\t20.0"])
def test_annotation_lines_with_other_separators(tmp_path, line):
    path = tmp_path / "truth.txt"
    path.write_text(line + "\n")
    assert read_annotations(path, UCF)["Abuse001"].segments == [(5, 20)]


def test_whole_numbers_of_pandas_and_json_are_read_and_others_refused(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text(TABLE.replace("20", "160.5"))
    with pytest.raises(UserError, match=r"truth.csv, row 2: '160.5' is not a whole number of frames"):
        read_annotations(path, UCF)
    event = '{"videos": [{"video_name": "Abuse001.mp4", "label": "Abuse", "num_frames": 48.0, "anomalous": [%s]}]}'
    path = tmp_path / "truth.json"
    path.write_text(event % '{"start_frame": 5.0, "end_frame": 19.0}')
    assert read_annotations(path, UCF)["Abuse001"].segments == [(5, 20)]
    path.write_text(event % '{"start_frame": 5.0, "end_frame": 19.5}')
    with pytest.raises(UserError, match="'19.5' is not a whole number"):
        read_annotations(path, UCF)
    segments = objects([[["5.0", "7.0"]], [["8", "9"], ["50", "60"]], [[0.0, 16.0]]])
    assert read_truth(*released(tmp_path, segments=segments), ENTRIES, SNIPPETS, UCF).segments[0] == [(5, 7)]


def test_text_of_another_encoding_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_bytes(TABLE.replace("Abuse001", "Überfall").encode("cp1252"))
    with pytest.raises(UserError, match="truth.csv is not a text file in UTF-8: save it as UTF-8"):
        read_annotations(path, UCF)
    # UTF-16 without its mark.
    path.write_bytes(TABLE.encode("utf-16-le"))
    with pytest.raises(UserError, match="truth.csv is not a text file in UTF-8: save it as UTF-8"):
        read_annotations(path, UCF)


def test_a_table_of_excel_in_a_language_with_decimal_commas(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("sep=;\n" + TABLE.replace(",", ";").replace("20", "20,0"))
    assert read_annotations(path, UCF)["Abuse001"].segments == [(5, 20)]
    path.write_text(path.read_text().replace("20,0", "20,5"))
    with pytest.raises(UserError, match="row 3: '20,5' is not a whole number of frames"):
        read_annotations(path, UCF)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_lists_of_windows(tmp_path, mark):
    (tmp_path / "rgb/Abuse").mkdir(parents=True)
    (tmp_path / "rgb/Abuse/Abuse001__0.npy").write_bytes(b"")
    (tmp_path / "list.csv").write_bytes(f"Path{mark}Label\nrgb\\Abuse\\Abuse001__0.npy{mark}Abuse\n".encode("utf-16"))
    (entry,) = read_list(tmp_path / "list.csv", dataset=UCF)
    assert (entry.path, entry.label) == (tmp_path / "rgb/Abuse/Abuse001__0.npy", "Abuse")
    (tmp_path / "split.csv").write_text(f"Label{mark}Video\nAbuse{mark}Abuse\\Abuse001.mp4\n")
    assert read_split(tmp_path / "split.csv") == {"Abuse001"}
    (tmp_path / "videos.txt").write_text("rgb\\Abuse\\Abuse001__0.npy\n")
    assert find_videos([tmp_path / "videos.txt"]) == [(str(entry.path), "Abuse/Abuse001__0")]


def test_shadow_files_of_macos_are_not_files(tmp_path):
    for name in ("a.npy", "._a.npy", "__MACOSX/x/._a.npy", ".hidden.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in walk_files(tmp_path, ".npy")] == [".hidden.npy", "a.npy"]


def test_names_that_differ_by_usual_endings():
    names = ["Abuse001_x264", "Arson002_x264", "Normal_Videos_003_x264", "v=a__#1", "Robbery004"]
    present = [
        "Abuse001",
        "arson002_x264_i3d",
        "Normal_Videos003_x264",
        "v=a__#1.mp4",
        "Robbery004_rgb",
        "Robbery004-i3d",
    ]
    matched = {"Abuse001_x264": "Abuse001", "Arson002_x264": "arson002_x264_i3d", "v=a__#1": "v=a__#1.mp4"}
    # Two features of one video, and a name with another underscore, are not guessed.
    assert match_names(names, present) == matched
    # Equal names come first.
    assert match_names(["gate", "gate_clip"], ["gate_clip", "gate"]) == {"gate": "gate", "gate_clip": "gate_clip"}


@pytest.mark.parametrize(
    "known, size, fitting",
    [
        ([(1600, 100), (805, 50)], 1, 16),
        ([(100, 100), (51, 51)], 16, 1),
        ([(1000, 100), (492, 50)], 16, 10),
        ([(3200, 100), (60, 2)], 16, 32),
        ([(60, 8)], 16, 8),
        ([(1600, 100), (1000, 62)], 16, None),
        # 32 rows for each video: no number fits.
        ([(1600, 32), (9000, 32)], 16, None),
        # A video whose last frames were not decoded.
        ([(1700, 100)], 16, None),
    ],
)
def test_a_common_factor_is_found(known, size, fitting):
    assert fitting_stride(known, size) == fitting


def test_truth_that_is_a_multiple_of_the_features_names_the_option(tmp_path, capsys):
    path = tmp_path / "truth.csv"
    rows = "Abuse001,320,Abuse,5,9\nArson002,480,Arson,0,1\nNormal_003,,Normal,,\n"
    path.write_text("video,frames,label,start,end\n" + rows)
    snippets = [20, 30, 10]
    truth = read_truth(path, None, None, ENTRIES, snippets, UCF, 16)
    assert [len(frames) for frames in truth.frames] == [320, 480, 160] and capsys.readouterr().err == ""
    for used, factor in ((1, "16"), (8, "2"), (32, "0.5"), (160, "0.1")):
        with pytest.raises(UserError, match=f"{factor} times .* all 2 videos: give --frames-per-snippet 16 "):
            read_truth(path, None, None, ENTRIES, snippets, UCF, used)
    arrays = released(tmp_path, frames=np.zeros(16 * 60), segments=objects([[[5, 9]], [[0, 1]] * 2, [[0, 160]]]))
    for used in (1, 8, 32):
        with pytest.raises(UserError, match="give --frames-per-snippet 16, which fits every row"):
            read_truth(*arrays, ENTRIES, snippets, UCF, used)


def test_keyed_truth_finds_videos_by_usual_endings_and_shows_both_names_otherwise(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("video,label,start,end\nAbuse001_x264,Abuse,5,9\nArson002.mp4,Arson,0,1\n")
    entries = [replace(entry, path=entry.path.with_name(f"{entry.video}_i3d__5.npy")) for entry in ENTRIES]
    truth = read_truth(path, None, None, entries, SNIPPETS, UCF)
    assert truth.segments == [[(5, 9)], [(0, 1)], [(0, 16)]]
    entries = [replace(entry, path=entry.path.with_name(f"x{entry.video}__5.npy")) for entry in ENTRIES]
    with pytest.raises(UserError, match=r"first is xAbuse001 .*; the first video in the file is Abuse001_x264"):
        read_truth(path, None, None, entries, SNIPPETS, UCF)
