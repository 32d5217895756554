"""Truth conventions by name: the frames that each one judges, and the arrays that the benchmarks' authors released."""

import csv

import numpy as np
import pytest
from test_build_lists import SHARED, needs_shared, run, save

from clipfusionvad.data.annotations import Annotation, read_annotations, read_lengths
from clipfusionvad.data.conventions import convention_of, find_convention, judged_frames, misfit, read_bounds
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, MSAD, UCF
from clipfusionvad.io.errors import UserError

BENCHMARKS = SHARED / "data/benchmarks"


def test_a_convention_counts_frames_as_its_rule_says():
    names, frames = ["Assault006_x264", "Abuse028_x264"], [8096, 1412]
    expected = {"floor16": [8096, 1408], "floor16-short": [8080, 1408], "ceil16": [8096, 1424], "all-frames": frames}
    for name, judged in expected.items():
        assert judged_frames(find_convention(UCF, name), names, frames).tolist() == judged, name
    message = misfit(UCF, find_convention(UCF, "floor16"), names, frames, [505, 88])
    assert "1 videos: Assault006_x264 (8096 frames, 505 rows)" in message and "--convention floor16-short" in message
    with pytest.raises(UserError, match=r"did you mean 'floor16'\?"):
        find_convention(UCF, "flor16")


def test_only_bounds_of_text_are_read_in_the_way_of_a_convention():
    inclusive, official = find_convention(UCF, "all-frames"), find_convention(MSAD, "official")
    item = Annotation("Fire_1", [(20, 200)], ["Fire"], text=True)
    assert read_bounds(item, inclusive).segments == [(20, 201)]
    assert read_bounds(item, official).segments == [(19, 200)]
    assert read_bounds(Annotation("Fire_1", [(20, 200)], ["Fire"]), official).segments == [(20, 200)]


def test_whole_test_sets_are_recognised_by_their_frames():
    for dataset in DATASETS.values():
        known = [one for one in dataset.conventions if one.frames]
        assert known and len({one.name for one in dataset.conventions}) == len(dataset.conventions)
        assert [convention_of(dataset, one.videos, one.frames) for one in known] == known


@needs_shared
def test_the_lengths_of_ucf_crime_give_the_frames_of_all_four_conventions():
    lengths = read_lengths(BENCHMARKS / "ucf_test_videos.csv")
    for one in UCF.conventions:
        assert judged_frames(one, [*lengths], [*lengths.values()]).sum() == one.frames, one.name


def starts(truth):
    return np.flatnonzero(np.diff(truth.astype(np.int8), prepend=0) == 1)


@needs_shared
def test_the_official_truth_of_msad_differs_from_that_of_iefvad_in_four_ways(tmp_path, capsys):
    ief = np.load(BENCHMARKS / "msad_test_gt_iefvad_uint8.npy")
    official = np.load(BENCHMARKS / "msad_official/gt_msad_ws_143920_uint8.npy")
    annotations = SHARED / "data/lists/msad/msad_annotations.txt"
    bounds = {name: item.segments for name, item in read_annotations(annotations, MSAD).items()}
    with open(SHARED / "data/lists/msad/test_videos.csv", newline="") as file:
        rows = [(row["video"].rpartition("/")[2], row["label"]) for row in csv.DictReader(file)]
    anomalous = [name for name, label in rows if label != "Normal"]
    normal = [name for name, label in rows if label == "Normal"]
    # Features are not at hand. Where a video begins follows from its first abnormal frame and the annotation. The
    # interval of Explosion_3 lies past its end. Those of Explosion_1 and of the last video before the normal ones are
    # cut off by their ends.
    visible = [name for name in anomalous if name != "Explosion_3"]
    first = [bounds[name][0][0] for name in visible]
    begins = dict(zip(visible, (starts(ief) - first).tolist(), strict=True))
    last, after = next(pair for pair in zip(anomalous, anomalous[1:], strict=False) if "Object" in pair[1])

    def cut_off(name):
        begin = begins[name] + bounds[name][0][0]
        return begin + int(np.argmin(ief[begin:]))

    begins["Explosion_3"] = cut_off("Explosion_1")
    ends = {name: begins[following] for name, following in zip(anomalous, anomalous[1:], strict=False)}
    ends |= {last: cut_off(last), anomalous[-1]: len(ief)}
    frames = {name: ends[name] - begins[name] for name in anomalous} | dict.fromkeys(normal, 16)
    size = begins[after] - ends[last]
    frames[normal[0]] = size - 16 * (len(normal) - 1)
    assert all(count % 16 == 0 and count > 0 for count in frames.values()), "whole snippets"
    for name, label in rows:
        save(tmp_path / "features" / label, f"{name}__5", frames[name] // 16)

    def built(*more):
        assert run(tmp_path, *more, dataset="msad", annotations=None) == 0
        return np.load(tmp_path / "list/gt_msad.npy").astype(np.uint8)

    given = ["--annotations", annotations, "--split", SHARED / "data/lists/msad/msad_test_list.txt"]
    np.testing.assert_array_equal(built(*given, "--protocol", "paper"), ief)
    # One: Robbery_10 is a training video.
    robbery = slice(begins["Robbery_10"], ends["Robbery_10"])
    without = np.delete(ief, robbery)
    np.testing.assert_array_equal(built(*given), without)
    # Two: intervals begin one frame earlier. Three: normal videos come last.
    shifted = without.copy()
    shifted[starts(without) - 1] = 1
    block = slice(ends[last], ends[last] + size)
    moved = np.concatenate([np.delete(shifted, block), shifted[block]])
    np.testing.assert_array_equal(built(*given, "--convention", "official"), moved)
    # Four: one normal video is one snippet shorter.
    save(tmp_path / "features/Normal", f"{normal[0]}__5", frames[normal[0]] // 16 - 1)
    np.testing.assert_array_equal(built(*given, "--convention", "official"), official)
    names = (BENCHMARKS / "msad_official/test_240_videos.txt").read_text().split()
    with open(tmp_path / "list/msad_CLIP_rgbtest.csv", newline="") as file:
        listed = [row["path"].rpartition("/")[2].removesuffix("__5.npy") for row in csv.DictReader(file)]
    assert listed == names


def test_a_test_is_judged_by_a_convention(tmp_path):
    path = tmp_path / "truth.csv"
    rows = "Abuse028_x264,1412,Abuse,165,1412\nNormal_Videos_003_x264,2833,Normal,,\n"
    path.write_text(f"video,frames,label,start,end\n{rows}")
    labels = {"Abuse028_x264": "Abuse", "Normal_Videos_003_x264": "Normal"}
    entries = [Entry(tmp_path / f"{name}.npy", label, row) for row, (name, label) in enumerate(labels.items(), 2)]

    def frames(name, rows):
        truth = read_truth(path, None, None, entries, rows, UCF, convention=find_convention(UCF, name))
        return [(len(own), int(own.sum())) for own in truth.frames]

    assert frames("floor16", [88, 177]) == [(1408, 1408 - 165), (2832, 0)]
    assert frames("ceil16", [89, 178]) == [(1424, 1412 - 165), (2848, 0)]
    assert frames("all-frames", [88, 178]) == [(1412, 1412 - 165), (2833, 0)]
    with pytest.raises(UserError, match=r"2 videos: Abuse028.*give --convention ceil16"):
        frames("floor16", [89, 178])
