"""The doctor on runs, installations, and the real lists of the benchmarks."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from test_build_lists import SHARED, needs_shared
from tiny import make_tiny, quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.doctor import groups, parse_recorded
from clipfusionvad.datasets import DATASETS, SHANGHAITECH, UCF, XD
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_torch
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, installation, run_checks
from clipfusionvad.tools.doctor.installation import Installation, read_requirements
from clipfusionvad.tools.doctor.run import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training that has ended; never written to."""
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("trained") / "tiny")
    assert tiny.train("--max-epoch", 1).code == 0
    return tiny


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained.folder / "run", tmp_path / "run")
    return tmp_path / "run"


GROUPS = groups()


def found_in(folder):
    return run_checks(GROUPS["run"], RunFolder(folder, parse_recorded))


def change_environment(run):
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"packages": {"torch": "2.0.0"}}))


def change_options(run, **values):
    path = run / "options.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def change_model(run, change):
    content = torch.load(run / "best.pt", weights_only=True)
    change(content)
    write_torch(run / "best.pt", content)


def changed(**hparams):
    return lambda run: change_model(run, lambda content: content["hparams"].update(hparams))


def spoil_weights(run):
    change_model(run, lambda content: content["model_state_dict"]["classifier.bias"].fill_(float("nan")))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_losses(run):
    lines = (run / "losses.csv").read_text().splitlines()
    lines[2] = lines[2].replace(lines[2].split(",")[2], "nan")
    (run / "losses.csv").write_text("\n".join(lines))


RUN_MISTAKES = {
    "state truncated": (lambda run: cut(run / "last.pt"), "run-files", ERROR, "last.pt"),
    "state missing": (lambda run: (run / "last.pt").unlink(), "run-files", ERROR, "last.pt"),
    "not ended": (lambda run: (run / "metrics.json").unlink(), "run-files", WARNING, "metrics.json"),
    "metrics damaged": (lambda run: (run / "metrics.json").write_text("{"), "run-files", ERROR, "metrics.json"),
    "leftover": (lambda run: (run / ".last.pt.x.tmp").touch(), "run-files", NOTE, ".last.pt.x.tmp"),
    "unknown option": (lambda run: change_options(run, learning_rate=1), "run-options", ERROR, "learning_rate"),
    "impossible option": (lambda run: change_options(run, lr=-1), "run-options", ERROR, "options.yaml"),
    "no YAML": (lambda run: (run / "options.yaml").write_text("a: ["), "run-options", ERROR, "options.yaml"),
    "list gone": (lambda run: change_options(run, train_list="gone.csv"), "run-data", WARNING, "gone.csv"),
    "other dataset": (changed(dataset="msad"), "run-models", ERROR, "trained on msad"),
    "other method": (changed(method="vadclip"), "run-models", ERROR, "checkpoint of vadclip"),
    "weights not finite": (spoil_weights, "run-models", ERROR, "classifier.bias holds NaN"),
    "other CLIP": (changed(clip_fingerprint="0" * 16), "run-clip", ERROR, "pass the same --clip"),
    "loss not finite": (spoil_losses, "run-losses", ERROR, "losses.csv, row 3"),
    "other torch": (change_environment, "run-environment", WARNING, "torch was 2.0.0"),
}


def test_nothing_is_found_in_a_run(run):
    assert found_in(run) == []
    outcome = quietly(package_main, ["doctor", "--run", str(run), "--only", "run"])
    assert outcome.code == 0 and outcome.out.startswith(f"run {run}\nnothing found")


@pytest.mark.parametrize("name", RUN_MISTAKES)
def test_a_mistake_in_a_run_is_found(run, name):
    plant, check, level, said = RUN_MISTAKES[name]
    plant(run)
    findings = found_in(run)
    assert any((f.check, f.level) == (check, level) and said in str(f) for f in findings), findings
    assert {finding.check for finding in findings} == {check}, findings


