"""The structure of the repository: the direction of imports, one file per method, the list of commands, sizes."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import yaml

import clipfusionvad
from clipfusionvad import cli
from clipfusionvad.__main__ import main as package_main
from clipfusionvad.datasets import DATASETS
from clipfusionvad.models import method_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clipfusionvad"
# A room imports from its own level and those after it.
LEVELS = "__main__|cli|tools|extraction report|engine|models|data metrics|datasets losses|io".split("|")
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def level(module):
    return next(number for number, rooms in enumerate(LEVELS) if module.split(".")[0] in rooms.split())


def imports(tree):
    """Modules of the package that a file imports, without the package's name."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("clipfusionvad.") for name in names if name.startswith("clipfusionvad."))


def run_python(code, *arguments):
    """The modules that are loaded after some code has run, and what it wrote on stderr."""
    code += "\nimport sys; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {*done.stdout.splitlines()[-1].split()}, done.stderr


def test_imports_run_one_way():
    wrong = [(own, other) for own in TREES for other in imports(TREES[own]) if level(own) > level(other)]
    assert not wrong


def test_nothing_else_names_a_method_or_a_dataset():
    """Methods with a config, except ``clipfusionvad``, which is also the package's name."""
    configs = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    methods = {name for name in method_names() if any(config.startswith(name) for config in configs)}
    methods -= {"clipfusionvad"}
    for own, tree in TREES.items():
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        named = words & (methods | ({*DATASETS} if own != "datasets" else set()))
        named |= {other.split(".")[1] for other in imports(tree) if other.startswith("models.")} & methods
        # The package's __init__ of methods translates the older names that files hold.
        assert named <= {own.removeprefix("models.")} or own == "models.__init__", own


ALONE = """
import pkgutil, sys
alone, *others = sys.argv[1:]
listed = pkgutil.iter_modules
pkgutil.iter_modules = lambda path=None, prefix="": [m for m in listed(path, prefix) if m.name not in others]
sys.modules |= {f"clipfusionvad.models.{name}": None for name in others}
import clipfusionvad.cli.train, clipfusionvad.cli.test
from clipfusionvad.models import method_names, create_model
assert method_names() == [alone]
create_model(alone, ["normal", "fire"], clip="toy", embed_dim=64, visual_width=64)
"""


def test_the_files_of_all_other_methods_can_be_removed():
    run_python(ALONE, *method_names())


def test_help_lists_every_command_once(capsys):
    package_main(["--help"])
    listed = [line.split()[0].replace("-", "_") for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    names = [module.name for module in pkgutil.iter_modules(cli.__path__)]
    commands = [name for name in names if hasattr(importlib.import_module(f"clipfusionvad.cli.{name}"), "main")]
    assert sorted(listed) == sorted(commands)


def test_files_are_short_and_few():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert path.read_text(encoding="utf-8").count("\n") <= 400, path
        assert path.stem not in ("utils", "helpers", "common", "misc")
    names = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert len(names) <= 12, names


def test_every_file_that_states_the_version_states_the_same():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    assert cited["version"] == newest == clipfusionvad.__version__


def test_commands_do_not_import_what_they_rarely_need():
    """torch's compiler takes two seconds to import; a list of the commands needs no torch at all."""
    loaded, err = run_python('from clipfusionvad.__main__ import main; main(["--help"]); main(["tain"])')
    assert "torch" not in loaded and "did you mean 'train'" in err
    names = [f"clipfusionvad.cli.{module.name}" for module in pkgutil.iter_modules(cli.__path__)]
    loaded, _ = run_python(f"import {', '.join(names)}")
    assert not loaded & {"torch._dynamo", "transformers", "ray", "optuna", "onnx"}


HELP = """
import contextlib, sys
from clipfusionvad.__main__ import main
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main([*line.split(), "--help"])
        main([*line.split(), "--unknown-flag"])
"""


def test_help_imports_nothing_that_only_a_run_needs():
    light = ["lists", "table", "report", "doctor", "compare-features", "detect", "export", "extract", "evaluate"]
    loaded, _ = run_python(HELP, *light)
    heavy = {"sklearn", "matplotlib", "pandas", "scipy", "jinja2", "tensorboard", "torchvision", "transformers"}
    assert not loaded & (heavy | {"torch"})
    with_torch = [f"{command} --dataset ucf" for command in ("train", "test", "pack", "uncertainty")]
    loaded, _ = run_python(HELP, *with_torch, "demo", "insight")
    assert "torch" in loaded and not loaded & heavy
