"""ShanghaiTech and MSAD: lists and truth as released (paper) and put right (clean), and what else is chosen."""

import csv
from pathlib import Path

import numpy as np
import pytest
from test_build_lists import SHARED, doctor_quirks, needs_shared, rows_of, run, save, stems

from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.data.lists import read_list
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import MSAD, SHANGHAITECH, XD
from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.demo import demo_folder, make_demo
from clipfusionvad.tools.lists import ListsConfig, Video, split_videos

CROPS = (0, 5)
# A test video as released, one in two pieces, a normal one, and training videos.
SHANGHAITECH_VIDEOS = ["fall/03_0032", "vehicle/04_0012", "normal/01_001", "normal/02_002", "running/01_0029"]
SHANGHAITECH_TEXT = (
    "01_001.avi normal -1 -1 -1 -1\n03_0032.avi fall 4 9 9 9\n"
    "04_0012_0.avi vehicle 0 7 -1 -1\n04_0012_1.avi circuit 8 20 -1 -1\n"
)
MSAD_VIDEOS = ["Robbery/Robbery_2", "Robbery/Robbery_10", "Robbery/Robbery_9", "Normal/MSAD_normal_testing_1"]
MSAD_VIDEOS += ["Normal/frontdoor1", "Water_incident/Water_incident_1"]
MSAD_TEXT = (
    "Robbery_2.mp4  shop  7  12  -1  -1  \nMSAD_normal_testing_1.mp4  Normal  -1  -1  -1  -1  \n"
    "Robbery_10.mp4  shop  1  21  -1  -1"
)


def make(folder, videos, text, rows=2):
    for video in videos:
        for crop in CROPS:
            save(folder / "features", f"{video}__{crop}", rows)
    (folder / "annotations.txt").write_text(text)


def listed(folder, dataset, side):
    """Videos of a list once each, in its order."""
    rows = [stem.rpartition("__")[0] for stem in stems(folder / "list" / dataset.list_files[side])]
    return list(dict.fromkeys(rows))


def arrays(folder, dataset):
    return [read_array(folder / "list" / dataset.truth_files[kind], "") for kind in ("frames", "segments", "labels")]


def test_shanghaitech_pieces_are_one_test_video_again(tmp_path, capsys):
    make(tmp_path, SHANGHAITECH_VIDEOS, SHANGHAITECH_TEXT)
    assert run(tmp_path, dataset="shanghaitech") == 0
    assert listed(tmp_path, SHANGHAITECH, "train") == ["02_002", "01_0029"]
    assert listed(tmp_path, SHANGHAITECH, "test") == ["03_0032", "01_001", "04_0012"]
    frames, segments, labels = arrays(tmp_path, SHANGHAITECH)
    assert np.flatnonzero(frames).tolist() == [*range(4, 9), *range(64, 71), *range(72, 84)]
    assert segments.tolist() == [[["4", "9"]], [[0, 32]], [["0", "7"], ["8", "20"]]]
    assert labels.tolist() == [["fall"], ["A"], ["vehicle", "circuit"]]
    entries = read_list(tmp_path / "list" / SHANGHAITECH.list_files["test"], dataset=SHANGHAITECH)
    assert [entry.label for entry in entries] == ["fall", "normal", "vehicle"]
    keyed = read_truth(tmp_path / "list" / SHANGHAITECH.list_files["truth"], None, None, entries, [2] * 3, SHANGHAITECH)
    assert keyed.labels == labels.tolist() and np.concatenate(keyed.frames).tolist() == frames.tolist()
    assert capsys.readouterr().err == ""


