"""Older signatures, until all commands pass settings."""

from __future__ import annotations

from argparse import Namespace

from clipfusionvad.cli.options import settings_of
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.engine.data_setup import read_test_set
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.engine.model_setup import build_model
from clipfusionvad.models import Method
from clipfusionvad.models.clip import ClipWeights


def prepare_test_set(args: Namespace, dataset: Dataset) -> VideoDataset:
    settings = settings_of(args, dataset)
    return read_test_set(dataset, settings.model, settings.data)


def prepare_model(
    args: Namespace, dataset: Dataset, file: ModelFile | None = None
) -> tuple[Method, ClipWeights | None]:
    return build_model(settings_of(args, dataset).model, dataset, args.seed, file)
