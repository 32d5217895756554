"""Bad input ends in one line on stderr and exit code 2, before anything is written."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from refusal import RunsCode, assert_refused
from small_detect import write_model
from test_scripts import run_script
from tiny import FRAMES, WIDTH, Outcome, quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.engine.checkpoint import released_state
from clipfusionvad.engine.device import pick_device
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import build_method
from clipfusionvad.models.clip import load_clip, toy_state


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=list(table))


# Lists and features: both programs check them.


def in_list(text):
    def spoil(tiny, program):
        path = tiny.train_list if program == "train" else tiny.test_list
        path.write_bytes(text if isinstance(text, bytes) else text(path.read_text()).encode())
        return path.name

    return spoil


def in_feature(change):
    def spoil(tiny, program):
        path = sorted((tiny.folder / "features").glob("*__0.npy" if program == "train" else "*__5.npy"))[0]
        change(path, np.load(path))
        return path.name

    return spoil


def saved(change):
    return in_feature(lambda path, array: np.save(path, change(array)))


def put(row, value):
    return saved(lambda array: np.where(np.arange(len(array))[:, None] == row, value, array).astype(array.dtype))


DATA = {
    "list without path": (in_list(lambda text: text.replace("path,", "file,", 1)), "'path'"),
    "list of a header": (in_list(lambda text: "path,label\n"), "no videos"),
    "empty list": (in_list(b""), "is empty"),
    "binary list": (in_list(b"\x93NUMPY\x00\xff\xfe" * 9), "not a text file"),
    "unknown label": (in_list(lambda text: text.replace(",Abuse", ",Abusee", 1)), "'Abusee'", "'Abuse'", "row "),
    "missing feature": (in_feature(lambda path, array: path.unlink()), "--feature-root"),
    "truncated feature": (in_feature(lambda path, array: path.write_bytes(path.read_bytes()[:-7])), "truncated"),
    "three axes": (saved(lambda array: array[None]), "(snippets, dim)"),
    "other width": (saved(lambda array: array[:, :-1]), f"{WIDTH} are expected"),
    "no snippets": (saved(lambda array: array[:0]), "no features"),
    "whole numbers": (saved(lambda array: array.astype(int)), "float"),
    "NaN": (put(3, np.nan), "snippet 3 "),
    "infinity": (put(0, np.inf), "infinity"),
    "objects": (saved(lambda array: array.astype(object)), "object"),
    "no array": (in_feature(lambda path, array: path.write_text("not an array")), "not a readable .npy"),
}


@pytest.mark.parametrize("program", ["train", "test"])
@cases(DATA)
def test_data(tiny, case, program):
    spoil, *says = case
    assert_refused(getattr(tiny, program), tiny, says=[spoil(tiny, program), *says])


# Truth.


def test_truth_of_another_length(tiny):
    path = tiny.arrays["--gt-path"]
    frames = np.load(path)
    np.save(path, frames[:-FRAMES])
    covered = FRAMES * sum(video.snippets for video in tiny.videos)
    for program in (tiny.train, tiny.test):
        assert_refused(program, tiny, says=(str(len(frames) - FRAMES), str(covered), f"{-FRAMES:+d} frames"))


@pytest.mark.parametrize("flag", ["--gt-path", "--gt-segment-path", "--gt-label-path"])
def test_truth_that_is_short_runs_code_or_is_missing(tiny, tmp_path, flag):
    path, ran, count = tiny.arrays[flag], tmp_path / "ran", len(tiny.videos)
    if flag != "--gt-path":
        np.save(path, np.load(path, allow_pickle=True)[:-1], allow_pickle=True)
        assert_refused(tiny.test, tiny, says=(path.name, str(count - 1), str(count)))
    array = np.empty(count, dtype=object)
    array[0] = RunsCode(ran)
    np.save(path, array)
    assert_refused(tiny.test, tiny, says=(path.name, "mkdir", "refused"))
    np.load(path, allow_pickle=True)
    assert ran.exists()
    path.unlink()
    assert_refused(tiny.train, tiny, says="not found")


def test_truth_with_a_damaged_pickle(tiny):
    """Appending to a number, more bytes than there is memory, an empty stack, nothing at all."""
    path = tiny.arrays["--gt-segment-path"]
    stored = path.read_bytes()
    for damage in (b"\x80\x04K\x01K\x02a.", b"\x80\x04\x8e" + 8 * b"\x7f", b"\x80\x04.", b""):
        path.write_bytes(stored[: stored.index(b"\n") + 1] + damage)
        assert_refused(tiny.test, tiny, says=(path.name, "not a readable .npy"))


def test_keyed_truth_without_a_video(tiny):
    path, video = tiny.folder / "truth.csv", tiny.videos[0].name
    kept = [line for line in path.read_text().splitlines() if not line.startswith(video)]
    path.write_text("\n".join(kept))
    assert_refused(tiny.test, tiny, "--gt-path", path, says=(path.name, video))


# Flags and configs.


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("name", ["mps", "xpu", "gpu", "cpu:x", "hpu", "meta", "vulkan", "mkldnn", "0"])
@pytest.mark.filterwarnings("error")
def test_a_device_that_torch_refuses_is_one_short_line(monkeypatch, name, gpus):
    def refuse(*args, **kwargs):
        raise NotImplementedError("Could not run 'aten::empty.memory_format' with arguments from …\n" + 40 * "CPU: …\n")

    # Also on a machine that has the device.
    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        pick_device(name)
    usable = ["auto", "cpu", *(f"cuda:{number}" for number in range(gpus))]
    assert str(refused.value) == f"--device {name} cannot be used here: give one of {', '.join(usable)}"


def test_why_a_gpu_cannot_be_used_is_said(monkeypatch):
    said = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver\n…"
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError(said)))
    with pytest.raises(
        UserError, match=r"--device cuda cannot be used here \(Found no NVIDIA driver on your system\):"
    ):
        pick_device("cuda")


FLAGS = [
    ("--no-gamm", "'--no-gam'"),
    ("--visual 3", "unknown argument '--visual'"),
    ("train", "'train'"),
    ("--method vadklip", "vadclip"),
    ("--batch-size 2.5", "--batch-size: must be a positive whole number, got '2.5'"),
    ("--lr", "--lr"),
    ("--lr 0", "--lr: must be a positive number, got '0'"),
    ("--lr=-1e-5", "--lr"),
    ("--lr nan", "--lr: must be a positive number"),
    ("--use-checkpoint True", "unknown argument 'True'"),
    ("--scheduler-milestones 1 x", "--scheduler-milestones"),
    ("--holdout 1", "--holdout: must be a number between 0 and 1"),
    ("--precision fp64", "--precision"),
    ("--classes-num 13", "--classes-num 13, but UCF-Crime has 14 classes"),
    ("--attn-window 7", "--attn-window 7"),
    ("--visual-head 7", "--visual-head 7"),
    ("--batch-size 13", "--batch-size"),
    ("--device gpu", "--device gpu"),
    ("--clip ViT-B/17", "ViT-B/16"),
    ("--embed-dim 128 --clip {clip}", "width 64"),
    ("--visual-width 128", "128 are expected"),
    ("--feature-root nowhere", "nowhere"),
    ("--config nowhere.yaml", "config not found: nowhere.yaml"),
    ("--train-list nowhere.csv", "nowhere.csv"),
]


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_flags(tiny, flags, says, tmp_path):
    torch.save(toy_state(WIDTH), tmp_path / "clip.pt")
    assert_refused(tiny.train, tiny, *flags.format(clip=tmp_path / "clip.pt").split(), says=says)


CONFIGS = {
    "unknown key": ("max_epochs: 3", "'max_epoch'"),
    "text for a switch": ("balanced: 'yes'", "balanced must be true or false"),
    "list for a number": ("lr: [1, 2]", "lr takes one value"),
    "nothing": ("lr:", "lr cannot be None"),
    "switch for a number": ("lr: true", "lr cannot be True"),
    "a list": ("- lr", "option: value"),
    "deep YAML": ("lr: " + "[" * 5000, "not readable YAML"),
    "a tag that runs code": ("lr: !!python/object/apply:os.getcwd []", "not readable YAML"),
    "no such day": ("lr: 2020-13-45", "not readable YAML"),
    "binary": ("\x00\x01", "not a text file"),
    "a key twice": ("lr: 1\nlr: 2", "twice"),
    "aliases": ("a: &a [1]\nlr: *a", "aliases"),
    "a config inside": ("config: other.yaml", "unknown key 'config'"),
    "another dataset": ("dataset: xd", "--dataset"),
    "unknown method": ("method: vadklip", "'vadclip'"),
}


@cases(CONFIGS)
def test_configs(tiny, case):
    text, says = case
    path = tiny.folder / "config.yaml"
    path.write_text(text)
    assert_refused(tiny.train, tiny, "--config", path, says=[str(path) if "method" not in text else "", says])


# Model files.


def released(method, **options):
    clip = load_clip("toy", WIDTH)
    shape = {"visual_length": 32, "visual_layers": 1, "prompt_prefix": 2, "prompt_postfix": 2} | options
    model = build_method(method, ["normal"], clip, embed_dim=WIDTH, visual_width=WIDTH, **shape)
    return released_state(model, clip)


def edit(change):
    """Change the content and the weights of a model file in place."""

    def spoil(path):
        content = torch.load(path, weights_only=True)
        change(content, content["model_state_dict"])
        torch.save(content, path)

    return spoil


MODELS = {
    "missing": (Path.unlink, "not found"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "damaged"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "state dict"),
    "numbers": (lambda path: torch.save({"a": 1}, path), "state dict"),
    "NaN": (edit(lambda content, state: state["classifier.bias"].fill_(torch.nan)), "classifier.bias"),
    "missing weights": (edit(lambda content, state: state.pop("classifier.bias")), "missing classifier.bias"),
    "more weights": (edit(lambda content, state: state.update(more=torch.zeros(1))), "unknown more"),
    "no hparams": (edit(lambda content, state: content.pop("hparams")), "no valid hyper-parameters"),
    "released, other shapes": (lambda path: torch.save(released("clipfusionvad", visual_length=64), path), "(64, 64)"),
    "released, more layers": (lambda path: torch.save(released("clipfusionvad", visual_layers=2), path), "layers"),
    "released vadclip": (lambda path: torch.save(released("vadclip"), path), "--method vadclip"),
}


@cases(MODELS)
def test_model_files(tiny, case):
    spoil, says = case
    spoil(tiny.work / "model.pth")
    assert_refused(tiny.test, tiny, says=[str(tiny.work / "model.pth"), says])


def test_checkpoints_that_do_not_fit_the_method_or_the_options(tiny, tmp_path):
    path = tmp_path / "released.pth"
    torch.save(released("clipfusionvad"), path)
    for flags in ([], ["--model-path", path]):
        assert_refused(tiny.test, tiny, "--method", "vadclip", *flags, says="--method clipfusionvad")
    write_model(tmp_path / "vadclip.pth", "vadclip")
    assert_refused(tiny.test, tiny, "--model-path", tmp_path / "vadclip.pth", says="--method vadclip")
    assert_refused(tiny.test, tiny, "--visual-length", 64, says=("other shapes", "(64, 64)"))
    assert_refused(tiny.test, tiny, "--no-gam", says="unknown gam_attention")
    resume = ["--use-checkpoint", "--checkpoint-path", tiny.work / "model.pth"]
    assert_refused(
        tiny.train,
        tiny,
        *resume,
        says="holds no optimizer state (optimizer_state_dict): start from its weights with --init-from",
    )
    torch.save(toy_state(WIDTH, seed=1), tiny.folder / "clip.pt")
    assert_refused(tiny.test, tiny, "--clip", tiny.folder / "clip.pt", says="trained with CLIP toy")


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
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "again"), protocol=4))
    assert_refused(program, tiny, flag, path, *more, says="malice.pth")


def test_clip_files(tiny):
    path = tiny.folder / "clip.pt"
    path.write_text("no CLIP")
    for content, says in ((None, "damaged"), ({"a": torch.zeros(3)}, "not a CLIP file"), (toy_state(128), "width 128")):
        if content:
            torch.save(content, path)
        for program in (tiny.train, tiny.test):
            assert_refused(program, tiny, "--clip", path, says=[str(path), says])


# Outputs.


def test_outputs_that_cannot_be_written(tiny):
    (tiny.folder / "file").write_text("a file")
    for flag in ("--output-dir", "--model-path", "--checkpoint-path", "--metrics-json"):
        assert_refused(tiny.train, tiny, flag, tiny.folder / "file" / "below", says="cannot write")
    for flag in ("--output-dir", "--metrics-json"):
        assert_refused(tiny.test, tiny, flag, tiny.folder / "file" / "below", says="cannot write")
    if os.geteuid() != 0:
        (tiny.folder / "closed").mkdir(mode=0o555)
        assert_refused(tiny.train, tiny, "--output-dir", tiny.folder / "closed" / "run", says="cannot write")
    (tiny.work / "run").mkdir()
    (tiny.work / "run" / "last.pt").write_text("of another run")
    assert_refused(tiny.train, tiny, says=("already holds a run", "--overwrite"))


def test_through_processes(tiny):
    """Nothing that Python prints at its end adds a line."""

    def outcome(name, *argv):
        done = run_script(name, argv, tiny.folder)
        return Outcome(done.returncode, done.stdout, done.stderr)

    in_feature(lambda path, array: path.unlink())(tiny, "train")
    assert_refused(outcome, tiny, "ucf_train.py", *tiny.train_flags(), says="--feature-root")
    config = tiny.folder / "config.yaml"
    config.write_text(yaml.safe_dump({"lrr": 1}))
    argv = ["test", "--dataset", "ucf", *tiny.test_flags("--config", config)]
    assert_refused(outcome, tiny, "clipfusionvad", *argv, says="'lr'")


@pytest.mark.parametrize("argv, says", [(["tran"], "'train'"), (["train"], "--dataset"), (["lists"], "--dataset")])
def test_commands(tiny, argv, says):
    assert_refused(lambda: quietly(package_main, argv), tiny, says=says)