def test_shanghaitech_as_released_and_by_a_released_split(tmp_path, capsys):
    make(tmp_path, SHANGHAITECH_VIDEOS, SHANGHAITECH_TEXT)
    (tmp_path / "released.txt").write_text("03_0032\n01_001\n")
    split = ["--split", tmp_path / "released.txt"]
    clean, paper = ["03_0032", "01_001", "04_0012"], ["03_0032", "01_001"]
    for flags, train, test, said in (
        (["--protocol", "paper"], ["02_002", "01_0029", "04_0012"], paper, "2 annotated videos have no feature file"),
        (split, ["02_002", "01_0029"], clean, "moved to the test list, as in the official split"),
        ([*split, "--protocol", "paper"], ["02_002", "01_0029", "04_0012"], paper, "(2 have): 04_0012_0, "),
    ):
        assert run(tmp_path, *flags, dataset="shanghaitech") == 0
        assert listed(tmp_path, SHANGHAITECH, "train") == train and listed(tmp_path, SHANGHAITECH, "test") == test
        assert said in capsys.readouterr().err
    make(tmp_path / "pieces", [*SHANGHAITECH_VIDEOS[1:], "vehicle/04_0012_0"], SHANGHAITECH_TEXT)
    assert run(tmp_path / "pieces", dataset="shanghaitech") == 2
    assert "04_0012_0 is a piece of 04_0012" in capsys.readouterr().err


def test_msad_robbery_10_is_a_training_video(tmp_path, capsys):
    make(tmp_path, MSAD_VIDEOS, MSAD_TEXT)
    assert run(tmp_path, dataset="msad") == 0
    assert listed(tmp_path, MSAD, "train") == ["frontdoor1", "Robbery_9", "Robbery_10", "Water_incident_1"]
    assert listed(tmp_path, MSAD, "test") == ["MSAD_normal_testing_1", "Robbery_2"]
    assert np.flatnonzero(arrays(tmp_path, MSAD)[0]).tolist() == [*range(39, 44)]
    assert "moved to the training list" in capsys.readouterr().err

    assert run(tmp_path, "--protocol", "paper", dataset="msad") == 0
    assert listed(tmp_path, MSAD, "train") == ["frontdoor1", "Robbery_9", "Water_incident_1"]
    assert listed(tmp_path, MSAD, "test") == ["MSAD_normal_testing_1", "Robbery_2", "Robbery_10"]
    frames, segments, labels = arrays(tmp_path, MSAD)
    assert np.flatnonzero(frames).tolist() == [*range(39, 44), *range(65, 85)]
    assert labels.tolist() == [["A"], ["Robbery"], ["Robbery"]]

    # Features of single frames.
    make(tmp_path, MSAD_VIDEOS, MSAD_TEXT, rows=10)
    assert run(tmp_path, "--frames-per-snippet", 1, dataset="msad") == 0
    frames, segments, _ = arrays(tmp_path, MSAD)
    assert np.flatnonzero(frames).tolist() == [17, 18, 19] and len(frames) == 20
    assert segments.tolist() == [[[0, 10]], [["7", "12"]]]
    keyed = read_annotations(tmp_path / "list" / MSAD.list_files["truth"], MSAD)
    assert [item.frames for item in keyed.values()] == [10, 10]


@pytest.mark.parametrize(
    "dataset, name, folder, label",
    [
        (MSAD, "Water_incident_10", "x", "Water_incident"),
        (MSAD, "MSAD_normal_testing_119", "x", "Normal"),
        (MSAD, "MSAD_normal_frontdoor1", "x", "Normal"),
        (MSAD, "frontdoor1", "Normal", "Normal"),
        (MSAD, "street_highview3", "x", None),
        (MSAD, "Assault_2", "Normal", "Assault"),
        (SHANGHAITECH, "01_0130", "x", None),
        (SHANGHAITECH, "04_0012_1", "x", None),
        (SHANGHAITECH, "01_0130", "Throwing_Object", "throwing_object"),
    ],
)
def test_labels_from_names_and_folders(dataset, name, folder, label):
    assert dataset.label_of(name, folder) == label


def test_two_streams_in_one_folder_are_named(tmp_path, capsys):
    for stream in ("event_thr_10", "rgb"):
        save(tmp_path / "features", f"{stream}/Robbery/Robbery_2__5")
    (tmp_path / "annotations.txt").write_text(MSAD_TEXT)
    assert run(tmp_path, dataset="msad") == 2
    error = capsys.readouterr().err
    assert "two streams" in error and f"--features {tmp_path / 'features/rgb'})" in error
    assert run(tmp_path, "--features", tmp_path / "features/rgb", dataset="msad") == 0


