"""Every annotation format, and every way in which a file can be wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.annotations import Annotation, join_pieces, read_annotations, video_key, write_annotations_csv
from clipfusionvad.datasets import DATASETS, MSAD, SHANGHAITECH, UCF, XD
from clipfusionvad.io.errors import UserError


def read(tmp_path, content, dataset=UCF, name="annotations.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_annotations(path, dataset)


def as_json(*videos):
    return json.dumps({"videos": list(videos)})


def video(name="a", label="Abuse", frames=100, events=((1, 2),)):
    anomalous = [{"start_frame": start, "end_frame": end} for start, end in events]
    return {"video_name": name, "label": label, "num_frames": frames, "anomalous": anomalous}


@pytest.mark.parametrize(
    "name", ["a.b__#1", "a.b__#1.mp4", "Abuse/a.b__#1.MP4", "C:\\x\\a.b__#1.avi", " /x/a.b__#1.mkv "]
)
def test_video_key(name):
    assert video_key(name) == "a.b__#1"


def test_ucf_lines(tmp_path):
    found = read(
        tmp_path,
        "Abuse028_x264  Abuse  165  240  -1  -1  \r\nArson011_x264.mp4\tArson\t150\t420\t680\t1267\n"
        "\nNormal_Videos_003_x264  Normal  -1  -1  -1  -1  ",
    )
    assert found == {
        "Abuse028_x264": Annotation("Abuse028_x264", [(165, 240)], ["Abuse"], None, "Abuse"),
        "Arson011_x264": Annotation("Arson011_x264", [(150, 420), (680, 1267)], ["Arson"] * 2, None, "Arson"),
        "Normal_Videos_003_x264": Annotation("Normal_Videos_003_x264", label="Normal"),
    }


SPANS = [(5, 9), (7, 20), (30, 31)]


@pytest.mark.parametrize(
    "name, rest, expected",
    [
        ("v=x__#1_label_B4-0-0", ".mp4 0 1517 1970 3038", ([(0, 1517), (1970, 3038)], ["B4", "B4"])),
        ("M__#2_label_B2-G-0", " 5 9", ([(5, 9), (5, 9)], ["B2", "G"])),  # every code of the name
        ("M__#2_label_B2-G-0", " B2 5 9 G 7 20 B2 30 31", (SPANS, ["B2", "G", "B2"], None, "B2-G")),
    ],
)
def test_xd_lines(tmp_path, name, rest, expected):
    assert read(tmp_path, f"{name}{rest}\n", XD) == {name: Annotation(name, *expected)}


def test_shanghaitech_lines(tmp_path):
    padding = " -1 -1" * 5
    text = f"01_001.avi normal{padding}\n01_0028.avi robbery 266 328 330 330{padding}\n"
    assert read(tmp_path, text, SHANGHAITECH) == {
        "01_001": Annotation("01_001", label="normal"),
        "01_0028": Annotation("01_0028", [(266, 328)], ["robbery"], None, "robbery"),
    }
    with pytest.raises(UserError, match="no interval"):
        read(tmp_path, "01_0028.avi robbery 330 330\n", SHANGHAITECH)


def test_msad_lines_name_the_scene_not_the_class(tmp_path):
    text = "Fire_8.mp4  office  1  300  -1  -1  \nMSAD_normal_testing_1.mp4  Normal  -1  -1  -1  -1  \nFire_9 3 5"
    assert read(tmp_path, text, MSAD) == {
        "Fire_8": Annotation("Fire_8", [(1, 300)], ["Fire"]),
        "MSAD_normal_testing_1": Annotation("MSAD_normal_testing_1"),
        "Fire_9": Annotation("Fire_9", [(3, 5)], ["Fire"]),
    }
    with pytest.raises(UserError, match="names the class"):
        read(tmp_path, "office8.mp4 Fire 1 300\n", MSAD)


def test_pieces_are_joined(tmp_path):
    text = "01_001 normal\n05_0023_0.avi jumping 171 272\n05_0023_1.avi push 337 424 500 510\n05_0024 car 1 2\n"
    joined = join_pieces(read(tmp_path, text, SHANGHAITECH), SHANGHAITECH)
    labels = ["jumping", "push", "push"]
    whole = Annotation("05_0023", [(171, 272), (337, 424), (500, 510)], labels, None, "jumping")
    assert list(joined) == ["01_001", "05_0023", "05_0024"] and joined["05_0023"] == whole
    again = tmp_path / "again.csv"
    write_annotations_csv(again, joined.values())
    assert read_annotations(again, SHANGHAITECH) == joined


@pytest.mark.parametrize("dataset", [UCF, XD, MSAD], ids=lambda dataset: dataset.name)
def test_other_datasets_have_no_pieces(dataset):
    annotations = {name: Annotation(name) for name in ("05_0023_0", "Fire_1_2", "v=x__#1_label_A")}
    assert join_pieces(annotations, dataset) == annotations


@pytest.mark.parametrize("name", ["truth.csv", "truth.txt"])
def test_csv_is_recognised_by_its_header(tmp_path, name):
    text = "video, frames,label,start,end\nx/a.mp4,100,Abuse,1,2\nb,,,,\nc, ,normal,,\na,100,abuse,50,70\n"
    assert read(tmp_path, text, name=name) == {
        "a": Annotation("a", [(1, 2), (50, 70)], ["Abuse"] * 2, 100, "Abuse"),
        "b": Annotation("b"),
        "c": Annotation("c", label="Normal"),
    }


def test_json_ends_are_inclusive(tmp_path):
    normal = video("n.mp4", "Normal", 20, ())
    found = read(tmp_path, "\ufeff" + as_json(video("a.mp4", "Assault", 50, [(3, 3), (10, 19)]), normal))
    assert found == {
        "a": Annotation("a", [(3, 4), (10, 20)], ["Assault"] * 2, 50, "Assault"),
        "n": Annotation("n", [], [], 20, "Normal"),
    }


def test_the_same_line_twice_is_one_video(tmp_path):
    assert len(read(tmp_path, "Abuse1 Abuse 1 2\nAbuse1.mp4 Abuse 1 2 -1 -1\n")) == 1


CSV = "video,frames,label,start,end\n"


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ["is empty"]),
        (" \n\n", ["is empty"]),
        (b"\x93NUMPY\x01\x00", ["not a text file"]),
        (b"\x00\x01", ["not a text file"]),
        ("Abuse1 Abuse 1 2\nAbuse2 Abuse 1 2 3\n", ["line 2", "odd"]),
        ("Abuse1 Abuse 1 2.5\n", ["line 1", "'2.5'"]),
        ("Abuse1 Abuse 1 1e3\n", ["line 1", "'1e3'"]),
        ("Abuse1 Abuse -5 7\n", ["line 1", "-5 7"]),
        ("Abuse1 Abuse 5 -1\n", ["line 1", "5 -1"]),
        ("Abuse1 Abuse 7 7\n", ["line 1", "7 7", "ends before"]),
        ("Abuse1 Abuse 9 7\n", ["line 1", "9 7"]),
        ("Abuse1 Abuse 1 2\n\nAbuse1 Abuse 1 3\n", ["line 3", "second time"]),
        ("Abuse1 Abusive 1 2\n", ["line 1", "'Abusive'", "did you mean 'Abuse'"]),
        ("Normal_Videos_1 Normal 1 2\n", ["line 1", "Normal", "1 2"]),
        (".mp4 Abuse 1 2\n", ["line 1", "name of the video is empty"]),
        ("video1 1 2\n", ["line 1", "names the class"]),
        ("Abuse/Abuse028_x264.mp4\nAbuse/Abuse030_x264.mp4\n", ["line 1", "no interval"]),
        (CSV, ["no videos"]),
        (CSV + ",,Abuse,1,2\n", ["row 2", "video is empty"]),
        (CSV + "a,,Abuse,1,\n", ["row 2", "''"]),
        (CSV + "a,,Abuse,x,2\n", ["row 2", "'x'"]),
        (CSV + "a,,Abuse,2,1\n", ["row 2", "2 1"]),
        (CSV + "a,,Abuse,-1,-1\n", ["row 2", "-1 -1"]),
        (CSV + "a,0,Abuse,1,2\n", ["row 2", "'0'"]),
        (CSV + "a,1000000000000,Abuse,1,2\n", ["row 2", "1000000000000"]),
        (CSV + "a,,Abuze,1,2\n", ["row 2", "'Abuze'"]),
        (CSV + "a,,,1,2\n", ["row 2", "names the class"]),
        (CSV + "a,,Abuse,,\n", ["row 2", "no interval"]),
        (CSV + "a,10,Abuse,1,2\na,11,Abuse,5,6\n", ["row 3", "11 frames", "10"]),
        (CSV + "b,,,,\nb,,Abuse,5,6\n", ["row 3", "without one"]),
        ("video,label,start\na,Abuse,1\n", ["'end'"]),
        ('{"videos": [\n{]}', ["line 2", "JSON"]),
        ("[1, 2]", ["'videos'"]),
        ('{"videos": {}}', ["'videos'"]),
        ('{"videos": []}', ["no videos"]),
        ('{"videos": [3]}', ["video 1", "'video_name'"]),
        (as_json(video(), video("b", "Abuze")), ["video 2", "'Abuze'"]),
        (as_json(video(frames=0)), ["video 1", "'0'"]),
        (as_json(video(frames=1.5)), ["video 1", "'1.5'"]),
        (as_json(video(events=[(5, 3)])), ["video 1", "ends before"]),
        (as_json(video(events=[(5, "7")])), ["video 1", "'end_frame'"]),
        (as_json(video(events=[(5, True)])), ["video 1", "'end_frame'"]),
        (as_json(video(label="Normal")), ["video 1", "Normal"]),
        (as_json(video(events=[])), ["video 1", "no interval"]),
        (as_json(video(), video(frames=99)), ["video 2", "second time"]),
        ("[" * 100_000, ["JSON"]),
    ],
)
def test_malformed_files_name_the_place(tmp_path, content, parts):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in [*parts, str(tmp_path / "annotations.txt")]), text


@given(st.text(max_size=80))
def test_no_text_makes_the_parser_crash(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for dataset in DATASETS.values():
        try:
            read_annotations(path, dataset)
        except UserError as error:
            assert str(path) in str(error)


SEGMENTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 500), st.sampled_from(XD.labels[1:])).map(
        lambda drawn: ((drawn[0], drawn[0] + drawn[1]), drawn[2])
    ),
    max_size=4,
)


@given(st.dictionaries(st.integers(0, 20), st.tuples(SEGMENTS, st.none() | st.integers(1, 10**6)), min_size=1))
def test_csv_round_trip(tmp_path_factory, drawn):
    annotations = {}
    for number, (events, frames) in drawn.items():
        name = f'v="{number}", #1'
        label = "-".join(dict.fromkeys(code for _, code in events)) or "A"
        annotations[name] = Annotation(name, [s for s, _ in events], [code for _, code in events], frames, label)
    path = tmp_path_factory.getbasetemp() / "round.csv"
    write_annotations_csv(path, annotations.values())
    assert read_annotations(path, XD) == annotations
