"""The wheel: what is in it, and that it works where the repository is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import clipfusionvad

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ["clipfusionvad", "configs", "pyproject.toml", "README.md", "LICENSE", "ucf_option.py", "xd_option.py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the repository."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", str(copy)]
    done = subprocess.run([*command, "-w", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs commands in a folder with the wheel's content on the path and nothing of the repository.

    They share a process, since starting one takes seconds; gives code, output and errors of each.
    """
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    program = """
import contextlib, io, json, sys
from clipfusionvad.__main__ import main
results = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    results.append([code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""

    def run(*commands, cwd):
        settings = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", program, json.dumps(commands)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=settings)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
        commands = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "clipfusionvad = clipfusionvad.__main__:main" in archive.read(commands).decode()
    package = [
        path for path in (ROOT / "clipfusionvad").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"clipfusionvad/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert there == expected | {"ucf_option.py", "xd_option.py"}
    assert wheel.name.startswith(f"clipfusionvad-{clipfusionvad.__version__}-")


def test_it_works_outside_the_repository(installed, tmp_path):
    """The version, a pair's published settings, configs by their name, and the user's own before them."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vadclip_ucf.yaml").write_text("method: vadclap\n")
    flags = ["--dataset", "ucf", "--train-list", "no.csv", "--device", "cpu"]
    version, shown, ours, unknown, own, tables = installed(
        ["--version"],
        ["train", "--method", "anomalyclip", "--dataset", "xd", "--help"],
        ["train", "--config", "configs/variants/reflipvad_repo_ucf.yaml", *flags],
        ["train", "--config", "configs/nothing.yaml", *flags],
        ["train", "--config", "configs/vadclip_ucf.yaml", *flags],
        ["sweep", "configs/ablations/anomalyclip_losses_ucf.yaml", "--dataset", "ucf", "--method", "vadclip"],
        cwd=tmp_path,
    )
    assert version == [0, f"{clipfusionvad.__version__}\n", ""]
    pair = yaml.safe_load((ROOT / "configs" / "anomalyclip_xd.yaml").read_text(encoding="utf-8"))
    words = " ".join(shown[1].split())
    assert shown[0] == 0 and f"width of the temporal model (default: {pair['emb_size']})" in words
    assert f"learning rate (default: {pair['lr']})" in words
    assert ours[0] == 2 and "no.csv" in ours[2]
    assert unknown[0] == 2 and "configs/nothing.yaml" in unknown[2] and unknown[2].count("\n") == 1
    assert own[0] == 2 and "vadclap" in own[2]
    assert tables[0] == 2 and "topk_abn_weight" in tables[2] and "an option of" in tables[2]
