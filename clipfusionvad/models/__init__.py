"""The methods: one file each, whose name is the method's name. A file is imported when its method is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from clipfusionvad.io.errors import UserError, nearest
from clipfusionvad.io.option import LARGEST_SIZE, Option, read_config

if TYPE_CHECKING:
    from clipfusionvad.models.base import Method, TextMethod
    from clipfusionvad.models.clip import ClipWeights

__all__ = ["Method", "TextMethod", "build_method", "create_model", "find_method", "method_names", "register_method"]

_FILES = {module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg} - {"base", "clip"}
_METHODS: dict[str, type[Method]] = {}
#: Ends the name of a method that is another one's released code, which ``--variant repo`` used to choose.
_REPO = "_repo"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is built, whatever its method. ``options`` are the keyword arguments of the method."""

    method: Annotated[str, Option("detector")]
    clip: Annotated[str, Option("CLIP model name, file, hf:owner/name/file, or 'toy'")] = "ViT-B/16"
    classes_num: Annotated[int, Option("number of classes, the normal one included", minimum=1, maximum=LARGEST_SIZE)]
    embed_dim: Annotated[int, Option("width of CLIP's text tower", minimum=1, maximum=LARGEST_SIZE)]
    visual_width: Annotated[int, Option("width of the visual features", minimum=1, maximum=LARGEST_SIZE)]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def feature_width(self) -> int:
        """The width of the features in files: --feature-dim, else --visual-width."""
        return self.options.get("feature_dim") or self.visual_width


def read_options(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options; older names of methods become today's."""
    return current_options(read_config(path))


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
            others = ", ".join(other for other in method_names() if option in find_method(other).option_names())
            hint = f", which is one of {others}" if others else nearest(option, declared)
            raise UserError(f"{cls.name} has no option {option!r}{hint}; it has: {known}")
        declared[option].check(value)
    feature_dim, feature_norm = options.pop("feature_dim", None), options.pop("feature_norm", None)
    model = cls(list(class_prompts), clip, **options) if cls.needs_clip else cls(len(class_prompts), **options)
    model.labels = tuple(class_prompts)
    if feature_dim or feature_norm not in (None, "none"):
        model.map_features(feature_dim, feature_norm)
    return model


def create_model(name: str, class_prompts: Sequence[str], clip: str = "ViT-B/16", **options: Any) -> Method:
    """Build a method by name. Raises ``UserError`` on anything unusable.

    ``class_prompts`` are the C class texts, the normal one first; ``clip`` is a CLIP model name, a local file
    or "toy" (not read for a method that encodes no text); ``options`` are the method's flags with underscores.
    """
    from clipfusionvad.models.clip import load_clip

    if find_method(name).needs_clip:
        return build_method(name, class_prompts, load_clip(clip, width=options.get("embed_dim", 512)), **options)
    options.pop("embed_dim", None)  # ignored, as ``clip`` is
    return build_method(name, class_prompts, None, **options)


def variants_of(name: str) -> dict[str, str]:
    """Return the methods that used to be variants of one method, ``name`` among them, by the variant's name."""
    paper = name.removesuffix(_REPO)
    return {"paper": paper, "repo": paper + _REPO} if paper + _REPO in method_names() else {}


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under today's method, where they name a method and a variant of it.

    Such records hold the options of all variants; those of the other variants are left out.
    """
    variant, variants = options.get("variant"), variants_of(str(options.get("method")))
    if variant is None or not variants:
        return dict(options)
    if variant not in variants:
        raise UserError(f"--variant {variant!r}{nearest(str(variant), variants)}; known: {', '.join(variants)}")
    own = find_method(variants[variant]).option_names()
    gone = {"variant"}.union(*(find_method(other).option_names() for other in variants.values())) - set(own)
    return {key: value for key, value in options.items() if key not in gone} | {"method": variants[variant]}
