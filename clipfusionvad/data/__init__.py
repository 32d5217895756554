"""From lists and feature files to batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfusionvad.data.sampling import sample_uniform, split_windows

__all__ = ["sample_uniform", "split_windows"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are asked for: they need torch, and the options of this room do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("clipfusionvad.data.sampling"), name)
