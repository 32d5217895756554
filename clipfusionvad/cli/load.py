"""Older signatures, until all commands pass settings."""

from __future__ import annotations

from argparse import Namespace

from clipfusionvad.cli.options import settings_of
from clipfusionvad.cli.trained_model import find_source as find_source
from clipfusionvad.cli.trained_model import parse_over_model as parse_over_model
from clipfusionvad.cli.trained_model import read_run_options as read_run_options
from clipfusionvad.cli.trained_model import stored_options as stored_options
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine import model_setup
from clipfusionvad.engine.checkpoint import ModelFile
from clipfusionvad.models import Method
from clipfusionvad.models.clip import ClipWeights


def load_model(args: Namespace, dataset: Dataset, file: ModelFile) -> tuple[Method, ClipWeights | None]:
    return model_setup.load_model(settings_of(args, dataset), file)
