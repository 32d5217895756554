"""Model and CLIP files that cannot be used end in one line on stderr and exit code 2."""

import pickle
from pathlib import Path

import pytest
import torch
from refusal import RunsCode, assert_refused
from small_detect import write_model
from tiny import WIDTH

from clipfusionvad.engine.checkpoint import released_state
from clipfusionvad.models import build_method
from clipfusionvad.models.clip import load_clip, toy_state

# Model files.


def released(method, **options):
    clip = load_clip("toy", WIDTH)
    shape = {"visual_length": 32, "visual_layers": 1, "prompt_prefix": 2, "prompt_postfix": 2} | options
    model = build_method(method, ["normal"], clip, embed_dim=WIDTH, visual_width=WIDTH, **shape)
    return released_state(model, clip)


def rewrite(change):
    def spoil(path):
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)

    return spoil


def edit_weights(change):
    return rewrite(lambda content: change(content["model_state_dict"]))


MODELS = {
    "missing": (Path.unlink, "not found"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "damaged"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "state dict"),
    "numbers": (lambda path: torch.save({"a": 1}, path), "state dict"),
    "NaN": (edit_weights(lambda state: state["classifier.bias"].fill_(torch.nan) and None), "classifier.bias"),
    "missing weights": (edit_weights(lambda state: state.pop("classifier.bias") and None), "missing classifier.bias"),
    "more weights": (edit_weights(lambda state: state.update(more=torch.zeros(1))), "unknown more"),
    "no hparams": (rewrite(lambda content: content.pop("hparams") and None), "no valid hyper-parameters"),
    "released, other shapes": (lambda path: torch.save(released("clipfusionvad", visual_length=64), path), "(64, 64)"),
    "released, more layers": (lambda path: torch.save(released("clipfusionvad", visual_layers=2), path), "layers"),
    "released vadclip": (lambda path: torch.save(released("vadclip"), path), "--method vadclip"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_files(tiny, case):
    spoil, says = MODELS[case]
    spoil(tiny.work / "model.pth")
    assert_refused(tiny.test, tiny, says=[str(tiny.work / "model.pth"), says])


def test_checkpoint_of_another_method(tiny, tmp_path):
    path = tmp_path / "released.pth"
    torch.save(released("clipfusionvad"), path)
    for flags in ([], ["--model-path", path]):
        assert_refused(tiny.test, tiny, "--method", "vadclip", *flags, says="--method clipfusionvad")
    write_model(tmp_path / "vadclip.pth", "vadclip")
    assert_refused(tiny.test, tiny, "--model-path", tmp_path / "vadclip.pth", says="--method vadclip")


def test_options_that_the_checkpoint_does_not_fit(tiny):
    assert_refused(tiny.test, tiny, "--visual-length", 64, says=("other shapes", "(64, 64)"))
    assert_refused(tiny.test, tiny, "--no-gam", says="unknown gam_attention")


@pytest.mark.parametrize("flag", ["--model-path", "--clip", "--checkpoint-path"])
@pytest.mark.parametrize("old_format", [False, True])
def test_pickle_that_runs_code(tiny, tmp_path, flag, old_format):
    path, ran = tiny.folder / "malice.pth", tmp_path / "ran"
    content = {"model_state_dict": {"weight": torch.zeros(1)}, "epoch": RunsCode(ran)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    program = tiny.test if flag == "--model-path" else tiny.train
    more = ["--use-checkpoint"] if flag == "--checkpoint-path" else []
    assert_refused(program, tiny, flag, path, *more, says=(path.name, "refused"))
    torch.load(path, weights_only=False)
    assert ran.exists()


def test_bare_pickle_that_runs_code(tiny, tmp_path):
    (tiny.folder / "malice.pth").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=4))
    assert_refused(tiny.test, tiny, "--model-path", tiny.folder / "malice.pth", says="malice.pth")


# CLIP files.

CLIPS = {
    "text": (lambda path: path.write_text("no CLIP"), "damaged"),
    "no CLIP": (lambda path: torch.save({"weight": torch.zeros(3)}, path), "not a CLIP file"),
    "another width": (lambda path: torch.save(toy_state(128), path), "text width 128"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clip_files(tiny, case):
    make, says = CLIPS[case]
    path = tiny.folder / "clip.pt"
    make(path)
    for program in (tiny.train, tiny.test):
        assert_refused(program, tiny, "--clip", path, says=[str(path), says])


def test_another_clip_than_trained_with(tiny):
    torch.save(toy_state(WIDTH, seed=1), tiny.folder / "clip.pt")
    assert_refused(tiny.test, tiny, "--clip", tiny.folder / "clip.pt", says="trained with CLIP toy")


def test_resuming_what_is_no_training(tiny):
    flags = ["--use-checkpoint", "--checkpoint-path", tiny.work / "model.pth"]
    assert_refused(tiny.train, tiny, *flags, says="not a training checkpoint")
