"""ClipFusionVAD: CLIP-based weakly supervised video anomaly detection."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfusionvad.cli.trained_model import load_model
    from clipfusionvad.engine.checkpoint import load_weights
    from clipfusionvad.models import create_model

__version__ = "0.2.0"
__all__ = ["create_model", "load_model", "load_weights"]
_HOMES = {"create_model": "clipfusionvad.models", "load_weights": "clipfusionvad.engine.checkpoint"}
_HOMES["load_model"] = "clipfusionvad.cli.trained_model"


def __getattr__(name: str) -> Any:
    """Load what is exported when it is asked for: torch takes seconds, and a list of commands does without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
