"""The methods: one file each, whose name is the method's name. A file is imported when its method is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipfusionvad.io.errors import UserError, nearest

if TYPE_CHECKING:
    from clipfusionvad.models.base import Method, TextMethod
    from clipfusionvad.models.clip import ClipWeights

__all__ = ["Method", "TextMethod", "build_method", "create_model", "find_method", "method_names", "register_method"]

_NOT_METHODS = {"base", "clip", "config"}
_FILES = {module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg} - _NOT_METHODS
_METHODS: dict[str, type[Method]] = {}
#: Ends the name of a method that is another one's released code, which ``--variant repo`` used to choose.
_REPO = "_repo"


def __getattr__(name: str) -> Any:
    """Import the base class when it is asked for: it needs torch, and a list of names does not."""
    if name not in ("Method", "TextMethod"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.base"), name)


def register_method(cls: type[Method]) -> type[Method]:
    """Make a method known under its ``name`` (a class decorator)."""
    _METHODS[cls.name] = cls
    return cls


def method_names() -> list[str]:
    """Return the names of the methods in this folder and of those registered elsewhere."""
    return sorted(_FILES | _METHODS.keys())


def find_method(name: str) -> type[Method]:
    """Return the class of a method; ``UserError`` names the nearest one if it is unknown."""
    if name not in _METHODS and name in _FILES:
        importlib.import_module(f"{__name__}.{name}")
    if name not in _METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, method_names())}; known: {', '.join(method_names())}")
    return _METHODS[name]


def build_method(name: str, class_prompts: Sequence[str], clip: ClipWeights | None, **options: Any) -> Method:
    """Instantiate a method. ``UserError`` for an option that it does not have, or a value that is not allowed."""
    cls = find_method(current_options({"method": name, "variant": options.pop("variant", None)})["method"])
    declared = cls.declared_options()
    for option, value in options.items():
        if option not in declared:
            known = ", ".join(declared)
            raise UserError(f"{cls.name} has no option {option!r}{nearest(option, declared)}; it has: {known}")
        declared[option].check(value)
    return cls.create(class_prompts, clip, **options)


def create_model(name: str, class_prompts: Sequence[str], clip: str = "ViT-B/16", **options: Any) -> Method:
    """Build a method by name.

    ``class_prompts`` are the C class texts, the normal one first; ``clip`` is a CLIP model name, a local file
    or "toy" (not read for a method that encodes no text); ``options`` are the method's flags with underscores.
    Raises ``UserError`` on anything unusable.
    """
    from clipfusionvad.models.clip import load_clip

    weights = None
    if find_method(name).needs_clip:
        weights = load_clip(clip, width=options.get("embed_dim", 512))
    else:
        # Like ``clip``, the width of its text tower is ignored.
        options.pop("embed_dim", None)
    return build_method(name, class_prompts, weights, **options)


def variants_of(name: str) -> dict[str, str]:
    """Return the methods that used to be variants of one method, ``name`` among them, by the variant's name."""
    paper = name.removesuffix(_REPO)
    return {"paper": paper, "repo": paper + _REPO} if paper + _REPO in method_names() else {}


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under today's method, where they name a method and a variant of it.

    Such records hold the options of all variants; those of the other variants are left out.
    """
    variants = variants_of(str(options.get("method")))
    variant = options.get("variant")
    if variant is None or not variants:
        return dict(options)
    if variant not in variants:
        raise UserError(f"--variant {variant!r}{nearest(str(variant), variants)}; known: {', '.join(variants)}")
    names = {name: find_method(name).option_names() for name in variants.values()}
    others = {option for own in names.values() for option in own} - set(names[variants[variant]])
    kept = {key: value for key, value in options.items() if key != "variant" and key not in others}
    return kept | {"method": variants[variant]}
