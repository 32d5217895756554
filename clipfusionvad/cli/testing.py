"""Run a test from its settings. Separate from the command, whose --help must not wait for the imports of this file."""

from dataclasses import replace
from pathlib import Path

from clipfusionvad.engine.checkpoint import ModelFile, copy_buffers, make_hparams
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.device import compile_model, deterministic
from clipfusionvad.engine.distributed import distributed_context, local_main_first
from clipfusionvad.engine.evaluator import evaluate, evaluate_classes, score_dataset, smooth_videos, with_reasons
from clipfusionvad.engine.run_folder import record_dataset
from clipfusionvad.engine.setup import build_model, read_test_set, restore_model, result_environment
from clipfusionvad.io.files import check_text, check_writable, write_json
from clipfusionvad.io.provenance import Sources
from clipfusionvad.io.rank import is_main
from clipfusionvad.report.page import write_report
from clipfusionvad.report.plots import draw_score_curves
from clipfusionvad.report.results import TEST_DATA, TEST_METRICS, TEST_SCORES
from clipfusionvad.report.scores import save_scores
from clipfusionvad.report.table import metrics_table, published_beside

#: Options that name files which a test reads beside features.
FILE_OPTIONS = ("model_path", "test_list", "gt_path", "gt_segment_path", "gt_label_path", "clip", "normal_centroid")


def run_test(settings: Settings, file: ModelFile) -> int:
    """Score the test set with a checkpoint; return the exit code."""
    dataset, run, protocol = settings.dataset, settings.run, settings.training.protocol
    sigma = float(settings.training.smooth)
    folder = Path(run.output_dir) if run.output_dir else None
    with distributed_context(settings.device.device) as device, deterministic(settings.device.deterministic):
        for path in (run.metrics_json, folder and folder / TEST_METRICS):
            if path:
                check_writable(path)
                check_text(path)
        with local_main_first():
            if run.demo:
                from clipfusionvad.tools.demo import make_demo

                make_demo(dataset)
            model, clip = restore_model(settings, file)
        compile_model(model, settings.device.compile)
        sources = Sources()
        sources.add_options(settings.options(), FILE_OPTIONS)
        # One process reads all files.
        data = replace(settings.data, check=settings.data.check and is_main())
        test_set = read_test_set(dataset, settings.model, data, sources)
        models = {"here": model}
        if run.demo:
            # What the numbers would be by chance, for a reader who does not know this data.
            untrained = build_model(settings.model, dataset, settings.training.seed)[0]
            untrained.load_state_dict(copy_buffers(model, model.data_buffers), strict=False)
            models = {"untrained": untrained, "trained": model}
        results = {}
        for name, candidate in models.items():
            scored = score_dataset(candidate.to(device), test_set, device, settings.device.precision)
            scores = smooth_videos(scored, sigma)
            found = evaluate(scores, test_set, protocol) | evaluate_classes(scores, test_set)
            results[name] = with_reasons(found, test_set) | ({"smooth": sigma} if sigma else {})
        if not is_main():
            return 0
        print(f"{model.name} on {dataset.title}: {file.path}, {len(scores)} test videos, {device}")
        print(metrics_table(results, *published_beside(settings.record(), test_set.judged)))
        if run.metrics_json:
            write_json(run.metrics_json, results[name])
        if folder:
            write_json(folder / TEST_METRICS, results[name])
            sources.write(folder / TEST_DATA)
            record_dataset(folder, dataset)
            draw_score_curves(folder / "test_scores.png", scores, test_set)
            here = result_environment(make_hparams(model, clip, dataset, settings.options()), device)
            save_scores(folder / TEST_SCORES, scores, test_set, settings.record(), here)
            page = write_report(folder)
            print(f"\nresults in {folder}: {page.name}, {TEST_METRICS}, test_videos.csv, {TEST_SCORES}")
    return 0
