"""Mistakes in the truth, each planted by a function that returns (file, row) of what must be found."""

from __future__ import annotations

from functools import partial

import numpy as np
from spoilt_demo import change_arrays, edit, rows_of, with_segment

from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.doctor.findings import ERROR, WARNING


def arrays(demo, kind, change):
    return change_arrays(demo, kind, change), None


def normal_with_segments(demo):
    edit(demo.truth, lambda rows: rows[-1].__setitem__(slice(2, 5), ["Normal", "10", "50"]))
    return demo.truth, len(rows_of(demo.truth))


def anomalous_without_segment(demo):
    change_arrays(demo, "labels", with_segment(0, ["A"]))
    return arrays(demo, "segments", with_segment(0, [[0, 16]]))


def segments_overlapping(demo):
    def change(array):
        array[0] = [array[0][0], array[0][0]]
        return array

    change_arrays(demo, "labels", lambda labels: with_segment(0, [labels[0][0]] * 2)(labels))
    return arrays(demo, "segments", change)


def frames_of_another_order(demo):
    """The anomalous videos' frames the other way round: normal videos stay normal, and the sum is the same."""
    segments, count = read_array(demo.array("segments"), ""), 26
    normal = sum(int(item[0][1]) for item in segments[count:])
    return arrays(demo, "frames", lambda f: np.concatenate([f[: len(f) - normal][::-1], f[-normal:]]))


def another_order_of_the_test_list(demo):
    demo.use_arrays()
    edit(demo.test, lambda rows: rows.__setitem__(slice(1, None), rows[:0:-1]))
    return demo.array("frames"), None


TRUTH = {"normal-with-truth", "anomalous-without-truth", "truth-disagrees", "segment-bounds", "segment-labels"}
TRUTH |= {"truth-length", "segments-past-the-end", "segment-order"}
# mistake: (how it is planted, check that must find it, its level, checks that may report what follows from it)
MISTAKES = {
    "row per frame": (
        lambda d: d.flags.extend(["--frames-per-snippet", "1"]) or (d.truth, None),
        "frames-per-snippet",
        ERROR,
        {"truth-length"},
    ),
    "normal with segments": (normal_with_segments, "truth-unreadable", ERROR, set()),
    "normal with frames": (
        lambda d: arrays(d, "frames", lambda frames: np.append(frames[:-5], np.ones(5, frames.dtype))),
        "normal-with-truth",
        ERROR,
        set(),
    ),
    "anomalous, not annotated": (
        lambda d: edit(d.truth, lambda rows: rows.pop(1)) and (d.truth, None),
        "truth-unreadable",
        ERROR,
        set(),
    ),
    "anomalous without segment": (anomalous_without_segment, "anomalous-without-truth", ERROR, {"truth-length"}),
    "segments overlapping": (segments_overlapping, "segment-order", WARNING, set()),
    "segment of another class": (
        lambda d: edit(d.truth, lambda rows: rows[1].__setitem__(2, "Shooting")) or (d.truth, None),
        "segment-labels",
        ERROR,
        set(),
    ),
    "frames cut short": (lambda d: arrays(d, "frames", lambda f: f[:-100]), "truth-unreadable", ERROR, set()),
    "frames of another order": (frames_of_another_order, "truth-disagrees", ERROR, {"anomalous-without-truth"}),
    "another order of the test list": (another_order_of_the_test_list, "normal-with-truth", ERROR, TRUTH),
}
SEGMENTS = {
    "past the end": (["90000", "90100"], "segment-bounds", {"truth-disagrees"}),
    "empty": (["40", "40"], "segment-bounds", {"truth-disagrees"}),
    "negative": (["-5", "40"], "truth-unreadable", set()),
    "backwards": (["50", "40"], "truth-unreadable", set()),
}
MISTAKES |= {
    f"segment {name}": (partial(arrays, kind="segments", change=with_segment(0, [bounds])), check, ERROR, follow)
    for name, (bounds, check, follow) in SEGMENTS.items()
}
