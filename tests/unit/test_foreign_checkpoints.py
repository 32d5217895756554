"""Checkpoints of other programs: tensors and plain values come out, and nothing in the file runs."""

from __future__ import annotations

import collections
import functools
import pickle
import random

import numpy as np
import pytest
import torch
from refusal import RunsCode

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import ForeignObjects, read_checkpoint


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
