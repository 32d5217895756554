"""Files of the HuggingFace Hub in place of paths, from a stand-in of the Hub on this machine."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_clip import huggingface_model
from tiny import WIDTH, package_main, quietly, strings

from clipfusionvad import create_model, load_weights
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.hub import local_path, pinned
from clipfusionvad.models.clip import load_clip, toy_state

pytest.importorskip("huggingface_hub", reason="hf: names need: pip install huggingface_hub")
from hub import COMMITS, Hub  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(built, tmp_path_factory):
    """The stand-in with a model, CLIP files and features, as this process and, by ``environ``, others see it."""
    clip = saved(toy_state(WIDTH))
    features = {f"features/{path.name}": path.read_bytes() for path in (built.folder / "features").iterdir()}
    arrays = io.BytesIO()
    np.savez(arrays, one=np.ones((5, 4), np.float32), two=np.ones((7, 4), np.float32))
    theirs = {"model.safetensors": b"", "pytorch_model.bin": saved(huggingface_model(toy_state(WIDTH)).state_dict())}
    hub = Hub(
        {
            "lab/models": {"ucf/best.pth": (built.folder / "model.pth").read_bytes(), "clip.pt": clip},
            "lab/moving": {"clip.pt": {"v1": saved(toy_state(WIDTH, seed=1)), "main": clip}},
            "lab/gelu": theirs | {"config.json": b'{"text_config": {"hidden_act": "gelu"}}'},
            "lab/quick": theirs | {"config.json": b'{"text_config": {"hidden_act": "quick_gelu"}}'},
            "datasets/lab/features": features | {"other/arrays.npz": arrays.getvalue(), "README.md": b"of the tests"},
            "lab/asked": {"clip.pt": clip},
        },
        gated=["lab/asked"],
    )
    cache = tmp_path_factory.mktemp("hub")
    with hub.serving() as url, pytest.MonkeyPatch.context() as patch:
        # What it computes from HF_ENDPOINT when it is imported.
        patch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", url)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        hub.environ = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache)}
        yield hub


def recorded(path):
    with open(path, newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


def test_a_model_is_tested_and_recorded_with_its_commit(tiny, hub, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    name = f"hf:lab/models@{COMMITS['main']}/ucf/best.pth"
    assert tiny.test("--output-dir", here).code == 0
    outcome = tiny.test("--output-dir", there, "--model-path", "hf:lab/models/ucf/best.pth")
    assert outcome.code == 0 and name in outcome.out, outcome.err
    assert (there / "test_metrics.json").read_bytes() == (here / "test_metrics.json").read_bytes()
    ours, theirs = (recorded(folder / "test_data.csv")["model_path"] for folder in (here, there))
    assert theirs == ours | {"path": name}


def test_a_training_starts_from_the_hub_and_is_repeated_from_its_record(tiny, hub, tmp_path, no_plots):
    start = ["--clip", "hf:lab/moving/clip.pt", "--init-from", "hf:lab/models/ucf/best.pth"]
    features = ["--feature-root", "hf:datasets/lab/features/features"]
    moved = tiny.folder / "features"
    moved.rename(tmp_path / "elsewhere")
    outcome = tiny.train(*start, *features, "--max-epoch", 1)
    assert outcome.code == 0, outcome.err
    run, clip = tiny.work / "run", f"hf:lab/moving@{COMMITS['main']}/clip.pt"
    options = yaml.safe_load((run / "options.yaml").read_text())
    assert options["clip"] == clip and options["init_from"] == f"hf:lab/models@{COMMITS['main']}/ucf/best.pth"
    assert read_model_file(run / "best.pt").hparams["clip"] == clip
    assert recorded(run / "data.csv")["clip"]["path"] == clip
    again = quietly(package_main, strings(["rerun", run, "--output-dir", tmp_path / "again"]))
    assert again.code == 0 and "data: unchanged" in again.out and "bit for bit" in again.out, again.err


def test_features_are_converted(hub, tmp_path):
    outcome = quietly(package_main, ["convert-features", "hf:datasets/lab/features/other", str(tmp_path / "npy")])
    assert outcome.code == 0, outcome.err
    assert np.load(tmp_path / "npy" / "two.npy").shape == (7, 4)


def test_weights_and_clip_are_read_in_python(tiny, hub):
    assert load_clip("hf:lab/moving/clip.pt").fingerprint == load_clip("toy", WIDTH).fingerprint
    first = load_clip("hf:lab/moving@v1/clip.pt")
    assert first.fingerprint != load_clip("toy", WIDTH).fingerprint
    assert first.source == f"hf:lab/moving@{COMMITS['v1']}/clip.pt"
    file = read_model_file("hf:lab/models/ucf/best.pth")
    options = file.hparams["options"]
    model = create_model(file.method, list(file.hparams["classes"].values()), "hf:lab/models/clip.pt", **options)
    load_weights(model, "hf://lab/models/ucf/best.pth")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in file.state.items())


def test_the_activation_in_the_repository_is_read(hub):
    load_clip("hf:lab/quick/pytorch_model.bin")
    with pytest.raises(UserError, match="computes with gelu"):
        load_clip("hf:lab/gelu/pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:lab/models/clap.pt", "hf:lab/models/clap.pt: no such file (did you mean 'clip.pt'?)"),
        ("hf:lab/models/clip.pt@v1", "did you mean 'clip.pt'"),
        ("hf:lab/models@v7/clip.pt", "lab/models has no revision v7"),
        ("hf:lab/nothing/clip.pt", "no repository lab/nothing, or a private one"),
        ("hf:lab/asked/clip.pt", "ask for access at https://huggingface.co/lab/asked, then run 'hf auth login'"),
        ("hf:lab/models", "write hf:owner/name/file"),
        ("hf:clip.pt", "write hf:owner/name/file"),
        ("hf:lab/models/ucf", "is a folder"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, name, says, capsys):
    assert package_main(["clip", name]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_nothing_is_written_to_the_hub(tiny, hub):
    outcome = tiny.train("--max-epoch", 1, "--model-path", "hf:lab/models/ucf/best.pth")
    assert outcome.code == 2 and "files of the Hub are only read" in outcome.err
    assert not (tiny.work / "run").exists()


def test_without_the_package_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        local_path("hf:lab/unread/clip.pt")
    assert pinned("ViT-B/16") == "ViT-B/16" and local_path("a/b") == Path("a/b")


@pytest.mark.slow
def test_a_file_in_the_cache_needs_no_network(hub, tmp_path):
    def run(name, **more):
        command = [sys.executable, "-m", "clipfusionvad", "clip", name]
        environ = {"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **hub.environ, **more}
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)

    first = run("hf:lab/models/clip.pt")
    assert first.returncode == 0, first.stderr
    offline = run("hf:lab/models/clip.pt", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == first.stdout
    assert f"hf:lab/models@{COMMITS['main']}/clip.pt" in offline.stdout
    missing = run("hf:lab/moving@v3/clip.pt", HF_HUB_OFFLINE="1")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "not in the Hub's cache, and the Hub cannot be reached" in missing.stderr
