"""The benchmarks: what they measure against computes what the package computes, and each script runs."""

import json
import subprocess

import numpy as np
import pytest
import torch

from benchmarks import (
    baselines,
    detection,
    extract_throughput,
    flops,
    gpu,
    linear,
    machine,
    made,
    protocol,
    reading,
    run,
    testing,
    training_step,
)
from benchmarks.plain import testing as plain_testing
from benchmarks.plain.detection import detection_map as plain_detection_map
from benchmarks.report import read_report
from clipfusionvad.datasets import UCF, XD
from clipfusionvad.engine.evaluator import evaluate, score_videos
from clipfusionvad.metrics import detection_map

SCRIPTS = [machine, flops, baselines, detection, extract_throughput, linear, protocol, reading, training_step, testing]
SIZE = made.Size(width=64, text_layers=2, length=32, visual_layers=2, context=3)


def both_models(seed):
    """Ours and the plain one with the same weights, none of them as simple as a new model's."""
    ours, plain = made.made_model(SIZE, seed=seed), made.made_model(SIZE, plain=True, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        ours.gam_attention.spatial_attention[1].running_var.uniform_(0.5, 2)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch_of_similar_snippets(seed):
    """Cosines on both sides of 0.7, so that the similarity graph has edges."""
    visual, lengths, targets = made.made_batch(SIZE, each=3, seed=seed)
    return visual + 1.5 * torch.randn(6, 1, SIZE.width), lengths, targets


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_plain_model_computes_what_ours_computes(seed, training):
    models = [model.train(training) for model in both_models(seed)]
    visual, lengths, targets = batch_of_similar_snippets(seed)
    outputs = [model(visual, lengths) for model in models]
    for name in ("text_features", "coarse_logits", "fine_logits"):
        torch.testing.assert_close(*(getattr(output, name) for output in outputs), rtol=1e-5, atol=1e-5)
    losses = [model.losses(output, targets, lengths) for model, output in zip(models, outputs, strict=True)]
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-5, atol=1e-5)
        assert value > 0
    for terms in losses:
        sum(terms.values()).backward()
    plain = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            expected = plain[name].grad
            tolerance = 1e-6 + 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=tolerance)


def test_plain_testing_scores_what_ours_scores():
    ours, plain = both_models(0)
    features = made.made_features([1, 31, 32, 33, 64, 70], SIZE.width)
    device = torch.device("cpu")
    expected = score_videos(ours, features, device)
    for video, known in zip(plain_testing.score_videos(plain, features, SIZE.length, device), expected, strict=True):
        np.testing.assert_allclose([video.coarse, video.fine], known.anomaly, atol=1e-5)
        np.testing.assert_allclose(video.classes, known.classes, atol=1e-5)


def test_plain_metrics_are_those_of_ours():
    truth = made.made_truth(UCF, ([500, 900, 1600, 333], [800, 470]))
    probabilities = made.made_probabilities(UCF, truth)
    scores = [plain_testing.VideoScores(video[:, 1], 1 - video[:, 0], video) for video in probabilities]
    known = truth.frames, truth.segments, truth.labels
    plain = plain_testing.evaluate(scores, *known, UCF.labels)
    videos = testing.video_set(truth, SIZE.width)
    ours = evaluate([testing.VideoScores(np.stack(video[:2]), video.classes) for video in scores], videos)
    for name in ("auc1", "ap1", "auc2", "ap2"):
        assert ours[name] == pytest.approx(plain[name], rel=1e-12)
    assert [*ours["map_released"].values()][:-1] == pytest.approx(plain["map"], abs=1e-9)


@pytest.mark.parametrize("dataset", [UCF, XD], ids=lambda dataset: dataset.name)
@pytest.mark.parametrize("seed", range(2))
def test_plain_detection_is_ours(dataset, seed):
    rng = np.random.default_rng(seed)
    truth = made.made_truth(dataset, (rng.integers(60, 1500, 16), rng.integers(20, 900, 5)), seed)
    probabilities = made.made_probabilities(dataset, truth, seed)
    counts = [np.full(len(video), 16) for video in probabilities]
    known = truth.segments, truth.labels, dataset.labels
    plain = plain_detection_map([np.repeat(video, 16, axis=0) for video in probabilities], *known)
    assert [*detection_map(probabilities, *known, frames=counts)["map"].values()] == pytest.approx(plain, abs=1e-9)
    assert max(plain) > 0


