"""Mistakes in the truth, each planted by a function that returns (file, row) of what must be found."""

from __future__ import annotations

import numpy as np
from spoilt_demo import change_arrays, edit, rows_of, with_segment

from clipfusionvad.io.npy import read_array
from clipfusionvad.tools.doctor.findings import ERROR, WARNING


def row_per_frame(demo):
    demo.flags += ["--frames-per-snippet", "1"]
    return demo.truth, None


def normal_with_segments(demo):
    edit(demo.truth, lambda rows: rows[-1].__setitem__(slice(2, 5), ["Normal", "10", "50"]))
    return demo.truth, len(rows_of(demo.truth))


def normal_with_frames(demo):
    return change_arrays(demo, "frames", lambda frames: np.append(frames[:-5], np.ones(5, frames.dtype))), None


def anomalous_not_annotated(demo):
    edit(demo.truth, lambda rows: rows.pop(1))
    return demo.truth, None


def anomalous_without_segment(demo):
    change_arrays(demo, "labels", with_segment(0, ["A"]))
    return change_arrays(demo, "segments", with_segment(0, [[0, 16]])), None


def segments_overlapping(demo):
    def change(array):
        array[0] = [array[0][0], array[0][0]]
        return array

    change_arrays(demo, "labels", lambda labels: with_segment(0, [labels[0][0]] * 2)(labels))
    return change_arrays(demo, "segments", change), None


def segment_of_another_class(demo):
    edit(demo.truth, lambda rows: rows[1].__setitem__(2, "Shooting"))
    return demo.truth, None


def frames_cut_short(demo):
    return change_arrays(demo, "frames", lambda frames: frames[:-100]), None


def frames_of_another_order(demo):
    """The anomalous videos' frames the other way round: normal videos stay normal, and the sum is the same."""
    segments, count = read_array(demo.array("segments"), ""), 26
    normal = sum(int(item[0][1]) for item in segments[count:])
    return change_arrays(demo, "frames", lambda f: np.concatenate([f[: len(f) - normal][::-1], f[-normal:]])), None


def another_order_of_the_test_list(demo):
    demo.use_arrays()
    edit(demo.test, lambda rows: rows.__setitem__(slice(1, None), rows[:0:-1]))
    return demo.array("frames"), None


def _segment(name, start, end):
    def plant(demo):
        return change_arrays(demo, "segments", with_segment(0, [[start, end]])), None

    plant.__name__ = f"segment_{name}"
    return plant


TRUTH = {"normal-with-truth", "anomalous-without-truth", "truth-disagrees", "segment-bounds", "segment-labels"}
TRUTH |= {"truth-length", "segments-past-the-end", "segment-order"}
# mistake: (check that must find it, its level, checks that may report what follows from it)
MISTAKES = {
    row_per_frame: ("frames-per-snippet", ERROR, {"truth-length"}),
    normal_with_segments: ("truth-unreadable", ERROR, set()),
    normal_with_frames: ("normal-with-truth", ERROR, set()),
    anomalous_not_annotated: ("truth-unreadable", ERROR, set()),
    anomalous_without_segment: ("anomalous-without-truth", ERROR, {"truth-length"}),
    segments_overlapping: ("segment-order", WARNING, set()),
    segment_of_another_class: ("segment-labels", ERROR, set()),
    frames_cut_short: ("truth-unreadable", ERROR, set()),
    frames_of_another_order: ("truth-disagrees", ERROR, {"anomalous-without-truth"}),
    another_order_of_the_test_list: ("normal-with-truth", ERROR, TRUTH),
}
MISTAKES |= {
    _segment("past_the_end", "90000", "90100"): ("segment-bounds", ERROR, {"truth-disagrees"}),
    _segment("empty", "40", "40"): ("segment-bounds", ERROR, {"truth-disagrees"}),
    _segment("negative", "-5", "40"): ("truth-unreadable", ERROR, set()),
    _segment("backwards", "50", "40"): ("truth-unreadable", ERROR, set()),
}
