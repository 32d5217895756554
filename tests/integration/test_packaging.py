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
    for source in (ROOT / name for name in BUILT_FROM):
        if source.is_dir():
            shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", str(copy)]
    done = subprocess.run([*command, "-w", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


# Runs several commands in one process, since starting one takes seconds; prints code, output and errors of each.
PROGRAM = """
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


def test_the_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
        commands = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "clipfusionvad = clipfusionvad.__main__:main" in archive.read(commands).decode()
    package = [path for path in (ROOT / "clipfusionvad").rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in package if "__pycache__" not in path.parts}
    expected |= {f"clipfusionvad/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert there == expected | {"ucf_option.py", "xd_option.py"}
    assert wheel.name.startswith(f"clipfusionvad-{clipfusionvad.__version__}-")


def test_it_works_outside_the_repository(wheel, tmp_path):
    """The version, a pair's published settings, configs by their name, and the user's own before them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vadclip_ucf.yaml").write_text("method: vadclap\n")
    flags = ["--dataset", "ucf", "--train-list", "no.csv", "--device", "cpu"]
    commands = [
        ["--version"],
        ["train", "--method", "anomalyclip", "--dataset", "xd", "--help"],
        ["train", "--config", "configs/variants/reflipvad_repo_ucf.yaml", *flags],
        ["train", "--config", "configs/nothing.yaml", *flags],
        ["train", "--config", "configs/vadclip_ucf.yaml", *flags],
        ["sweep", "configs/ablations/anomalyclip_losses_ucf.yaml", "--dataset", "ucf", "--method", "vadclip"],
    ]
    settings = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=settings)
    assert done.returncode == 0, done.stderr
    version, shown, ours, unknown, own, tables = json.loads(done.stdout.splitlines()[-1])
    assert version == [0, f"{clipfusionvad.__version__}\n", ""]
    pair = yaml.safe_load((ROOT / "configs" / "anomalyclip_xd.yaml").read_text(encoding="utf-8"))
    words = " ".join(shown[1].split())
    assert shown[0] == 0 and f"width of the temporal model (default: {pair['emb_size']})" in words
    assert f"learning rate (default: {pair['lr']})" in words
    assert ours[0] == 2 and "no.csv" in ours[2]
    assert unknown[0] == 2 and "configs/nothing.yaml" in unknown[2] and unknown[2].count("\n") == 1
    assert own[0] == 2 and "vadclap" in own[2]
    assert tables[0] == 2 and "topk_abn_weight" in tables[2] and "an option of" in tables[2]