def test_every_seed_of_a_run_is_looked_at(trained, tmp_path, run):
    for seed in ("seed1", "seed2"):
        shutil.copytree(run, tmp_path / "seeds" / seed)
    (tmp_path / "seeds" / "seed2" / "metrics.json").unlink()
    outcome = quietly(package_main, ["doctor", "--run", str(tmp_path / "seeds"), "--only", "run"])
    assert outcome.code == 0 and "seed1\nrun " in outcome.out and "0 errors, 1 warning, 0 notes" in outcome.out


def test_this_installation_can_run_this():
    """Where the tests run there is no error; what the machine lacks may be a warning."""
    assert [finding for finding in run_checks(GROUPS["installation"], Installation()) if finding.level == ERROR] == []


def test_requirements_are_those_of_the_project():
    named = {re.split("[<>=]", text)[0] for text in read_requirements()}
    assert {"torch", "setuptools", "av", "transformers", "ray"} <= named


HERE = Installation().versions
INSTALLATION_MISTAKES = {
    "package missing": ({"versions": {**HERE, "av": None}}, "package-versions", "av is not installed"),
    "package too old": ({"versions": {**HERE, "torch": "2.1.0"}}, "package-versions", "torch is 2.1.0, but >=2.6"),
    "setuptools too new": ({"versions": {**HERE, "setuptools": "82.0"}}, "package-versions", "setuptools is 82.0"),
    "torchvision unpaired": ({"versions": {**HERE, "torch": "2.9.1"}}, "torchvision-pairing", "not for 2.9.1"),
    "threads no number": ({"environ": {"OMP_NUM_THREADS": "all"}}, "threads", "'all'"),
    "too many threads": ({"environ": {"OMP_NUM_THREADS": "4096"}}, "threads", "4096"),
}


@pytest.mark.parametrize("name", INSTALLATION_MISTAKES)
def test_a_mistake_in_the_installation_is_found(name):
    given, check, said = INSTALLATION_MISTAKES[name]
    findings = run_checks(GROUPS["installation"], Installation(**given))
    assert any(finding.check == check and said in finding.what and finding.advice for finding in findings), findings


def test_folders_and_downloads_are_looked_at(tmp_path):
    (tmp_path / "runs").write_text("a file")
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "ViT-B-16.pt").write_bytes(b"broken off")
    findings = run_checks(GROUPS["installation"], Installation(folder=tmp_path, environ={"HOME": str(tmp_path)}))
    by_check = {finding.check: finding for finding in findings}
    assert by_check["disk"].level == ERROR and "runs" in by_check["disk"].what
    assert by_check["clip-weights"].level == WARNING and by_check["clip-weights"].file.endswith("ViT-B-16.pt")


def test_clip_that_cannot_be_imported_says_what_to_do(monkeypatch):
    def missing():
        raise UserError("CLIP needs the Python module 'pkg_resources': pip install 'setuptools<81'")

    monkeypatch.setattr(installation, "openai_clip", missing)
    (finding,) = run_checks({"clip-import": installation.clip_import}, Installation())
    assert finding.level == ERROR and "setuptools<81" in finding.what


WIDTH = 8
ANNOTATIONS = {
    "ucf": ["Temporal_Anomaly_Annotation.txt"],
    "xd": ["annotations.txt", "annotations_multiclasses.txt"],
    "shanghaitech": ["shang_annotations.txt"],
    "msad": ["msad_annotations.txt"],
}
# Long enough for every interval where the true length is not known.
UNKNOWN_LENGTH = 700


def real_videos(dataset, side):
    """(name with folder, snippets) of the benchmark's videos."""
    folder = SHARED / "data" / "lists" / dataset.name
    lengths = {}
    known = SHARED / f"data/benchmarks/{dataset.name}_test_videos.csv"
    if known.is_file():
        with open(known, newline="") as file:
            rows = list(csv.DictReader(file))
        column = next(name for name in rows[0] if name.startswith("n_snippets"))
        lengths = {row["video"]: int(row[column]) for row in rows}
    if dataset is UCF and side == "train":
        names = [line.strip().removesuffix(".mp4") for line in open(folder / "Anomaly_Train.txt") if line.strip()]
    else:
        with open(folder / f"{side}_videos.csv", newline="") as file:
            names = [row["video"] for row in csv.DictReader(file)]
    # Training videos of ShanghaiTech that are annotated are 40 snippets long.
    short = 40 if dataset is SHANGHAITECH and side == "train" else 20
    return [(name, lengths.get(name.split("/")[-1], short if side == "train" else UNKNOWN_LENGTH)) for name in names]


