"""Arrays of objects as numpy writes them, damaged ones, and ones that would run code."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.npy import read_array


def objects(*items):
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    return array


ARRAYS = {
    "released segments": objects([["165", "240"]], [[0, 7168]], [["1", "2"], ["3", "4"]]),
    "lists of one length": objects([1, 2], [3, 4]),
    "labels": objects(["B2", "G"], ["A"]),
    "arrays in lists": objects([np.array([1, 2])], np.array([["a", "bc"]]), np.array([1.5], dtype=">f4")),
    "scalars": objects([np.int64(3), np.str_("A"), np.float32(0.5)], None),
    "two dimensions": np.array([[None, "x"], [1, 2.5]], dtype=object),
    "fortran order": np.asfortranarray(np.array([[1, "x"], [None, 2]], dtype=object)),
    "empty": objects(),
    "plain numbers": np.arange(6.0).reshape(2, 3),
    "text": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_writes_is_read_back(name, tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    expected = np.load(tmp_path / "a.npy", allow_pickle=True)
    ours = read_array(tmp_path / "a.npy", "truth")
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    np.testing.assert_equal(ours.tolist(), expected.tolist())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol, tmp_path):
    array = ARRAYS["released segments"]
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": array.shape})
        pickle.dump(array, file, protocol=protocol)
    assert read_array(tmp_path / "a.npy", "truth").tolist() == array.tolist()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", objects([1], RunsCode(tmp_path / "proof")))
    with pytest.raises(UserError, match="truth .*a.npy would run foreign code .*mkdir.*refused"):
        read_array(tmp_path / "a.npy", "truth")
    assert not (tmp_path / "proof").exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "proof").exists()


@settings(max_examples=400)
@given(st.data())
def test_damaged_files_end_in_an_array_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    np.save(path, ARRAYS[data.draw(st.sampled_from(sorted(ARRAYS)))])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert isinstance(read_array(path, "truth"), np.ndarray)
    except UserError as error:
        assert "a.npy" in str(error)
