"""OpenAI's files: downloaded once, whole or not at all, checked, and listed with where to get them by hand."""

import hashlib
import io
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.io.errors import UserError
from clipfusionvad.models.clip import load_clip, openai_clip, openai_files, tokenize, toy_state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def model():
    openai_clip()
    from clip.model import build_model

    return build_model(toy_state(64)).float()


@pytest.fixture(scope="module")
def content(model):
    """A TorchScript archive, which is what OpenAI's files are."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (torch.zeros(1, 3, 224, 224), tokenize(["normal"]))), file)
    return file.getvalue()


@pytest.fixture
def served(content, tmp_path, monkeypatch):
    """The bytes that the address of ViT-B/16 answers with, in a list, and an empty home folder."""
    answers, asked = [content], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(answers[-1])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    openai_clip()
    url = f"http://127.0.0.1:{server.server_port}/models/{hashlib.sha256(content).hexdigest()}/ViT-B-16.pt"
    monkeypatch.setattr("clip.clip._MODELS", {"ViT-B/16": url})
    monkeypatch.setenv("HOME", str(tmp_path))
    yield answers, asked
    server.shutdown()
    server.server_close()


def files_in(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_model_is_downloaded_once_and_reported(served, tmp_path, content, model, capsys):
    answers, asked = served
    assert package_main(["clip"]) == 0
    assert re.search("ViT-B/16 +not here .*ViT-B-16.pt", capsys.readouterr().out) and not asked
    loaded = load_clip("ViT-B/16")
    assert loaded.state.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state[key], value) for key, value in model.state_dict().items())
    assert package_main(["clip", "ViT-B/16"]) == 0
    out = capsys.readouterr().out
    assert len(asked) == 1 and files_in(tmp_path) == ["ViT-B-16.pt"]
    for words in (
        f"{tmp_path}/.cache/clip/ViT-B-16.pt",
        f"{len(content):,} bytes",
        f"{hashlib.sha256(content).hexdigest()}: that of OpenAI's ViT-B/16",
        f"fingerprint {loaded.fingerprint}, --embed-dim 64",
        f"fingerprint {loaded.image_fingerprint}, --visual-width 64",
    ):
        assert words in out
    assert package_main(["clip"]) == 0 and re.search("ViT-B/16 +here ", capsys.readouterr().out)


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_broken_download_leaves_nothing_and_says_what_to_do(served, tmp_path, content, cut, capfd):
    answers, _ = served
    answers.append(content[:cut])
    assert package_main(["clip", "ViT-B/16"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    for words in (
        *map(str, openai_files()["ViT-B/16"]),
        "350,837,078 bytes",
        f"save it as {tmp_path}/.cache/clip/ViT-B-16.pt",
        "--clip toy",
    ):
        assert words in error
    assert files_in(tmp_path) == []


def test_a_file_with_a_wrong_checksum_is_named_and_downloaded_again(served, tmp_path, content, capfd):
    answers, asked = served
    path = tmp_path / ".cache" / "clip" / "ViT-B-16.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content[:1000])
    assert package_main(["clip"]) == 0 and "wrong checksum" in capfd.readouterr().out
    answers.append(b"a page that asks to sign in")
    damaged = f"{path} is not OpenAI's file or is incomplete: 1,000 bytes"
    with pytest.raises(UserError, match=f"{damaged}.*could not be downloaded.*get http"):
        load_clip("ViT-B/16")
    assert path.read_bytes() == content[:1000] and files_in(tmp_path) == ["ViT-B-16.pt"]
    answers.append(content)
    load_clip("ViT-B/16")
    assert path.read_bytes() == content and damaged in capfd.readouterr().err


def test_a_copy_of_openais_file_and_other_files_are_told_apart(served, tmp_path, content, capsys):
    copy, other = tmp_path / "copy.pt", tmp_path / "other.pt"
    copy.write_bytes(content)
    text_only = {key: value for key, value in toy_state(64).items() if not key.startswith("visual.")}
    torch.save(text_only, other)
    assert load_clip(str(copy)).image_fingerprint == load_clip("ViT-B/16").image_fingerprint
    assert package_main(["clip", str(copy)]) == 0
    assert "that of OpenAI's ViT-B/16" in capsys.readouterr().out
    assert package_main(["clip", str(other)]) == 0
    out = capsys.readouterr().out
    assert "not of OpenAI" in out and re.search("image tower +none", out)
    assert package_main(["clip", "toy"]) == 0 and "--embed-dim 512" in capsys.readouterr().out
    assert package_main(["clip", "ViT-B16"]) == 2 and "did you mean 'ViT-B/16'" in capsys.readouterr().err
