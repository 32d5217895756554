"""Checkpoints and arrays of other programs: tensors and plain values are read, and nothing in the file runs."""

from __future__ import annotations

import collections
import functools
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import RunsCode

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import ForeignObjects, read_checkpoint
from clipfusionvad.io.npy import read_array


class Foreign:
    """Represents a class of the project that wrote the file."""

    def __init__(self):
        self.ran = False

    def __setstate__(self, state):
        raise AssertionError("a foreign class was instantiated")


def lightning(path, **extra):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "net.weight": torch.nn.Parameter(base[:, 1:3]),  # a view: strides and an offset
        "net.half": torch.randn(2, 3).half(),
        "net.count": torch.tensor(7),
        "net.flags": torch.tensor([True, False]),
        "net.empty": torch.zeros(0, 4),
        "net.shared": base,
    }
    content = {
        "pytorch-lightning_version": "1.8.3",
        "epoch": 49,
        "best": np.float64(0.25),
        "state_dict": collections.OrderedDict(state),
        "hyper_parameters": {
            "loss": Foreign(),
            "optimizer": functools.partial(torch.optim.AdamW, lr=1e-5),
            "log": collections.defaultdict(list, a=[Foreign()]),
            "seeds": {random.Random(3)},
        },
        **extra,
    }
    torch.save(content, path)
    return content


def test_a_lightning_checkpoint_gives_its_tensors_and_runs_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    written = lightning(path, callbacks=RunsCode(tmp_path / "ran"))
    found = read_checkpoint(path, "file")
    assert (found["epoch"], found["best"]) == (49, 0.25)
    assert list(found["state_dict"]) == list(written["state_dict"])
    for key, value in written["state_dict"].items():
        read = found["state_dict"][key]
        assert read.dtype == value.dtype and torch.equal(read, value.detach()), key
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AssertionError, match="foreign class"):
        torch.load(path, weights_only=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_values_in_a_training_checkpoint_are_data(tmp_path, zipped):
    content = {
        "weight": torch.ones(2),
        "ap": np.float64(0.75),
        "epoch": np.int64(3),
        "best": np.bool_(True),
        "name": np.str_("xd"),
        "history": np.array([[1, 2.5], [3, 4]], dtype=">f4"),
        "labels": np.array([["a", 1], [None, "b"]], dtype=object),
    }
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "model.pth", "file")
    torch.testing.assert_close(found.pop("weight"), content.pop("weight"))
    for key, value in content.items():
        # numpy unpickles into the byte order of the machine.
        assert found[key].dtype == value.dtype.newbyteorder("="), key
        assert found[key].tolist() == value.tolist(), key
    again = pickle.loads(pickle.dumps(found["history"]))
    assert type(again) is np.ndarray and again.tolist() == content["history"].tolist()


@pytest.mark.parametrize("zipped", [True, False])
def test_other_foreign_objects_are_refused(tmp_path, zipped):
    path = tmp_path / "model.pth"
    content = {"weights": torch.ones(2), "more": RunsCode(tmp_path / "ran"), "array": np.arange(3)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ForeignObjects, match="file .*model.pth holds more than tensors"):
        read_checkpoint(path, "file")
    path.write_bytes(pickle.dumps({"state_dict": RunsCode(tmp_path / "ran")}))
    with pytest.raises(UserError, match="model.pth"):
        read_checkpoint(path, "file")
    assert not (tmp_path / "ran").exists()


def test_damaged_lightning_files_end_in_one_line_or_a_state_dict(tmp_path):
    path = tmp_path / "last.ckpt"
    lightning(path)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert isinstance(read_checkpoint(path, "file")["state_dict"], dict)
        except UserError as error:
            assert "last.ckpt" in str(error) and "\n" not in str(error)


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
    np.save(tmp_path / "a.npy", array)
    stored = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(stored[: stored.index(b"\n") + 1] + pickle.dumps(array, protocol))
    assert read_array(tmp_path / "a.npy", "truth").tolist() == array.tolist()


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
