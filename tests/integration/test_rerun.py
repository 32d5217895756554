"""Runs repeated from their records: what matches, what differs, and what is refused."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from tiny import make_tiny, package_main, quietly, strings

from clipfusionvad.cli import training
from clipfusionvad.data.packed import store_folder
from clipfusionvad.datasets import read_dataset, yaml_content
from clipfusionvad.io import provenance as origin
from clipfusionvad.io.files import write_torch
from clipfusionvad.tools.rerun.agreement import compare_losses, compare_metrics, compare_scores, compare_weights


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_score_curves", lambda *args: None)
        patch.setattr(training, "draw_training", lambda *args: None)
        patch.setattr("clipfusionvad.cli.testing.draw_score_curves", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny benchmark with a run and a test of its model in folders of their own, never written to."""
    tiny = make_tiny("ucf", tmp_path_factory.mktemp("rerun") / "data")
    assert tiny.train("--max-epoch", 1).code == 0
    assert tiny.test("--output-dir", tiny.work / "test").code == 0
    return tiny


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder, to spoil."""
    return shutil.copytree(trained.work / "run", tmp_path / "run")


def rerun(folder, *more):
    return quietly(package_main, strings(["rerun", folder], more))


def assert_refused(outcome, *says):
    assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert all(words in outcome.err for words in says), outcome.err


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def rewrite(path, change):
    """Replace a JSON file's content by what ``change`` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def perturb_losses(folder, relative):
    header, first, *others = (folder / "losses.csv").read_text().splitlines()
    cells = first.split(",")
    cells[2] = repr(float(cells[2]) * (1 + relative))
    (folder / "losses.csv").write_text("\n".join([header, ",".join(cells), *others]) + "\n")


