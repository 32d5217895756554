"""What is fuzzed: every kind of input with its share of the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fuzz import commands, data, models, results, settings, videos
from fuzz.case import Case


@dataclass(frozen=True)
class Kind:
    """``run`` gives one of ``case.OUTCOMES``, or raises."""

    title: str
    weight: int
    run: Callable[[Case], str]


KINDS = {
    "features": Kind("features (.npy)", 30, data.features),
    "lists": Kind("lists (CSV)", 25, data.lists),
    "annotations": Kind("annotations", 30, data.annotations),
    "truth_arrays": Kind("truth arrays (.npy)", 25, data.truth_arrays),
    "truth_file": Kind("truth files (CSV, JSON)", 20, data.truth_file),
    "stores": Kind("packed stores", 20, data.stores),
    "configs": Kind("configs (YAML)", 25, settings.configs),
    "dataset_files": Kind("dataset files (YAML)", 15, settings.dataset_files),
    "models": Kind("model files of ours", 20, models.own),
    "safetensors": Kind("model files, safetensors", 20, models.safetensors),
    "contents": Kind("model files, their content", 20, models.contents),
    "released": Kind("model files, released", 20, models.released),
    "lightning": Kind("Lightning checkpoints", 10, models.lightning),
    "clips": Kind("CLIP files", 8, models.clips),
    "resumed": Kind("training states", 5, models.resumed),
    "runs": Kind("run folders", 15, results.run_folders),
    "scores": Kind("scores (.npz)", 15, results.scores),
    "manifests": Kind("feature manifests", 20, results.manifests),
    "descriptions": Kind("detections (JSON)", 10, results.descriptions),
    "videos": Kind("videos", 30, videos.frames),
    "extractions": Kind("videos, extracted", 3, videos.extraction),
    "flags": Kind("command lines, parsed", 30, commands.parsed),
    "commands": Kind("command lines, run", 12, commands.ran),
}
