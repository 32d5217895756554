"""What training and testing both need before they start."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from clipfusionvad.clip import ClipWeights, clip_in_checkpoint, load_clip
from clipfusionvad.data.checks import check_features
from clipfusionvad.data.lists import read_list
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.engine.evaluator import VideoSet
from clipfusionvad.models import Method, build_method, find_method
from clipfusionvad.options import Parser


def find_option_file(command: str, argv: Sequence[str]) -> tuple[ModuleType, list[str]]:
    """The option file of the dataset that ``--dataset`` names, and the rest of the command line."""
    parser = Parser(prog=f"clipfusionvad {command}", add_help=False)
    parser.add_argument("--dataset")
    known, rest = parser.parse_known_args(argv)
    if known.dataset is None:
        parser.error(f"--dataset is needed, one of: {', '.join(DATASETS)}; with it, --help lists all options")
    name = find_dataset(known.dataset).name
    return importlib.import_module(f"{name}_option"), rest


def prepare_test_set(args: argparse.Namespace, dataset: Dataset) -> VideoSet:
    """Read and check the test list, its features and its truth."""
    entries = read_list(args.test_list, args.feature_root, dataset)
    snippets = check_features(entries, args.visual_width, args.test_list, read=args.check)
    truth = read_truth(args.gt_path, args.gt_segment_path, args.gt_label_path, entries, snippets, dataset)
    return VideoSet(entries, dataset, args.visual_width, truth)


def prepare_model(
    args: argparse.Namespace, dataset: Dataset, file: ModelFile | None = None
) -> tuple[Method, ClipWeights]:
    """Build the model that the options describe, with the CLIP of ``--clip`` or the one inside a model file."""
    clip = clip_in_checkpoint(file.state, file.path) if file else None
    clip = clip or load_clip(args.clip, width=args.embed_dim)
    torch.manual_seed(args.seed)
    options = {name: getattr(args, name) for name in find_method(args.method).option_names()}
    return build_method(args.method, dataset.prompts, clip, **options), clip
