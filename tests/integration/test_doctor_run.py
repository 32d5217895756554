"""The doctor on runs, installations, and the real lists of the benchmarks."""

import csv
import re
import shutil

import pytest
import torch
import yaml
from test_build_lists import SHARED, needs_shared
from tiny import make_tiny, quietly

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.doctor import groups, parse_recorded
from clipfusionvad.datasets import UCF
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_torch
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, installation, run_checks
from clipfusionvad.tools.doctor.installation import Installation, read_requirements
from clipfusionvad.tools.doctor.run import RunFolder

GROUPS = groups()


def doctor(*argv):
    return quietly(package_main, ["doctor", *map(str, argv)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training that has ended; never written to."""
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("trained") / "tiny")
    assert tiny.train("--max-epoch", 1).code == 0
    return tiny.folder / "run"


def found_in(run):
    return run_checks(GROUPS["run"], RunFolder(run, parse_recorded))


def change_options(**values):
    def change(run):
        path = run / "options.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    return change


def change_model(change):
    def plant(run):
        content = torch.load(run / "best.pt", weights_only=True)
        change(content)
        write_torch(run / "best.pt", content)

    return plant


def hparams(**values):
    return change_model(lambda content: content["hparams"].update(values))


def replace(name, pattern, new):
    def change(run):
        text, count = re.subn(pattern, new, (run / name).read_text(), count=1)
        assert count == 1
        (run / name).write_text(text)

    return change


def cut_state(run):
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-1000])


def spoil_weights(content):
    content["model_state_dict"]["classifier.bias"].fill_(float("nan"))


SECOND_LOSS, TORCH = r"(.*\n.*\n[^,]*,[^,]*),[^,]*", r'("torch": ")[^"]*'
RUN_MISTAKES = {
    "state truncated": (cut_state, "run-files", ERROR, "last.pt"),
    "state missing": (lambda run: (run / "last.pt").unlink(), "run-files", ERROR, "last.pt"),
    "not ended": (lambda run: (run / "metrics.json").unlink(), "run-files", WARNING, "metrics.json"),
    "metrics damaged": (lambda run: (run / "metrics.json").write_text("{"), "run-files", ERROR, "metrics.json"),
    "leftover": (lambda run: (run / ".last.pt.x.tmp").touch(), "run-files", NOTE, ".last.pt.x.tmp"),
    "unknown option": (change_options(learning_rate=1), "run-options", ERROR, "learning_rate"),
    "impossible option": (change_options(lr=-1), "run-options", ERROR, "options.yaml"),
    "no YAML": (lambda run: (run / "options.yaml").write_text("a: ["), "run-options", ERROR, "options.yaml"),
    "list gone": (change_options(train_list="gone.csv"), "run-data", WARNING, "gone.csv"),
    "other dataset": (hparams(dataset="msad"), "run-models", ERROR, "trained on msad"),
    "other method": (hparams(method="vadclip"), "run-models", ERROR, "checkpoint of vadclip"),
    "weights not finite": (change_model(spoil_weights), "run-models", ERROR, "classifier.bias holds NaN"),
    "other CLIP": (hparams(clip_fingerprint="0" * 16), "run-clip", ERROR, "pass the same --clip"),
    "loss not finite": (replace("losses.csv", SECOND_LOSS, r"\1,nan"), "run-losses", ERROR, "losses.csv, row 3"),
    "other torch": (replace("environment.json", TORCH, r"\g<1>2.0.0"), "run-environment", WARNING, "torch was 2.0.0"),
}


@pytest.mark.parametrize("name", RUN_MISTAKES)
def test_a_mistake_in_a_run_is_found(trained, tmp_path, name):
    run = shutil.copytree(trained, tmp_path / "run")
    plant, check, level, said = RUN_MISTAKES[name]
    plant(run)
    findings = found_in(run)
    assert any((f.check, f.level) == (check, level) and said in str(f) for f in findings), findings
    assert {finding.check for finding in findings} == {check}, findings


def test_nothing_is_found_in_a_run_and_every_seed_is_looked_at(trained, tmp_path):
    assert found_in(trained) == []
    outcome = doctor("--run", trained, "--only", "run")
    assert outcome.code == 0 and outcome.out.startswith(f"run {trained}\nnothing found")
    for seed in ("seed1", "seed2"):
        shutil.copytree(trained, tmp_path / "seeds" / seed)
    (tmp_path / "seeds" / "seed2" / "metrics.json").unlink()
    outcome = doctor("--run", tmp_path / "seeds", "--only", "run")
    assert outcome.code == 0 and "seed1\nrun " in outcome.out and "0 errors, 1 warning, 0 notes" in outcome.out


def test_this_installation_can_run_this_and_requirements_are_those_of_the_project():
    """Where the tests run there is no error; what the machine lacks may be a warning."""
    assert [finding for finding in run_checks(GROUPS["installation"], Installation()) if finding.level == ERROR] == []
    named = {re.split("[<>=]", text)[0] for text in read_requirements()}
    assert {"torch", "setuptools", "av", "transformers", "ray"} <= named


HERE = Installation().versions


@pytest.mark.parametrize(
    "given, check, said",
    [
        ({"versions": {**HERE, "av": None}}, "package-versions", "av is not installed"),
        ({"versions": {**HERE, "torch": "2.1.0"}}, "package-versions", "torch is 2.1.0, but >=2.6"),
        ({"versions": {**HERE, "setuptools": "82.0"}}, "package-versions", "setuptools is 82.0"),
        ({"versions": {**HERE, "torch": "2.9.1"}}, "torchvision-pairing", "not for 2.9.1"),
        ({"environ": {"OMP_NUM_THREADS": "all"}}, "threads", "'all'"),
        ({"environ": {"OMP_NUM_THREADS": "4096"}}, "threads", "4096"),
    ],
)
def test_a_mistake_in_the_installation_is_found(given, check, said):
    findings = run_checks(GROUPS["installation"], Installation(**given))
    assert any(finding.check == check and said in finding.what and finding.advice for finding in findings), findings


def test_folders_downloads_and_clip_are_looked_at(tmp_path, monkeypatch):
    def missing():
        raise UserError("CLIP needs the Python module 'pkg_resources': pip install 'setuptools<81'")

    monkeypatch.setattr(installation, "openai_clip", missing)
    (tmp_path / "runs").write_text("a file")
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "ViT-B-16.pt").write_bytes(b"broken off")
    findings = run_checks(GROUPS["installation"], Installation(folder=tmp_path, environ={"HOME": str(tmp_path)}))
    found = {finding.check: (finding.level, str(finding)) for finding in findings}
    for check, level, said in (
        ("disk", ERROR, "runs"),
        ("clip-weights", WARNING, "ViT-B-16.pt"),
        ("clip-import", ERROR, "setuptools<81"),
    ):
        assert found[check][0] == level and said in found[check][1]


@needs_shared
def test_real_clip_features_are_of_one_kind_and_normalised_ones_are_not(tmp_path):
    real = SHARED / "data" / "real_clip_features"
    cctv, ucf = sorted((real / "cctv10").glob("*0*.npy")), sorted((real / "ucf5").glob("*snip16*.npy"))

    def write(name, files):
        rows = [(path, next(c for c in UCF.labels if c[:5].lower() == path.stem[:5].lower())) for path in files]
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
        return tmp_path / name

    train = write("train.csv", cctv[::2])
    features = "feature-norms feature-direction same-features near-duplicates blank-snippets file-unreadable"

    def look(test):
        lists = ["--train-list", train, "--test-list", test, "--gt-path", "none"]
        return doctor("--dataset", "ucf", *lists, "--only", *features.split(), "feature-width", "feature-dtype")

    assert "nothing found" in look(write("test.csv", cctv[1::2])).out
    other = look(write("mixed.csv", ucf))
    assert other.code == 1 and "the features' norm is 0.99" in other.out and "feature-direction" not in other.out
