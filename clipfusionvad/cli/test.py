"""Test a model file, ours or a released one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from clipfusionvad.cli.load import load_model, parse_over_model
from clipfusionvad.cli.option_files import OptionFile, find_option_file
from clipfusionvad.cli.options import record
from clipfusionvad.cli.prepare import about, prepare_model, prepare_test_set
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, centroid_content, make_hparams
from clipfusionvad.engine.device import compile_model, deterministic
from clipfusionvad.engine.distributed import distributed_context, local_main_first
from clipfusionvad.engine.evaluator import evaluate, evaluate_classes, score_dataset
from clipfusionvad.engine.run_folder import record_dataset
from clipfusionvad.io.files import check_writable, write_json
from clipfusionvad.io.provenance import Sources
from clipfusionvad.io.rank import is_main
from clipfusionvad.report.plots import draw_score_curves
from clipfusionvad.report.results import TEST_DATA, TEST_METRICS, TEST_SCORES
from clipfusionvad.report.run_page import write_report
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.table import metrics_table, published
from clipfusionvad.tools.demo import make_demo

#: Options that name files which a test reads beside features.
TESTED_FROM = ("model_path", "test_list", "gt_path", "gt_segment_path", "gt_label_path", "clip", "normal_centroid")


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("test", argv)
    return test(rest, option_file)


def test(argv: Sequence[str] | None, option_file: OptionFile) -> int:
    """Parse the options, over those that the model file was trained with, and run the test."""
    args, file = parse_over_model(argv, option_file)
    return run_test(args, option_file.DATASET, file)


def run_test(args: argparse.Namespace, dataset: Dataset, file: ModelFile) -> int:
    """Score the test set with a model file; print the table and write what was asked for."""
    with distributed_context(args.device) as device, deterministic(args.deterministic):
        return _test(args, dataset, file, device)


def _test(args: argparse.Namespace, dataset: Dataset, file: ModelFile, device: torch.device) -> int:
    # One process reads all files.
    args.check = args.check and is_main()
    for path in (args.metrics_json, args.output_dir and Path(args.output_dir) / TEST_METRICS):
        if path:
            check_writable(path)
    with local_main_first():
        if args.demo:
            make_demo(dataset)
        model, clip = load_model(args, dataset, file)
    compile_model(model, args.compile)
    sources = Sources()
    sources.add_options(vars(args), TESTED_FROM)
    test_set = prepare_test_set(args, dataset, sources)
    models = {"here": model}
    if args.demo:
        # What the numbers would be by chance, for a reader who does not know this data.
        untrained = prepare_model(args, dataset)[0]
        untrained.load_state_dict(centroid_content(model), strict=False)
        models = {"untrained": untrained, "trained": model}
    results = {}
    for name, candidate in models.items():
        scores = score_dataset(candidate.to(device), test_set, device, args.precision)
        results[name] = evaluate(scores, test_set, args.protocol) | evaluate_classes(scores, test_set)
    if not is_main():
        return 0
    print(f"{args.method} on {dataset.title}: {file.path}, {len(scores)} test videos, {device}")
    print(metrics_table(results, {} if args.demo else published(args.method, dataset.name, args.protocol)))
    if args.metrics_json:
        write_json(args.metrics_json, results[name])
    if args.output_dir:
        write_json(Path(args.output_dir) / TEST_METRICS, results[name])
        sources.write(Path(args.output_dir) / TEST_DATA)
        record_dataset(Path(args.output_dir), dataset)
        draw_score_curves(Path(args.output_dir) / "test_scores.png", scores, test_set)
        here = about(make_hparams(model, clip, dataset, vars(args)), device)
        save_scores(Path(args.output_dir) / TEST_SCORES, scores, test_set, record(args), here)
        page = write_report(Path(args.output_dir))
        print(f"\nresults in {args.output_dir}: {page.name}, {TEST_METRICS}, test_scores.png, {TEST_SCORES}")
    return 0
