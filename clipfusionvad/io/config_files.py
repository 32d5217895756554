"""YAML files of options: those of a user, and those that come with the package."""

from pathlib import Path
from typing import Any

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_yaml

# Inside the package where it is installed, beside it in the repository.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE / "configs"
)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of flat ``option: value`` lines; dashes and underscores in names are the same.

    ``configs/NAME`` that does not exist in the current folder is read from the package.
    """
    content = read_yaml(find_config(path), "config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must hold lines of the form 'option: value'")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def find_config(path: str | Path) -> Path:
    """The file that ``configs/NAME`` names: in the current folder, else in the package."""
    path = Path(path)
    top, *inner = path.parts or [""]
    own = CONFIGS.joinpath(*inner)
    return own if top == "configs" and not path.exists() and own.is_file() else path
