"""Mistakes in the truth, each planted by a function that returns (file, row) of what must be found."""

from functools import partial

import numpy as np
from spoilt_demo import change_arrays, edit, rows_of, with_segment

from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.doctor import ERROR, WARNING


def normal_with_segments(demo):
    edit(demo.truth, lambda rows: rows[-1].__setitem__(slice(2, 5), ["Normal", "10", "50"]))
    return demo.truth, len(rows_of(demo.truth))


def anomalous_without_segment(demo):
    change_arrays(demo, "labels", with_segment(0, ["A"]))
    return change_arrays(demo, "segments", with_segment(0, [[0, 16]]))


def segments_overlapping(demo):
    def change(array):
        array[0] = [array[0][0], array[0][0]]
        return array

    change_arrays(demo, "labels", lambda labels: with_segment(0, [labels[0][0]] * 2)(labels))
    return change_arrays(demo, "segments", change)


def frames_of_another_order(demo):
    """The anomalous videos' frames the other way round: normal videos stay normal, and the sum is the same."""
    segments, count = read_array(demo.array("segments"), ""), 26
    normal = sum(int(item[0][1]) for item in segments[count:])
    return change_arrays(demo, "frames", lambda f: np.concatenate([f[: len(f) - normal][::-1], f[-normal:]]))


def another_order_of_the_test_list(demo):
    demo.use_arrays()
    edit(demo.test, lambda rows: rows.__setitem__(slice(1, None), rows[:0:-1]))
    return demo.array("frames"), None


TRUTH = {"normal-with-truth", "anomalous-without-truth", "truth-disagrees", "segment-bounds", "segment-labels"}
TRUTH |= {"truth-length", "segment-order"}
# mistake: (how it is planted, check that must find it, its level)
MISTAKES = {
    "row per frame": (
        lambda d: d.flags.extend(["--frames-per-snippet", "1"]) or (d.truth, None),
        "frames-per-snippet",
        ERROR,
    ),
    "normal with segments": (normal_with_segments, "truth-unreadable", ERROR),
    "normal with frames": (
        lambda d: change_arrays(d, "frames", lambda frames: np.append(frames[:-5], np.ones(5, frames.dtype))),
        "normal-with-truth",
        ERROR,
    ),
    "anomalous, not annotated": (
        lambda d: edit(d.truth, lambda rows: rows.pop(1)) and (d.truth, None),
        "truth-unreadable",
        ERROR,
    ),
    "anomalous without segment": (anomalous_without_segment, "anomalous-without-truth", ERROR),
    "segments overlapping": (segments_overlapping, "segment-order", WARNING),
    "segment of another class": (
        lambda d: edit(d.truth, lambda rows: rows[1].__setitem__(2, "Shooting")) or (d.truth, None),
        "segment-labels",
        ERROR,
    ),
    "frames cut short": (lambda d: change_arrays(d, "frames", lambda f: f[:-100]), "truth-unreadable", ERROR),
    "frames of another order": (frames_of_another_order, "truth-disagrees", ERROR),
    "another order of the test list": (another_order_of_the_test_list, "normal-with-truth", ERROR),
}
SEGMENTS = {
    "past the end": (["90000", "90100"], "segment-bounds"),
    "empty": (["40", "40"], "segment-bounds"),
    "negative": (["-5", "40"], "truth-unreadable"),
    "backwards": (["50", "40"], "truth-unreadable"),
}
MISTAKES |= {
    f"segment {name}": (partial(change_arrays, kind="segments", change=with_segment(0, [bounds])), check, ERROR)
    for name, (bounds, check) in SEGMENTS.items()
}
# mistake: other checks that may report what follows from it
FOLLOWS = {
    "row per frame": {"truth-length"},
    "anomalous without segment": {"truth-length"},
    "frames of another order": {"anomalous-without-truth"},
    "another order of the test list": TRUTH,
    "segment past the end": {"truth-disagrees"},
    "segment empty": {"truth-disagrees"},
}
