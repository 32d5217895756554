"""Options of the model that every method shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from clipfusionvad.io.option import LARGEST_SIZE, Option, read_config
from clipfusionvad.models import current_options


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is built. ``options`` are the keyword arguments of the method."""

    method: Annotated[str, Option("detector")]
    clip: Annotated[str, Option("CLIP model name, local file, or 'toy'")] = "ViT-B/16"
    classes_num: Annotated[int, Option("number of classes, the normal one included", minimum=1, maximum=LARGEST_SIZE)]
    embed_dim: Annotated[int, Option("width of CLIP's text tower", minimum=1, maximum=LARGEST_SIZE)]
    visual_width: Annotated[int, Option("width of the visual features", minimum=1, maximum=LARGEST_SIZE)]
    options: Mapping[str, Any] = field(default_factory=dict)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options; older names of methods become today's."""
    return current_options(read_config(path))
