"""Test a model file, ours or a released one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from clipfusionvad.commands.prepare import find_option_file, prepare_model, prepare_test_set
from clipfusionvad.datasets import Dataset
from clipfusionvad.demo import make_demo
from clipfusionvad.engine.checkpoint import (
    ModelFile,
    check_clip,
    check_method,
    load_model_file,
    read_model_file,
)
from clipfusionvad.engine.device import pick_device
from clipfusionvad.engine.evaluator import evaluate, score_videos
from clipfusionvad.errors import warn
from clipfusionvad.files import check_writable, write_json
from clipfusionvad.models import find_method
from clipfusionvad.report.plots import draw_score_curves
from clipfusionvad.report.table import metrics_table, published


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("test", argv)
    return test(rest, option_file)


def test(argv: Sequence[str] | None, option_file: ModuleType) -> int:
    """Parse the options, over those that the model file was trained with, and run the test."""
    args = option_file.parse_args(argv)
    file = read_model_file(args.model_path)
    check_method(file, args.method)
    if file.made:
        if file.made["dataset"] != option_file.DATASET.name:
            warn(f"{args.model_path} was trained on {file.made['dataset']}, with that dataset's classes and options")
        args = option_file.parse_args(argv, _stored(file, args.method))
    return run_test(args, option_file.DATASET, file)


def _stored(file: ModelFile, method: str) -> Mapping[str, Any]:
    """What a model file of ours says about itself, as defaults: nobody need repeat it on the command line."""
    known = set(find_method(method).option_names())
    origin = {"clip": file.made["clip"], "protocol": file.made["protocol"]}
    return {key: value for key, value in file.made["options"].items() if key in known} | origin


def run_test(args: argparse.Namespace, dataset: Dataset, file: ModelFile) -> int:
    """Score the test set with a model file; print the table and write what was asked for."""
    device = pick_device(args.device)
    for path in (args.metrics_json, args.output_dir and Path(args.output_dir) / "test_metrics.json"):
        if path:
            check_writable(path)
    if args.demo:
        make_demo(dataset)
    model, clip = prepare_model(args, dataset, file)
    check_clip(file, clip)
    load_model_file(model, file)
    test_set = prepare_test_set(args, dataset)
    models = {"here": model}
    if args.demo:
        # What the numbers would be by chance, for a reader who does not know this data.
        models = {"untrained": prepare_model(args, dataset)[0], "trained": model}
    results = {}
    for name, candidate in models.items():
        scores = score_videos(candidate.to(device), test_set.features, device, args.precision)
        results[name] = evaluate(scores, test_set, args.protocol)
    print(f"{args.method} on {dataset.title}: {file.path}, {len(scores)} test videos, {device}")
    print(metrics_table(results, {} if args.demo else published(args.method, dataset.name, args.protocol)))
    if args.metrics_json:
        write_json(args.metrics_json, results[name])
    if args.output_dir:
        write_json(Path(args.output_dir) / "test_metrics.json", results[name])
        draw_score_curves(Path(args.output_dir) / "test_scores.png", scores, test_set)
        print(f"\nresults in {args.output_dir}: test_metrics.json, test_scores.png")
    return 0