def test_videos_of_several_classes_are_left_out(tmp_path, capsys):
    names = [f"v={n}__#1_label_{label}" for n, label in enumerate(["B1-0-0", "B1-G-0", "B2-B4-0", "G-0-0", "A", "A"])]
    make(tmp_path, names, f"{names[0]} 1 9\n{names[1]} 2 9\n")
    (tmp_path / "test.txt").write_text("\n".join([*names[:2], names[5]]))
    assert run(tmp_path, "--split", tmp_path / "test.txt", "--single-label", dataset="xd") == 0
    assert [listed(tmp_path, XD, side) for side in ("train", "test")] == [names[3:5], [names[0], names[5]]]
    assert "2 videos of several classes left out" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", [SHANGHAITECH, MSAD], ids=lambda dataset: dataset.name)
def test_made_up_data_has_every_class_on_both_sides(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_demo(dataset)
    for side in ("train", "test"):
        rows = rows_of(demo_folder(dataset) / "list" / dataset.list_files[side])
        assert {code for _, label in rows for code in dataset.codes(label)} == set(dataset.labels)


def released(dataset, side):
    """(name, label) of a released list, in its order."""
    with open(SHARED / f"data/lists/{dataset.name}/{side}_videos.csv", newline="") as file:
        return [(row["video"].rpartition("/")[2], row["label"]) for row in csv.DictReader(file)]


def annotation_file(dataset):
    return next((SHARED / f"data/lists/{dataset.name}").glob("*_annotations.txt"))


def snippet_counts(names, intervals, truth):
    """Numbers of snippets with which the videos' intervals give the frame truth of the whole list.

    Where a video's first interval lies in the truth says where the video starts. What is left between two such
    videos belongs to a normal one between them, and where there is none to the one before the second.
    """
    starts, ends, at = {}, {}, 0
    for name in names:
        if not intervals[name]:
            continue
        start = at + int(np.argmax(truth[at:])) - intervals[name][0][0]
        if start % 16:
            continue  # its interval lies behind its features
        first, last = (start + bound for bound in intervals[name][-1])
        run_end = first + int(np.argmin(np.append(truth[first:], 0)))
        # Where it is cut off, the video ends with a whole snippet.
        at = last if run_end >= last else run_end // 16 * 16
        starts[name], ends[name] = start // 16, -(-at // 16)
    counts = {}
    position = [starts.get(name) for name in names] + [len(truth) // 16]
    index = 0
    while index < len(names):
        behind = next(i for i in range(index + 1, len(position)) if position[i] is not None)
        begin = position[index] or 0
        group = names[index:behind]
        counts.update(dict.fromkeys(group, 1))
        if group[0] in ends:
            counts[group[0]] = ends[group[0]] - begin
        normal = [name for name in group if not intervals[name]]
        counts[(normal or group[-1:])[0]] += position[behind] - begin - sum(counts[name] for name in group)
        index = behind
    return [counts[name] for name in names]


@pytest.fixture(scope="module", params=[SHANGHAITECH, MSAD], ids=lambda dataset: dataset.name)
def benchmark(request, tmp_path_factory):
    """Zero features of a benchmark in class folders, of lengths that fit the released truth, and that truth."""
    dataset = request.param
    folder = tmp_path_factory.mktemp(dataset.name)
    truth = np.load(SHARED / f"data/benchmarks/{dataset.name}_test_gt_iefvad_uint8.npy")
    intervals = {}
    for line in annotation_file(dataset).read_text().splitlines():
        name, _, *bounds = line.split()
        pairs = zip(map(int, bounds[::2]), map(int, bounds[1::2]), strict=True)
        intervals[name.rpartition(".")[0]] = [(start, end) for start, end in pairs if start < end]
    names = [name for name, _ in released(dataset, "test")]
    counts = snippet_counts(names, intervals, truth)
    assert 16 * sum(counts) == len(truth) and min(counts) > 0
    for (name, label), count in zip(released(dataset, "test"), counts, strict=True):
        save(folder / "features", f"{label}/{name}__5", count)
    for name, label in released(dataset, "train"):
        for crop in CROPS:
            save(folder / "features", f"{label}/{name}__{crop}", 40)
    return dataset, folder, truth, dict(zip(names, counts, strict=True))


def build(benchmark, output, *more):
    dataset, folder, _, _ = benchmark
    flags = ["--annotations", annotation_file(dataset), "--output", output / "list", *more]
    assert run(folder, *flags, dataset=dataset.name) == 0


@needs_shared
@pytest.mark.parametrize("with_split", [False, True])
def test_the_released_lists_and_truth_are_rebuilt(benchmark, tmp_path, with_split, capsys):
    dataset, _, truth, _ = benchmark
    split = ["--split", next((SHARED / f"data/lists/{dataset.name}").glob("*_test_list.txt"))]
    build(benchmark, tmp_path, "--protocol", "paper", *(split if with_split else []))
    for side, crops in (("train", CROPS), ("test", [5])):
        rows = rows_of(tmp_path / "list" / dataset.list_files[side])
        expected = [(f"{name}__{crop}", label) for name, label in released(dataset, side) for crop in crops]
        assert [(Path(path).stem, label) for path, label in rows] == expected
    np.testing.assert_array_equal(arrays(tmp_path, dataset)[0], truth)
    expected = {"shanghaitech": (240, 197, 139_568, 7_245), "msad": (479, 241, 144_144, 33_248)}[dataset.name]
    sizes = [len(released(dataset, side)) for side in ("train", "test")]
    assert (*sizes, len(truth), int(truth.sum())) == expected
    misplaced = {(video, "misplaced-videos") for video in dataset.misplaced}
    assert doctor_quirks(tmp_path, dataset) == misplaced


@needs_shared
def test_clean_differs_in_the_misplaced_videos_only(benchmark, tmp_path):
    dataset, folder, truth, counts = benchmark
    build(benchmark, tmp_path)
    assert {video for video, _ in doctor_quirks(tmp_path, dataset)} == dataset.annotation_quirks
    train, test = (set(listed(tmp_path, dataset, side)) for side in ("train", "test"))
    before = [{name for name, _ in released(dataset, side)} for side in ("train", "test")]
    frames, segments, labels = arrays(tmp_path, dataset)
    names = listed(tmp_path, dataset, "test")
    if dataset is MSAD:
        assert (len(train), len(test)) == (480, 240)
        assert (train - before[0], before[1] - test) == ({"Robbery_10"}, {"Robbery_10"})
        owner = np.repeat(list(counts), 16 * np.array(list(counts.values())))
        np.testing.assert_array_equal(frames, truth[owner != "Robbery_10"])
        return
    assert (len(train), len(test)) == (238, 199)
    assert before[0] - train == test - before[1] == {"04_0012", "05_0023"}
    anomalous = {label for item in labels.tolist() for label in item} - {"A"}
    assert anomalous == set(dataset.labels) - {"normal", "hurdle", "step"}
    # Both have 40 snippets; without them the truth is that of the released list.
    lengths = [counts.get(name, 40) for name in names]
    per_video = dict(zip(names, np.split(frames, 16 * np.cumsum(lengths)[:-1]), strict=True))
    assert np.flatnonzero(per_video["04_0012"]).tolist() == [*range(118), *range(120, 343)]
    expected = [*range(171, 272), *range(337, 424), *range(426, 443), *range(522, 591)]
    assert np.flatnonzero(per_video["05_0023"]).tolist() == expected
    assert labels[names.index("05_0023")] == ["jumping", "push", "chasing", "stoop"]
    rest = [item for name, item in per_video.items() if name in before[1]]
    np.testing.assert_array_equal(np.concatenate(rest), truth)


@needs_shared
def test_splits_of_xd_violence(tmp_path):
    videos = {name: Video(name, label) for side in ("train", "test") for name, label in released(XD, side)}
    annotations = read_annotations(SHARED / "data/lists/xd/annotations.txt", XD)
    official = SHARED / "data/lists/xd/test_videos.csv"

    def sizes(split, single_label, notes):
        config = ListsConfig(features="", output="", split=(split,), single_label=single_label)
        train, test = split_videos(videos, annotations, XD, config, notes)
        return len(train), len(test)

    assert sizes(official, False, []) == (3954, 800)
    assert sizes(official, True, []) == (3711, 753)
    (tmp_path / "753.txt").write_text("\n".join(n for n, label in released(XD, "test") if len(XD.codes(label)) == 1))
    notes = []
    assert sizes(tmp_path / "753.txt", False, notes) == (3954 + 47, 753)
    assert notes == [note for note in notes if note.startswith("47 annotated videos are in the training list")] != []
