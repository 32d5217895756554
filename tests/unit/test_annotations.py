"""Every annotation format, and every way in which a file can be wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfusionvad.data.annotations import Annotation, join_pieces, read_annotations, video_key, write_annotations_csv
from clipfusionvad.datasets import MSAD, SHANGHAITECH, UCF, XD
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


def test_video_key():
    for name in ("a.b__#1", "a.b__#1.mp4", "Abuse/a.b__#1.MP4", "C:\\x\\a.b__#1.avi", " /x/a.b__#1.mkv "):
        assert video_key(name) == "a.b__#1"


XD_MIXED = "M__#2_label_B2-G-0"
SPANS = [(5, 9), (7, 20), (30, 31)]
UNUSED = " -1 -1" * 5
# name: (dataset, content, segments, labels, frames and label of each video)
FORMATS = {
    "UCF": (
        UCF,
        "Abuse028_x264  Abuse  165  240  -1  -1  \r\nArson011_x264.mp4\tArson\t150\t420\t680\t1267\n"
        "\nNormal_Videos_003_x264  Normal  -1  -1  -1  -1  ",
        {
            "Abuse028_x264": ([(165, 240)], ["Abuse"], None, "Abuse"),
            "Arson011_x264": ([(150, 420), (680, 1267)], ["Arson"] * 2, None, "Arson"),
            "Normal_Videos_003_x264": ([], [], None, "Normal"),
        },
    ),
    "the same line twice": (
        UCF,
        "Abuse1 Abuse 1 2\nAbuse1.mp4 Abuse 1 2 -1 -1\n",
        {"Abuse1": ([(1, 2)], ["Abuse"], None, "Abuse")},
    ),
    "XD": (
        XD,
        f"v=x__#1_label_B4-0-0.mp4 0 1517 1970 3038\n{XD_MIXED} 5 9\n",  # every code of the name
        {"v=x__#1_label_B4-0-0": ([(0, 1517), (1970, 3038)], ["B4", "B4"]), XD_MIXED: ([(5, 9), (5, 9)], ["B2", "G"])},
    ),
    "XD with classes": (
        XD,
        f"{XD_MIXED} B2 5 9 G 7 20 B2 30 31\n",
        {XD_MIXED: (SPANS, ["B2", "G", "B2"], None, "B2-G")},
    ),
    "ShanghaiTech": (
        SHANGHAITECH,
        f"01_001.avi normal{UNUSED}\n01_0028.avi robbery 266 328 330 330{UNUSED}\n",
        {"01_001": ([], [], None, "normal"), "01_0028": ([(266, 328)], ["robbery"], None, "robbery")},
    ),
    "MSAD, lines name the scene and not the class": (
        MSAD,
        "Fire_8.mp4  office  1  300  -1  -1  \nMSAD_normal_testing_1.mp4  Normal  -1  -1  -1  -1  \nFire_9 3 5",
        {"Fire_8": ([(1, 300)], ["Fire"]), "MSAD_normal_testing_1": (), "Fire_9": ([(3, 5)], ["Fire"])},
    ),
    "CSV, recognised by its header": (
        UCF,
        "video, frames,label,start,end\nx/a.mp4,100,Abuse,1,2\nb,,,,\nc, ,normal,,\na,100,abuse,50,70\n",
        {"a": ([(1, 2), (50, 70)], ["Abuse"] * 2, 100, "Abuse"), "b": (), "c": ([], [], None, "Normal")},
    ),
    "JSON, ends are inclusive": (
        UCF,
        "\ufeff" + as_json(video("a.mp4", "Assault", 50, [(3, 3), (10, 19)]), video("n.mp4", "Normal", 20, ())),
        {"a": ([(3, 4), (10, 20)], ["Assault"] * 2, 50, "Assault"), "n": ([], [], 20, "Normal")},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_by_its_content(tmp_path, name):
    dataset, content, expected = FORMATS[name]
    expected = {video: Annotation(video, *parts) for video, parts in expected.items()}
    for file in ("truth.txt", "truth.csv") if "CSV" in name else ("truth.txt", "truth"):
        assert read(tmp_path, content, dataset, file) == expected


def test_pieces_are_joined_and_other_datasets_have_none(tmp_path):
    text = "01_001 normal\n05_0023_0.avi jumping 171 272\n05_0023_1.avi push 337 424 500 510\n05_0024 car 1 2\n"
    joined = join_pieces(read(tmp_path, text, SHANGHAITECH), SHANGHAITECH)
    labels = ["jumping", "push", "push"]
    whole = Annotation("05_0023", [(171, 272), (337, 424), (500, 510)], labels, None, "jumping")
    assert list(joined) == ["01_001", "05_0023", "05_0024"] and joined["05_0023"] == whole
    write_annotations_csv(tmp_path / "again.csv", joined.values())
    assert read_annotations(tmp_path / "again.csv", SHANGHAITECH) == joined
    annotations = {name: Annotation(name) for name in ("05_0023_0", "Fire_1_2", "v=x__#1_label_A")}
    for dataset in (UCF, XD, MSAD):
        assert join_pieces(annotations, dataset) == annotations


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
        ("Abuse1 Abuse 1 2\n\nAbuse1 Abuse 1 3\n", ["line 3", "second annotation"]),
        ("Abuse1 Abusive 1 2\n", ["line 1", "'Abusive'", "did you mean 'Abuse'"]),
        ("Normal_Videos_1 Normal 1 2\n", ["line 1", "Normal", "1 2"]),
        (".mp4 Abuse 1 2\n", ["line 1", "name of the video is empty"]),
        ("video1 1 2\n", ["line 1", "names the class"]),
        ("Abuse/Abuse028_x264.mp4\nAbuse/Abuse030_x264.mp4\n", ["line 1", "no interval"]),
        (("01_0028.avi robbery 330 330\n", SHANGHAITECH), ["line 1", "no interval"]),
        (("office8.mp4 Fire 1 300\n", MSAD), ["line 1", "names the class"]),
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
        (as_json(video(), video(frames=99)), ["video 2", "second annotation"]),
        ("[" * 100_000, ["JSON"]),
    ],
)
def test_malformed_files_name_the_place(tmp_path, content, parts):
    with pytest.raises(UserError) as caught:
        read(tmp_path, *content) if isinstance(content, tuple) else read(tmp_path, content)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in [*parts, str(tmp_path / "annotations.txt")]), text


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
