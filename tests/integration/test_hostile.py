"""Files made to do harm: each does with the plain reader, and is refused here in one line."""

import contextlib
import io
import json
import re
import tracemalloc
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from refusal import RunsCode
from small_report import detection_page, index_page, write_test
from tiny import quietly, strings

from clipfusionvad.__main__ import main
from clipfusionvad.data.annotations import read_annotations
from clipfusionvad.data.features import load_features
from clipfusionvad.data.lists import read_list
from clipfusionvad.datasets import MSAD, UCF
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.extraction.extract import extract_video
from clipfusionvad.extraction.jobs import EncoderConfig, FeatureManifest, Job, find_videos
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.errors import UserError, error_line
from clipfusionvad.io.files import read_json
from clipfusionvad.io.npy import read_array
from clipfusionvad.models.clip import load_clip
from clipfusionvad.report.results import TEST_SCORES
from clipfusionvad.report.scores import read_scores


def refused(read, says=""):
    """The one line with which a reader refuses."""
    with pytest.raises(UserError) as caught:
        read()
    line = error_line(caught.value)
    assert line.isprintable() and says in line
    return line


def test_a_pickle_in_a_scores_file_does_not_run(tmp_path):
    """In other files: test_bad_input.py, test_model_files.py."""
    path, ran, about = tmp_path / "file.npz", tmp_path / "ran", np.empty(1, object)
    about[0] = RunsCode(ran)
    np.savez(path, about=about)
    refused(lambda: read_scores(path), str(path))
    assert not ran.exists()
    dict(np.load(path, allow_pickle=True))
    assert ran.exists()


class Script(torch.nn.Module):
    """TorchScript that runs code when it is loaded: ``torch.jit.load`` calls ``__setstate__``."""

    @torch.jit.export
    def __getstate__(self):
        return torch.zeros(2), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        assert state[0].sum() > 5, "the archive's code was run"
        self.training = state[1]

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_not_run(tmp_path):
    path = str(tmp_path / "clip.pt")
    torch.jit.script(Script()).save(path)
    with pytest.raises(torch.jit.Error, match="the archive's code was run"):
        torch.jit.load(path)
    assert "code was run" not in refused(lambda: load_clip(path), "holds no state dict")


def header_of(shape, dtype="<f4", data=b"\0" * 64):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@contextlib.contextmanager
def at_most(memory):
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < memory
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(10**9, 64), (10**12, 64), (2**63, 2**63), (-4, -4)])
def test_arrays_that_are_larger_than_their_file(shape, tmp_path):
    path = tmp_path / "huge.npy"
    path.write_bytes(header_of(shape))
    with at_most(2**20):
        refused(lambda: load_features(path), str(path))
        refused(lambda: read_array(path, "truth"), str(path))


def test_a_pickle_that_wants_sixty_gigabytes_for_its_memo(tmp_path):
    program = b"\x80\x02]r\xff\xff\xff\xff."
    (tmp_path / "a.npy").write_bytes(header_of((1,), "|O", program))
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("last/data.pkl", program)
    refused(lambda: read_array(tmp_path / "a.npy", "truth"), "not a readable .npy")
    refused(lambda: read_model_file(tmp_path / "last.ckpt"), "last.ckpt")


def test_zip_bombs(tmp_path):
    write_test(tmp_path)
    with np.load(tmp_path / TEST_SCORES) as file:
        np.savez_compressed(tmp_path / "bomb.npz", **{**file, "anomaly": np.zeros((2, 10**7))})
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    with at_most(2**22):
        refused(lambda: read_scores(tmp_path / "bomb.npz"), "bomb.npz")
        refused(lambda: read_model_file(tmp_path / "bomb.pth"), "bomb.pth")


def test_deep_json(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"videos":' * 100_000)
    refused(lambda: read_json(path, "metrics"), "not readable JSON")
    refused(lambda: read_annotations(path, MSAD), "not valid JSON")
    assert FeatureManifest(tmp_path).records == {}
    refused(lambda: find_videos([path]), "no videos")


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a/../../escaped", "a\nb", "\x1b[2J", "a\0b", ""])
def test_names_in_a_manifest_stay_in_their_folder(name, tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"video": name, "source": "a.mp4"}) + "\n")
    refused(lambda: find_videos([path]), "cannot be the name")


def test_a_link_out_of_the_output_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    job = Job("a.mp4", "sub/a", str(tmp_path / "out"), ExtractOptions(crops=(0,)), EncoderConfig("toy", 64, "cpu"))
    refused(lambda: extract_video(job), "is outside")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_paths_in_lists_stay_below_the_feature_root(tmp_path):
    (tmp_path / "root").mkdir()
    np.save(tmp_path / "secret.npy", np.zeros((2, 4), np.float32))
    path = tmp_path / "lists" / "very" / "deep" / "list.csv"
    path.parent.mkdir(parents=True)
    path.write_text("path,label\n../secret.npy,Normal\n")
    refused(lambda: read_list(path, tmp_path / "root", UCF), "not found")
    path.write_text('path,label\n"a\n\x1b[2Jb.npy",Normal\n')
    refused(lambda: read_list(path, tmp_path / "root", UCF), "not found")


@pytest.mark.parametrize("key, value", [("dataset", "../x"), ("dataset", "os.path"), ("method", []), ("options", 3)])
def test_origins_in_a_model_file(key, value, tmp_path):
    made = {"method": "iefvad", "dataset": "ucf", "options": {}, "clip": None} | {key: value}
    content = {"format": "clipfusionvad-1", "made": made, "model_state_dict": {"w": torch.zeros(1)}}
    torch.save(content, tmp_path / "model.pth")
    refused(lambda: read_model_file(tmp_path / "model.pth"), "no valid hyper-parameters")


SCRIPT = "<script>alert(1)</script>"
NAMES = [SCRIPT, f"</script>{SCRIPT}", "\"><img src=x onerror='alert(1)'>", "{{7*7}}"]


class Elements(HTMLParser):
    """Every element of a page with the names of its attributes, and the text of scripts that run."""

    def __init__(self, text):
        super().__init__()
        self.seen, self._runs = set(), False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.add((tag, *sorted(name for name, _ in attributes)))
        self._runs = tag == "script" and ("type", "application/json") not in attributes

    def handle_endtag(self, tag):
        self._runs = False

    def handle_data(self, data):
        self.seen |= {data} if self._runs else set()


def run_page(folder, name):
    """Names of videos: test_report.py."""
    write_test(folder, options={"method": name, "dataset": name, "model_path": name, name: name})
    outcome = quietly(main, strings(["report", folder]))
    assert outcome.code == 0, outcome.err
    return (folder / "report.html").read_text(encoding="utf-8")


def video_page(folder, name):
    values = {"title": name, "video": f"{name}.mp4", "facts": {name: name}, "classes": {name: [0.5, 0.8, 0.7]}}
    return detection_page(segments=[{"start": 0.5, "end": 1.1, "label": name, "confidence": 0.9}], **values)


def listing(folder, name):
    return index_page(name, {"name": name, "page": f"{name}.html", "line": name})


@pytest.mark.parametrize("make", [run_page, video_page, listing])
def test_no_name_becomes_an_element_or_an_attribute(make, tmp_path):
    plain = Elements(make(tmp_path / "plain", "plain"))
    for number, name in enumerate(NAMES):
        text = make(tmp_path / str(number), name)
        assert Elements(text).seen == plain.seen
        assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)