def make_real_lists(dataset, folder, protocol):
    rng = np.random.default_rng(0)
    for side, crop in (("train", dataset.test_crop), ("test", dataset.test_crop)):
        for name, snippets in real_videos(dataset, side):
            path = folder / "features" / side / f"{name}__{crop}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.normal(size=(snippets, WIDTH)).astype(np.float16))
    files = [str(SHARED / "data" / "lists" / dataset.name / name) for name in ANNOTATIONS[dataset.name]]
    argv = ["--features", str(folder / "features"), "--output", str(folder / "list"), "--annotations", *files]
    assert quietly(package_main, ["lists", "--dataset", dataset.name, "--protocol", protocol, *argv]).code == 0


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("name", "protocol"),
    [(name, "paper") for name in DATASETS] + [(name, "clean") for name in DATASETS if DATASETS[name].misplaced],
)
def test_real_lists_have_known_quirks_only(name, protocol, tmp_path):
    dataset, lists = DATASETS[name], tmp_path / "list"
    make_real_lists(dataset, tmp_path, protocol)
    files = {"--train-list": dataset.list_files["train"], "--test-list": dataset.list_files["test"]}
    arrays = {"--gt-path": "frames", "--gt-segment-path": "segments", "--gt-label-path": "labels"}
    keyed = {"--gt-path": dataset.list_files["truth"]}
    released = {flag: dataset.truth_files[kind] for flag, kind in arrays.items()}
    # Large lists are looked at once.
    for truth in [keyed, released] if dataset.misplaced else [released]:
        flags = [item for flag, file in (files | truth).items() for item in (flag, str(lists / file))]
        argv = ["doctor", "--dataset", name, "--only", "data", "--visual-width", str(WIDTH), *flags]
        outcome = quietly(package_main, [*argv, "--json", str(tmp_path / "found.json")])
        found = json.loads((tmp_path / "found.json").read_text())["findings"]
        assert outcome.code == 0 and {finding["level"] for finding in found} <= {NOTE}, outcome.out
        named = {finding["what"].split()[0] for finding in found if finding["check"] == "misplaced-videos"}
        assert named == (set(dataset.misplaced) if protocol == "paper" else set())
        odd = {
            f["what"] for f in found if f["check"] in ("segment-labels", "segment-order") and "official" in f["advice"]
        }
        expected = dataset.annotation_quirks if dataset is XD or protocol == "clean" else set()
        assert {video for video in dataset.annotation_quirks if any(video in what for what in odd)} == set(expected)


@needs_shared
def test_real_clip_features_are_of_one_kind_and_normalised_ones_are_not(tmp_path):
    real = SHARED / "data" / "real_clip_features"
    cctv, ucf = sorted((real / "cctv10").glob("*0*.npy")), sorted((real / "ucf5").glob("*snip16*.npy"))
    label = {"assault": "Assault", "fighting": "Fighting", "normal": "Normal"}

    def write(name, files):
        rows = [(str(path), label.get(path.stem[:-3], path.stem[:5])) for path in files]
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *((p, v if v != "Arres" else "Arrest") for p, v in rows)])

    write("train.csv", cctv[::2])
    write("test.csv", cctv[1::2])
    write("mixed.csv", ucf)
    features = [name.replace("_", "-") for name in ("feature_norms", "feature_direction", "same_features")]
    features += ["near-duplicates", "blank-snippets", "file-unreadable", "feature-width", "feature-dtype"]

    def look(test):
        lists = ["--train-list", str(tmp_path / "train.csv"), "--test-list", str(tmp_path / test), "--gt-path", "none"]
        return quietly(package_main, ["doctor", "--dataset", "ucf", *lists, "--only", *features])

    assert "nothing found" in look("test.csv").out
    other = look("mixed.csv")
    assert other.code == 1 and "the features' norm is 0.99" in other.out and "feature-direction" not in other.out
