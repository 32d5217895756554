"""The house rules that a change could break without any other test noticing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import clipfusionvad
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.datasets import DATASETS
from clipfusionvad.models import method_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clipfusionvad"
# Each floor may import from those below it only.
FLOORS = [
    ("__main__",),
    ("cli",),
    ("tools",),
    ("extraction", "report"),
    ("engine",),
    ("models",),
    ("data", "metrics"),
    ("datasets", "losses"),
    ("io",),
]


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def floor(name):
    return next(level for level, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


def imported(path):
    """Modules of the package that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "clipfusionvad" else [f"clipfusionvad.{a.name}" for a in node.names]
        yield from (name.removeprefix("clipfusionvad.") for name in names if name.startswith("clipfusionvad."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for other in imported(path):
        assert floor(own) <= floor(other), f"{own} imports {other}, which stands above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_names_a_method_or_a_dataset(path):
    own = {path.stem} | ({*DATASETS} if path.stem == "datasets" else set())
    names = {*method_names(), *DATASETS} - own - {"clipfusionvad"}  # also the name of the package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[-1] not in {name for name in method_names()} - {"clipfusionvad"}


WITHOUT = """
import importlib, os, pkgutil, sys
import matplotlib.pyplot, pandas, sklearn.metrics, torch.utils.tensorboard
if importlib.util.find_spec("transformers"):
    import transformers

class Removed:
    def find_spec(self, name, path=None, target=None):
        if name == f"clipfusionvad.models.{method}":
            raise ModuleNotFoundError(name, name=name)

def try_without(method):
    sys.meta_path.insert(0, Removed())
    listed = pkgutil.iter_modules
    pkgutil.iter_modules = lambda path=None, prefix="": [m for m in listed(path, prefix) if m.name != method]
    import clipfusionvad.__main__, clipfusionvad.cli.train, clipfusionvad.cli.test
    from clipfusionvad.io.errors import UserError
    from clipfusionvad.models import method_names, create_model
    assert method_names() == [name for name in methods if name != method], method_names()
    for name in method_names():
        try:
            create_model(name, ["normal", "fire"], clip="toy", embed_dim=64, visual_width=64)
        except UserError as error:
            assert "pip install" in str(error), error  # a package that only this method needs

methods = sys.argv[1:]
for method in methods:
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert not code, method
    else:
        try_without(method)
        os._exit(0)
"""


def test_without_one_methods_file_the_others_still_work():
    """Each in a process that has loaded nothing of the package yet."""
    program = [sys.executable, "-c", WITHOUT, *method_names()]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command_once(capsys):
    package_main(["--help"])
    listed = [line.split()[0].replace("-", "_") for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    there = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - {
        "__init__",
        "load",
        "prepare",
        "task",
        "options",
        "option_files",
        "parser",
    }
    assert sorted(listed) == sorted(there)
    for command in listed:
        assert callable(importlib.import_module(f"clipfusionvad.cli.{command}").main)


def test_no_file_has_become_a_drawer():
    for path in [*modules(), *ROOT.glob("*.py")]:
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.name} has {lines} lines: is it two files?"
        assert path.stem not in ("utils", "helpers", "common", "misc")


def test_every_file_that_names_the_version_names_the_same():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    assert cited["version"] == newest == clipfusionvad.__version__


def test_no_command_waits_for_what_only_a_compiled_training_needs():
    """torch's compiler takes two seconds to load."""
    names = [path.stem for path in (PACKAGE / "cli").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(f'clipfusionvad.cli.{name}' for name in names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch._dynamo", "transformers", "ray", "optuna", "onnx"} & set(done.stdout.split())


def test_a_list_of_commands_does_not_wait_for_torch():
    code = """
import sys
from clipfusionvad.__main__ import main
main(["--help"]), main(["tain"])
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "did you mean 'train'" in done.stderr, done.stderr