def test_a_run_is_repeated_to_the_last_bit(run):
    outcome = rerun(run)
    assert outcome.code == 0, outcome.err
    assert "match: the same numbers, bit for bit" in outcome.out and "data: unchanged" in outcome.out
    again = run.with_name("run_rerun")
    for name in ("best.pt", "last.pt"):
        one, other = weights(run / name), weights(again / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for name in ("losses.csv", "metrics.json", "metrics.jsonl", "data.csv"):
        assert (run / name).read_text() == (again / name).read_text()


def test_a_test_is_repeated_to_the_last_bit(trained, tmp_path):
    outcome = rerun(trained.work / "test", "--output-dir", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert "match: the same numbers, bit for bit" in outcome.out
    own = shutil.copytree(trained.work / "test", tmp_path / "test")
    rewrite(own / "test_metrics.json", lambda metrics: metrics | {"auc1": metrics["auc1"] - 0.01})
    outcome = rerun(own)
    assert outcome.code == 1 and "mismatch" in outcome.out and "most auc1" in outcome.out


def test_every_file_that_was_read_is_on_record(trained):
    listed = {line.split(",")[1] for line in (trained.work / "run/data.csv").read_text().splitlines()[1:]}
    there = {str(path) for path in (trained.folder / "features").glob("*.npy")}
    there |= {str(path) for path in (trained.train_list, trained.test_list, *trained.arrays.values())}
    assert listed == there
    listed = {line.split(",")[1] for line in (trained.work / "test/test_data.csv").read_text().splitlines()[1:]}
    assert str(trained.work / "model.pth") in listed and str(trained.train_list) not in listed


def test_changed_data_is_named_and_refused(tiny, tmp_path):
    assert tiny.train("--max-epoch", 1).code == 0
    changed, gone = sorted((tiny.folder / "features").glob("Abuse*__0.npy"))[:2]
    values = np.load(changed)
    values[2, 3] += 1
    np.save(changed, values)
    outcome = rerun(tiny.work / "run")
    assert_refused(outcome, "1 of ", changed.name, "changed", "--anyway")
    assert not (tiny.work / "run_rerun").exists()
    outcome = rerun(tiny.work / "run", "--anyway")
    assert outcome.code == 1 and "mismatch: the same bits were expected, as code" in outcome.out
    gone.unlink()
    outcome = rerun(tiny.work / "run")
    assert_refused(outcome, "2 of ")
    assert f"{gone}: missing" in outcome.out and f"{changed}: changed" in outcome.out


def test_a_changed_option_is_named(run):
    options = yaml.safe_load((run / "options.yaml").read_text())
    (run / "options.yaml").write_text(yaml.safe_dump(options | {"lr": 2 * options["lr"]}))
    outcome = rerun(run)
    assert f"lr: {options['lr']}, now {2 * options['lr']} in options.yaml" in outcome.out
    assert outcome.code == 1 and "mismatch" in outcome.out


def test_an_option_that_came_later_is_named(run):
    options = yaml.safe_load((run / "options.yaml").read_text())
    del options["weight_decay"], options["balanced"]
    (run / "options.yaml").write_text(yaml.safe_dump(options))
    outcome = rerun(run)
    assert outcome.code == 0 and "balanced: not recorded then, now True" in outcome.out
    # Its default is what the run did.
    assert "weight_decay: unknown" not in outcome.out


@pytest.mark.slow
def test_other_code_is_named_and_judged_by_the_tolerance(run):
    rewrite(run / "environment.json", lambda made: made | {"sources": "0123456789abcdef"})
    outcome = rerun(run)
    assert "sources: 0123456789abcdef, now " in outcome.out
    assert outcome.code == 0 and "bit for bit" in outcome.out
    perturb_losses(run, 1e-5)
    outcome = rerun(run)
    assert outcome.code == 0 and "match: within 0.001; the same bits cannot be expected (sources" in outcome.out
    assert "1 of 4 steps differ, the first is step 1, by up to 1e-05" in outcome.out
    assert rerun(run, "--tolerance", 1e-6).code == 1


def test_with_the_same_code_nothing_but_the_same_bits_will_do(run):
    perturb_losses(run, 1e-5)
    outcome = rerun(run)
    assert outcome.code == 1 and "device are the same, though within 0.001" in outcome.out


@pytest.mark.slow
def test_all_seeds_are_repeated(trained, tmp_path):
    work = trained.at(tmp_path)
    assert work.train("--max-epoch", 1, "--seeds", 1, 2).code == 0
    outcome = rerun(tmp_path / "run")
    assert outcome.code == 0 and "bit for bit" in outcome.out, outcome.err
    perturb_losses(tmp_path / "run/seed2", 0.1)
    outcome = rerun(tmp_path / "run", "--output-dir", tmp_path / "other")
    assert outcome.code == 1 and "seed2/losses.csv" in outcome.out and "1 of 4 steps differ" in outcome.out


def test_packed_features_are_known_by_their_sum(tiny):
    def pack():
        argv = ["pack", "--dataset", "ucf", "--train-list", tiny.train_list, "--test-list", tiny.test_list]
        outcome = quietly(package_main, strings(argv, ["--visual-width", 64, "--visual-length", 32, "--clip", "toy"]))
        assert outcome.code == 0, outcome.err

    pack()
    assert tiny.train("--max-epoch", 1).code == 0
    assert rerun(tiny.work / "run").code == 0
    changed = sorted((tiny.folder / "features").glob("Abuse*__0.npy"))[0]
    np.save(changed, np.load(changed) + np.float16(1))
    pack()
    assert_refused(rerun(tiny.work / "run"), str(store_folder(tiny.train_list)), "changed")


def test_the_demo_is_repeated_even_where_its_data_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--dataset", "xd", "--demo", "--method", "vadclip", "--max-epoch", "1"]
    assert quietly(package_main, [*argv, "--output-dir", "run"]).code == 0
    shutil.rmtree("demo")
    outcome = rerun("run")
    assert outcome.code == 0 and "bit for bit" in outcome.out, outcome.err


def test_what_cannot_be_repeated_is_refused(run, tmp_path):
    assert_refused(rerun(tmp_path), "neither a finished run nor a test")
    assert_refused(rerun(run, "--output-dir", run), "name another --output-dir")
    (run / "metrics.json").unlink()
    assert_refused(rerun(run), "not finished", "--use-checkpoint")


def test_a_broken_off_rerun_goes_on(run, tmp_path, monkeypatch):
    step, steps = training.Trainer._step, []

    def broken(self, *args):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(training.Trainer, "_step", broken)
    again = tmp_path / "again"
    outcome = rerun(run, "--output-dir", again)
    assert outcome.code == 130 and f"rerun {run} --output-dir {again}" in outcome.out
    assert outcome.out.count("to go on") == 1 and "--use-checkpoint" not in outcome.out + outcome.err
    outcome = rerun(run, "--output-dir", again)
    assert outcome.code == 0 and "resuming" in outcome.out and "bit for bit" in outcome.out
    assert len(steps) == 4


def test_the_hash_of_the_code_is_of_its_content_and_names(tmp_path):
    copy = shutil.copytree(origin.PACKAGE, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    first = origin.hash_sources(copy)
    assert first == origin.hash_sources(origin.PACKAGE) == origin.code()["sources"]
    (copy / "losses.py").write_text((copy / "losses.py").read_text() + "\n")
    second = origin.hash_sources(copy)
    (copy / "losses.py").rename(copy / "lost.py")
    assert len({first, second, origin.hash_sources(copy)}) == 3


def test_a_dataset_of_ones_own_is_described_in_full(tmp_path):
    (tmp_path / "shop.yaml").write_text(
        "title: My shop\nfps: 25\nclasses: {ok: normal, theft: a person stealing}\naliases: {Steal: theft}\n"
    )
    dataset = read_dataset(tmp_path / "shop.yaml")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(yaml_content(dataset)))
    assert read_dataset(tmp_path / "again.yaml") == dataset


# Comparing files.


def test_losses_are_compared_line_by_line(tmp_path):
    one, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("step,epoch,loss,lr\n1,0,2.0,0.1\n2,0,1.0,0.1\n")
    other.write_text("step,epoch,loss,lr\n1,0,2.0,0.1\n2,0,1.25,0.1\n")
    assert compare_losses(one, one).exact
    found = compare_losses(one, other)
    assert not found.exact and found.distance == pytest.approx(0.2) and "the first is step 2" in found.text
    other.write_text("step,epoch,loss,lr\n1,0,2.0,0.1\n")
    assert compare_losses(one, other).distance == np.inf


def test_metrics_are_compared_in_their_own_unit(tmp_path):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(json.dumps({"best": {"auc1": 0.5, "map": {"0.1": 20.0}, "map_average": 20.0, "ap1": None}}))
    other.write_text(json.dumps({"best": {"auc1": 0.5, "map": {"0.1": 21.0}, "map_average": 20.0, "ap1": None}}))
    assert compare_metrics(one, one).exact
    assert compare_metrics(one, other).distance == pytest.approx(0.01)
    other.write_text(json.dumps({"best": {"auc1": 0.5}}))
    assert compare_metrics(one, other).distance == np.inf


def test_weights_are_compared_bit_by_bit(tmp_path):
    state = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    for name, value in (("one", 4.0), ("other", 4.0005)):
        write_torch(tmp_path / name, {"model_state_dict": state | {"b": torch.tensor([value])}})
    assert compare_weights(tmp_path / "one", tmp_path / "one").exact
    found = compare_weights(tmp_path / "one", tmp_path / "other")
    assert not found.exact and found.distance == pytest.approx(1e-4, rel=1e-2) and "1 of 2 tensors" in found.text


def test_scores_of_other_videos_are_no_match(trained, tmp_path):
    scores = trained.work / "test/test_scores.npz"
    assert compare_scores(scores, scores).exact
    with np.load(scores) as file:
        arrays = dict(file)
    np.savez(tmp_path / "moved.npz", **arrays | {"anomaly": arrays["anomaly"] + 0.25})
    assert compare_scores(scores, tmp_path / "moved.npz").distance == pytest.approx(0.25)
    np.savez(tmp_path / "other.npz", **arrays | {"videos": np.char.add(arrays["videos"], "x")})
    assert compare_scores(scores, tmp_path / "other.npz").distance == np.inf
