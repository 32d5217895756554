"""Model files of ours and of others, and arrays: what is in them is read, and no code in them runs."""

import collections
import functools
import pickle
import random

import numpy as np
import pytest
import torch
from refusal import RunsCode

from clipfusionvad import create_model, load_weights, models
from clipfusionvad.datasets import XD
from clipfusionvad.engine import checkpoint
from clipfusionvad.engine.checkpoint import model_content, read_model_file, released_state, state_without_clip
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.foreign_checkpoints import read_checkpoint
from clipfusionvad.io.npy import read_array
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.layers.dual_branch import DualBranch


class Foreign:
    """A class of the project that wrote the file."""

    def __init__(self):
        self.ran = False

    def __setstate__(self, state):
        raise AssertionError("a foreign class was instantiated")


def test_a_lightning_checkpoint_gives_its_tensors_and_runs_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "net.weight": torch.nn.Parameter(base[:, 1:3]),  # a view: strides and an offset
        "net.half": torch.randn(2, 3).half(),
        "net.count": torch.tensor(7),
        "net.flags": torch.tensor([True, False]),
        "net.empty": torch.zeros(0, 4),
        "net.shared": base,
    }
    optimizer, log = functools.partial(torch.optim.AdamW, lr=1e-5), collections.defaultdict(list, a=[Foreign()])
    hparams = {"loss": Foreign(), "optimizer": optimizer, "log": log, "seeds": {random.Random(3)}}
    content = {
        "pytorch-lightning_version": "1.8.3",
        "epoch": 49,
        "best": np.float64(0.25),
        "state_dict": collections.OrderedDict(state),
    }
    torch.save(content | {"hyper_parameters": hparams, "callbacks": RunsCode(tmp_path / "ran")}, path)
    found = read_checkpoint(path, "file")
    assert (found["epoch"], found["best"]) == (49, 0.25)
    assert list(found["state_dict"]) == list(state)
    for key, value in state.items():
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
    with pytest.raises(UserError, match="file .*model.pth holds more than tensors"):
        read_checkpoint(path, "file")
    path.write_bytes(pickle.dumps({"state_dict": RunsCode(tmp_path / "ran")}))
    with pytest.raises(UserError, match="model.pth"):
        read_checkpoint(path, "file")
    assert not (tmp_path / "ran").exists()


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


def test_an_array_that_runs_code_or_of_another_version_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", objects([1], RunsCode(tmp_path / "ran")))
    with pytest.raises(UserError, match="truth .*a.npy would run foreign code .*mkdir.*refused"):
        read_array(tmp_path / "a.npy", "truth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x03\x00" + bytes(100))
    with pytest.raises(UserError, match="a.npy"):
        read_array(tmp_path / "a.npy", "truth")


PROMPTS = ["normal", "fighting", "car accident"]
OPTIONS = {"embed_dim": 64, "visual_width": 64, "visual_length": 16, "attn_window": 8}


def build(method="clipfusionvad", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(method, PROMPTS, clip="toy", **{**OPTIONS, **options})


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def clip():
    return load_clip("toy", 64)


@pytest.mark.parametrize("method", ["clipfusionvad", "vadclip"])
@pytest.mark.parametrize("form", ["ours", "bare", "training checkpoint", "released"])
def test_every_form_restores_the_weights(method, form, clip, tmp_path):
    trained, other = build(method, seed=1), build(method, seed=2)
    content = {
        "ours": model_content(checkpoint.make_hparams(trained, clip, XD, OPTIONS), state_without_clip(trained)),
        "bare": trained.state_dict(),
        "training checkpoint": {"epoch": 3, "model_state_dict": trained.state_dict(), "ap": 0.5},
        "released": released_state(trained, clip),
    }[form]
    torch.save(content, tmp_path / "model.pth")
    assert not same(trained, other)
    load_weights(other, tmp_path / "model.pth")
    assert same(trained, other)


def test_the_released_form_has_the_whole_of_clip_and_no_wrapper(clip):
    state = released_state(build(), clip)
    assert {key.removeprefix("clipmodel.") for key in state if key.startswith("clipmodel.")} == set(clip.state)
    assert {"disAdj.sigma", "gc1.residual.weight", "temporal.resblocks.0.attn.in_proj_weight"} <= set(state)


def test_clip_inside_a_file_replaces_the_models(tmp_path):
    other, state = build(seed=2), build(seed=1).state_dict()
    changed = state["clipmodel.text_projection"] + 1
    torch.save({**state, "clipmodel.text_projection": changed}, tmp_path / "model.pth")
    load_weights(other, tmp_path / "model.pth")
    assert torch.equal(other.clipmodel.text_projection, changed)


MISFITS = {
    "missing linear.weight": lambda s: s.pop("linear.weight"),
    "unknown extra.weight": lambda s: s.update({"extra.weight": torch.ones(1)}),
    "linear.bias is .65,. in the file, but .64,.": lambda s: s.update({"linear.bias": torch.ones(65)}),
    "not finite, first in linear.bias": lambda s: s["linear.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(message, tmp_path):
    state = dict(build(seed=1).state_dict())
    MISFITS[message](state)
    torch.save(state, tmp_path / "model.pth")
    model, before = build(seed=2), build(seed=2)
    with pytest.raises(UserError, match=message):
        load_weights(model, tmp_path / "model.pth")
    assert same(model, before)


def test_a_file_of_another_method_or_clip_is_refused(clip, tmp_path):
    trained = build()
    content = model_content(checkpoint.make_hparams(trained, clip, XD, OPTIONS), state_without_clip(trained))
    torch.save(content, tmp_path / "model.pth")
    message = "is a checkpoint of clipfusionvad, not of vadclip: use --method clipfusionvad"
    with pytest.raises(UserError, match=message):
        load_weights(build("vadclip"), tmp_path / "model.pth")
    file = read_model_file(tmp_path / "model.pth")
    checkpoint.check_clip(file, clip)
    with pytest.raises(UserError, match="trained with CLIP toy.*pass the same --clip"):
        checkpoint.check_clip(file, load_clip("toy", 128))


def test_bare_weights_of_a_new_method_with_the_keys_of_another_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(models._METHODS, "plain", type("Plain", (DualBranch,), {"name": "plain"}))
    trained, other = build("plain", seed=1), build("plain", seed=2)
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    load_weights(other, tmp_path / "model.pth")
    assert same(trained, other)


@pytest.mark.parametrize("content", [torch.ones(2), {}, {"model_state_dict": {}}, {"weight": "text"}, [1, 2]])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_model_file(tmp_path / "model.pth")