def test_arithmetic_of_the_plain_prompts_is_what_the_paper_and_pencil_say():
    found = flops.count_parts(SIZE, made.made_model(SIZE, plain=True).train(), plain=True)
    # Per position and layer: three projections and one of D x D, and two of D x 4D; a product is two operations.
    layers = 2 * len(UCF.labels) * 77 * SIZE.text_layers * 2 * 12 * SIZE.width**2
    assert found["prompts"] == pytest.approx(layers / 1e9, rel=0.01)
    ours = flops.count_parts(SIZE, made.made_model(SIZE).train(), plain=False)
    assert ours["prompts"] < found["prompts"] / 10
    # Of windows that hold only padding one is computed for each place.
    visual, *_ = made.made_batch(SIZE, each=4)
    blank = ~visual.unflatten(1, (-1, SIZE.window)).flatten(2).any(dim=2)
    computed = (~blank).sum() + blank.any(dim=0).sum()
    assert computed < blank.numel()
    found["temporal transformer"] *= float(computed / blank.numel())
    assert {part: ours[part] for part in flops.PARTS} == pytest.approx({part: found[part] for part in flops.PARTS})


def test_what_is_compared_takes_turns_and_overlaps_count_once():
    order = []
    times = machine.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert order == [*"ababab"]
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert machine.ratio({"plain": [4, 90, 9], "ours": [2, 10, 9]}) == 2
    assert protocol.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_script_runs(script, tmp_path, capsys, monkeypatch):
    def here(command):
        """What a child process would print, from this one."""
        script.main(command[1:])
        return json.loads(capsys.readouterr().out.splitlines()[-1])["peak"]

    monkeypatch.setattr(machine, "_child", here)
    rounds = ["--rounds", "2"] if script in (training_step, testing) else []
    script.main(["--quick", *rounds, "--json", str(tmp_path / "report.json")])
    _, claims, _, _ = read_report(tmp_path / "report.json")
    printed = capsys.readouterr().out
    # Of scripts with peaks, ``here`` has read what was printed before.
    assert claims and all(claim.value > 0 and (rounds or str(claim) in printed) for claim in claims)
    if rounds:
        assert any(claim.what.endswith("times faster") for claim in claims)
        peaks = [claim.value for claim in claims if claim.what.startswith("peak memory")]
        assert any(value == pytest.approx(100, abs=5) for value in peaks)


def test_all_results_end_up_on_one_page(tmp_path):
    run.main(["--quick", "--scripts", "ranking", "--output", str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| AUC and AP, UCF-Crime, times faster |" in page and "$ python benchmarks/ranking.py --quick" in page
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_the_page_of_a_gpu_becomes_the_last_part_of_the_results_once(tmp_path, monkeypatch):
    def found(name, args, more=()):
        return run.Result(f"{name} {args.precision}", name, [run.Claim(f"{name}, seconds", 2.5, " s")], [], ["a line"])

    monkeypatch.setattr(gpu, "run_script", found)
    here = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    results = tmp_path / "RESULTS.md"
    run.main(["--quick", "--scripts", "ranking", "--output", str(tmp_path)])
    before = results.read_text(encoding="utf-8")
    for _ in range(2):
        assert gpu.main([*here, "--parts", "steps", "extraction"]) == 0
    assert results.read_text(encoding="utf-8").startswith(before.rstrip())
    run.main(["--quick", "--scripts", "ranking", "--output", str(tmp_path)])
    after = results.read_text(encoding="utf-8")
    assert after.count("# On a GPU") == 1 and after.count("### Claims") == 1
    assert "| extract_throughput, seconds | 2.5 s |" in after.partition("# On a GPU")[2]


def test_a_part_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def fail(name, args, more=()):
        if name == "protocol":
            raise subprocess.CalledProcessError(3, ["python", "protocol.py"])
        return run.Result(name, name, [], [], ["a line"])

    monkeypatch.setattr(gpu, "run_script", fail)
    here = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    assert gpu.main([*here, "--parts", "protocol", "extraction"]) == 1
    page = (tmp_path / run.GPU_PAGE).read_text(encoding="utf-8")
    assert "FAILED protocol: exit code 3 of python protocol.py" in page and "$ extract_throughput" in page
    assert "FAILED protocol" in capsys.readouterr().err
