"""Read MATLAB files; no code in them is run."""

from pathlib import Path
from typing import Any

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import must_exist


def read_mat(path: str | Path, what: str) -> dict[str, Any]:
    """Return the variables of a .mat file (MATLAB 4 to 7.2) by name; ``what`` names the file in messages."""
    from scipy.io import loadmat  # here: few commands read such a file

    must_exist(path, what)
    try:
        content = loadmat(path, appendmat=False)
    except NotImplementedError as error:
        raise UserError(f"{what} {path} is in MATLAB's format 7.3: save it with '-v7' in MATLAB") from error
    # A damaged file can raise any error of the parser.
    except Exception as error:
        raise UserError(f"{what} {path} is not a readable .mat file: {str(error).splitlines()[0:1]}") from error
    return {name: value for name, value in content.items() if not name.startswith("__")}
