"""The methods. Every module of this package that registers a method is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from clipfusionvad.models.base import Method, build_method, find_method, method_names, register_method
from clipfusionvad.models.clip import load_clip

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "build_method", "create_model", "find_method", "method_names", "register_method"]


def create_model(name: str, class_prompts: Sequence[str], clip: str = "ViT-B/16", **options: Any) -> Method:
    """Build a method by name.

    ``class_prompts`` are the C class texts, the normal one first; ``clip`` is a CLIP model name, a local file
    or "toy" (not read for a method that encodes no text); ``options`` are the method's flags with underscores.
    Raises ``UserError`` on anything unusable.
    """
    weights = None
    if find_method(name).needs_clip:
        weights = load_clip(clip, width=options.get("embed_dim", 512))
    else:
        # It describes CLIP, so it says as little here as ``clip`` does.
        options.pop("embed_dim", None)
    return build_method(name, class_prompts, weights, **options)
