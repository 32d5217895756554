"""Bad input ends in one line on stderr and exit code 2, before anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from refusal import RunsCode, assert_refused
from tiny import FRAMES, WIDTH, Outcome, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.models.clip import toy_state

ROOT = Path(__file__).resolve().parents[2]


# Lists and features: both programs check them.


def first_feature(tiny, program):
    pattern = "*__0.npy" if program == "train" else "*__5.npy"
    return sorted((tiny.folder / "features").glob(pattern))[0]


def spoil_list(text):
    def spoil(tiny, program):
        path = tiny.train_list if program == "train" else tiny.test_list
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text if isinstance(text, bytes) else text(path.read_text()).encode())
        return path.name

    return spoil


def spoil_feature(change):
    def spoil(tiny, program):
        path = first_feature(tiny, program)
        change(path, np.load(path))
        return path.name

    return spoil


def put(index, value):
    def change(path, array):
        array[index] = value
        np.save(path, array)

    return change


def truncate(path, array):
    path.write_bytes(path.read_bytes()[:-7])


DATA = {
    "missing list": (spoil_list(None), "not found"),
    "list without path": (spoil_list(lambda text: text.replace("path,", "file,", 1)), "'path'"),
    "list of a header": (spoil_list(lambda text: "path,label\n"), "no videos"),
    "empty list": (spoil_list(b""), "is empty"),
    "binary list": (spoil_list(b"\x93NUMPY\x00\xff\xfe" * 9), "not a text file"),
    "unknown label": (spoil_list(lambda text: text.replace(",Abuse", ",Abusee", 1)), ("'Abusee'", "'Abuse'", "row ")),
    "missing feature": (spoil_feature(lambda path, array: path.unlink()), "--feature-root"),
    "truncated feature": (spoil_feature(truncate), "truncated"),
    "three axes": (spoil_feature(lambda path, array: np.save(path, array[None])), "(snippets, dim)"),
    "other width": (spoil_feature(lambda path, array: np.save(path, array[:, :-1])), f"{WIDTH} are expected"),
    "no snippets": (spoil_feature(lambda path, array: np.save(path, array[:0])), "no features"),
    "whole numbers": (spoil_feature(lambda path, array: np.save(path, array.astype(int))), "float"),
    "NaN": (spoil_feature(put((3, 5), np.nan)), "snippet 3 "),
    "infinity": (spoil_feature(put((-1, 0), np.inf)), "infinity"),
    "objects": (spoil_feature(lambda path, array: np.save(path, array.astype(object))), "object"),
    "no array": (spoil_feature(lambda path, array: path.write_text("not an array")), "not a readable .npy"),
}


@pytest.mark.parametrize("program", ["train", "test"])
@pytest.mark.parametrize("case", DATA)
def test_data(tiny, case, program):
    spoil, says = DATA[case]
    name = spoil(tiny, program)
    assert_refused(getattr(tiny, program), tiny, says=[name, *([says] if isinstance(says, str) else says)])


# Truth.


def test_truth_of_another_length(tiny):
    path = tiny.arrays["--gt-path"]
    frames = np.load(path)
    np.save(path, frames[:-FRAMES])
    covered = FRAMES * sum(video.snippets for video in tiny.videos)
    for program in (tiny.train, tiny.test):
        assert_refused(program, tiny, says=(str(len(frames) - FRAMES), str(covered), f"{-FRAMES:+d} frames"))


@pytest.mark.parametrize("flag", ["--gt-segment-path", "--gt-label-path"])
def test_truth_of_fewer_videos(tiny, flag):
    path = tiny.arrays[flag]
    np.save(path, np.load(path, allow_pickle=True)[:-1], allow_pickle=True)
    assert_refused(tiny.test, tiny, says=(path.name, str(len(tiny.videos) - 1), str(len(tiny.videos))))


@pytest.mark.parametrize("flag", ["--gt-path", "--gt-segment-path", "--gt-label-path"])
def test_truth_that_runs_code(tiny, tmp_path, flag):
    path, ran = tiny.arrays[flag], tmp_path / "ran"
    array = np.empty(len(tiny.videos), dtype=object)
    array[0] = RunsCode(ran)
    np.save(path, array)
    assert_refused(tiny.test, tiny, says=(path.name, "mkdir", "refused"))
    np.load(path, allow_pickle=True)
    assert ran.exists()


@pytest.mark.parametrize("damage", [b"\x80\x04K\x01K\x02a.", b"\x80\x04\x8e" + 8 * b"\x7f", b"\x80\x04.", b""])
def test_truth_with_a_damaged_pickle(tiny, damage):
    """Appending to a number, more bytes than there is memory, an empty stack, nothing at all."""
    path = tiny.arrays["--gt-segment-path"]
    stored = path.read_bytes()
    path.write_bytes(stored[: stored.index(b"\n") + 1] + damage)
    assert_refused(tiny.test, tiny, says=(path.name, "not a readable .npy"))


@pytest.mark.parametrize("flag", ["--gt-path", "--gt-segment-path", "--gt-label-path"])
def test_missing_truth(tiny, flag):
    tiny.arrays[flag].unlink()
    assert_refused(tiny.train, tiny, says="not found")


def test_keyed_truth_without_a_video(tiny):
    path, video = tiny.folder / "truth.csv", tiny.videos[0].name
    kept = [line for line in path.read_text().splitlines() if not line.startswith(video)]
    path.write_text("\n".join(kept))
    assert_refused(tiny.test, tiny, "--gt-path", path, says=(path.name, video))


# Flags and configs.

FLAGS = {
    "unknown flag": (["--no-gamm"], "'--no-gam'"),
    "abbreviated flag": (["--max-epo", 1], "'--max-epoch'"),
    "stray word": (["train"], "'train'"),
    "unknown method": (["--method", "vadklip"], "vadclip"),
    "words as a number": (["--visual-layers", "two"], "--visual-layers"),
    "fraction of a whole number": (["--batch-size", "2.5"], "--batch-size"),
    "no value": (["--lr"], "--lr"),
    "lr 0": (["--lr", 0], "--lr"),
    "negative lr": (["--lr", -1], "--lr"),
    "negative lr with an exponent": (["--lr=-1e-5"], "--lr"),
    "lr nan": (["--lr", "nan"], "--lr"),
    "lr inf": (["--lr", "inf"], "--lr"),
    "milestone": (["--scheduler-milestones", 1, "x"], "--scheduler-milestones"),
    "seed": (["--seed", -1], "--seed"),
    "hold-out": (["--holdout", 1], "--holdout"),
    "precision": (["--precision", "fp64"], "--precision"),
    "classes": (["--classes-num", 13], "--classes-num 13"),
    "window": (["--attn-window", 7], "--attn-window 7"),
    "heads": (["--visual-head", 7], "--visual-head 7"),
    "batch": (["--batch-size", 13], "--batch-size"),
    "device": (["--device", "gpu"], "--device gpu"),
    "device without data": (["--device", "meta"], "--device meta"),
    "unknown CLIP": (["--clip", "ViT-B/17"], "ViT-B/16"),
    "CLIP of another width": (["--embed-dim", 128], "width 64"),
    "features of another width": (["--visual-width", 128], "128 are expected"),
    "feature root": (["--feature-root", "nowhere"], "nowhere"),
    "config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(tiny, case, tmp_path):
    flags, says = FLAGS[case]
    if case == "CLIP of another width":
        torch.save(toy_state(WIDTH), tmp_path / "clip.pt")
        flags = [*flags, "--clip", tmp_path / "clip.pt"]
    assert_refused(tiny.train, tiny, *flags, says=says)


CONFIGS = {
    "unknown key": ("max_epochs: 3", "'max_epoch'"),
    "text for a switch": ("balanced: 'yes'", "balanced must be true or false"),
    "number for a switch": ("use_checkpoint: 1", "use_checkpoint must be true or false"),
    "word for a number": ("batch_size: many", "--batch-size"),
    "list for a number": ("lr: [1, 2]", "lr takes one value"),
    "nothing": ("lr:", "lr cannot be None"),
    "switch for a number": ("lr: true", "lr cannot be True"),
    "a list": ("- lr", "option: value"),
    "no YAML": ("lr: [1", "not readable YAML"),
    "a tag that runs code": ("lr: !!python/object/apply:os.getcwd []", "not readable YAML"),
    "no such day": ("lr: 2020-13-45", "not readable YAML"),
    "binary": ("\x00\x01", "not a text file"),
    "a key twice": ("lr: 1\nlr: 2", "twice"),
    "aliases": ("a: &a [1]\nlr: *a", "aliases"),
    "a config inside": ("config: other.yaml", "unknown key 'config'"),
    "another dataset": ("dataset: xd", "--dataset"),
    "unknown method": ("method: vadklip", "'vadclip'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(tiny, case):
    text, says = CONFIGS[case]
    path = tiny.folder / "config.yaml"
    path.write_text(text)
    assert_refused(tiny.train, tiny, "--config", path, says=[str(path) if "method" not in case else "", says])


# Outputs.


def test_folder_that_holds_a_run(tiny):
    (tiny.work / "run").mkdir()
    (tiny.work / "run" / "last.pt").write_text("of another run")
    assert_refused(tiny.train, tiny, says=("already holds a run", "--overwrite"))


@pytest.mark.parametrize("flag", ["--output-dir", "--model-path", "--checkpoint-path", "--metrics-json"])
def test_file_in_place_of_a_folder(tiny, flag):
    (tiny.folder / "file").write_text("a file")
    assert_refused(tiny.train, tiny, flag, tiny.folder / "file" / "below", says="cannot write")


@pytest.mark.parametrize("flag", ["--output-dir", "--metrics-json"])
def test_file_in_place_of_a_folder_for_results(tiny, flag):
    (tiny.folder / "file").write_text("a file")
    assert_refused(tiny.test, tiny, flag, tiny.folder / "file" / "below", says="cannot write")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tiny):
    (tiny.folder / "closed").mkdir(mode=0o555)
    assert_refused(tiny.train, tiny, "--output-dir", tiny.folder / "closed" / "run", says="cannot write")


# Through processes: nothing that Python prints at its end adds a line.


def test_through_processes(tiny):
    def outcome(*argv):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *strings(argv)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    first_feature(tiny, "train").unlink()
    assert_refused(outcome, tiny, "ucf_train.py", *tiny.train_flags(), says="--feature-root")
    config = tiny.folder / "config.yaml"
    config.write_text(yaml.safe_dump({"lrr": 1}))
    argv = ["-m", "clipfusionvad", "test", "--dataset", "ucf", *tiny.test_flags("--config", config)]
    assert_refused(outcome, tiny, *argv, says="'lr'")


@pytest.mark.parametrize("argv, says", [(["tran"], "'train'"), (["train"], "--dataset"), (["lists"], "--dataset")])
def test_commands(tiny, argv, says):
    assert_refused(lambda: quietly(package_main, argv), tiny, says=says)
