"""Whole training runs of the original, replayed by our own loop from its weights and its batch order."""

import csv
import json
import os

import numpy as np
import pair
import pytest
import torch
from originals import dataset_of, difference, each_case, float64, load_original, read_config, separation, tolerance

from clipfusionvad.data.features import check_features, load_features
from clipfusionvad.data.lists import read_list
from clipfusionvad.data.loaders import BagDataset, PackedBatches
from clipfusionvad.data.packed import open_store, write_store
from clipfusionvad.data.sampling import split_windows, window_lengths
from clipfusionvad.data.truth import read_truth
from clipfusionvad.engine.config import TrainingConfig
from clipfusionvad.engine.distributed import distributed_context
from clipfusionvad.engine.evaluator import VideoDataset, evaluate, score_dataset
from clipfusionvad.engine.trainer import Trainer
from clipfusionvad.io.rank import is_main

CPU = torch.device("cpu")
LISTS = ("train_list", "test_list")
METRICS = {"AUC1": "auc1", "AP1": "ap1", "AUC2": "auc2", "AP2": "ap2"}


class RecordedPlan:
    """The original's batches, in its order."""

    def __init__(self, case, trace):
        batches = np.load(case / "batches.npz")
        if "rows" in batches:
            rows = [row[row >= 0] for row in batches["rows"]]
        else:
            rows = np.concatenate([batches["normal_rows"], batches["anomaly_rows"]], axis=1)
        self.lengths = [row[row >= 0] for row in batches["lengths"]]
        self.epochs = [[rows[i] for i in np.flatnonzero(trace["epoch"] == e)] for e in np.unique(trace["epoch"])]

    def epoch(self, epoch):
        return self.epochs[epoch]


def training_config(config):
    # "evaluation after batch i … when i*batch_size*2 % 1280 == 0 and i != 0" or "one evaluation at each epoch end"
    words = config["cadence"].replace("%", " ").split()
    every = int(words[words.index("==") - 1]) if "==" in words else 0
    return TrainingConfig(
        seed=0,
        max_epoch=config["epochs"],
        batch_size=1,
        balanced=True,
        lr=config["optimizer"]["lr"],
        scheduler_milestones=tuple(config["scheduler"]["milestones"]),
        scheduler_rate=config["scheduler"]["gamma"],
        eval_every=every,
        select=METRICS[config["selection"].split()[0]],
    )


@pytest.fixture
def one_thread():
    """Rounding depends on how many threads share a sum, and over many steps the similarity threshold, on one side of
    which a graph entry is 0, can turn it into a difference of 1e-4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pack(folder, entries, path, model):
    write_store(folder, entries, path, model.streams, model.visual_width, model.sampling, "float32", workers=1)
    return PackedBatches(open_store(folder), CPU)


def load_initial(case):
    config = read_config(case)
    return load_original(case, config, case / config["init"])


def train_again(case, folder, model):
    """Train as the original did, recording in ``folder``; return the modes and lengths of the steps."""
    config, trace = read_config(case), np.load(case / "trace.npz")
    dataset = dataset_of(config)
    train, test = (read_list(case / config[name], case / config["data_root"], dataset) for name in LISTS)
    snippets = check_features(test, model.visual_width, config["test_list"])
    paths = [case / config[key] for key in ("gt", "gt_segment", "gt_label")]
    videos = VideoDataset(test, dataset, model.visual_width, read_truth(*paths, test, snippets, dataset))
    plan = RecordedPlan(case, trace)
    packed = pack(folder / "train.pack", train, case / config["train_list"], model) if "PACKED" in os.environ else None
    bags = BagDataset(train, dataset, model.sampling, model.visual_width, packed=packed)

    modes, lengths = [], []
    compute_losses = model.losses

    def watched_losses(output, targets, valid):
        modes.append(model.training)
        lengths.append(valid.tolist())
        return compute_losses(output, targets, valid)

    model.losses = watched_losses

    def score(model):
        return evaluate(score_dataset(model, videos, CPU), videos)

    Trainer(model, bags, plan, training_config(config), score, {"method": model.name}, CPU).fit(folder)
    return modes, lengths


def train_in_part(rank, case, folder):
    """One of several processes that train together; the first writes what all of them come to."""
    torch.set_num_threads(1)
    with distributed_context("cpu"):
        model = load_initial(case)
        modes, lengths = train_again(case, folder, model)
        if is_main():
            torch.save((model.state_dict(), modes, lengths), folder / "end.pt")


def train_together(case, folder, size, model):
    ends = pair.finish(pair.start(train_in_part, (case, folder), folder, size), folder, timeout=600)
    assert [end.code for end in ends] == [0] * size, ends
    state, modes, lengths = torch.load(folder / "end.pt")
    model.load_state_dict(state)
    return modes, lengths


@pytest.mark.usefixtures("one_thread")
@each_case("train_", holding="trace.npz")
def test_whole_run(case, tmp_path):
    config, trace = read_config(case), np.load(case / "trace.npz")
    evaluations = json.loads((case / "evaluations.json").read_text())["evaluations"]
    model = load_initial(case)
    with float64(model) as exact:
        train_again(case, tmp_path / "exact", exact)
        exact_losses, exact_log = read_records(tmp_path / "exact", config)
        exact_outputs = final_outputs(case, config, exact)
    processes = int(os.environ.get("PROCESSES", 1))
    if processes > 1:
        modes, lengths = train_together(case, tmp_path, processes, model)
    else:
        modes, lengths = train_again(case, tmp_path, model)

    losses, log = read_records(tmp_path, config)
    assert len(losses["lr"]) == config["steps"] == len(trace["loss"])
    assert modes == trace["training_mode"].tolist()
    assert lengths == [row.tolist() for row in RecordedPlan(case, trace).lengths]
    np.testing.assert_array_equal(losses["lr"], trace["lr"])
    # What two runs of the original differ by is rounding, too.
    noise = config["noise_between_two_runs_max"]
    for name in ("loss1", "loss2", "loss3", "loss"):
        allowed = max(
            3 * noise["losses"], tolerance(difference(losses[name], exact_losses[name]), trace[name], floor=1)
        )
        assert difference(losses[name], trace[name]) <= allowed, name

    assert [record["step"] for record in log] == [expected["after_step"] for expected in evaluations]
    assert [record["improved"] for record in log] == [expected["saved_as_best"] for expected in evaluations]
    for record, exact_record, expected in zip(log, exact_log, evaluations, strict=True):
        found, exact_found = record["metrics"], exact_record["metrics"]
        for theirs, ours in METRICS.items():
            allowed = max(3 * noise[theirs], 5e-5, 4 * abs(found[ours] - exact_found[ours]))
            assert found[ours] == pytest.approx(expected[theirs], abs=allowed), (record["step"], ours)
        for iou, value in zip(("0.1", "0.2", "0.3", "0.4", "0.5"), expected["mAP"], strict=True):
            allowed = max(3 * noise["mAP"], 1e-6, 4 * abs(found["map"][iou] - exact_found["map"][iou]))
            assert found["map"][iou] == pytest.approx(value, abs=allowed)

    recorded = np.load(case / "final_outputs.npz")
    for name, ours in final_outputs(case, config, model).items():
        own = tolerance(difference(ours, exact_outputs[name]), recorded[name])
        allowed = max(3 * noise["final_logits1" if name.endswith("logits1") else "final_logits2"], own)
        assert difference(ours, recorded[name]) <= allowed, name
    state = model.state_dict()
    # Where the true gradient is zero weights wander under AdamW: keys' biases, and those before BatchNorm.
    wandering = ("spatial_attention", "in_proj_bias")
    steady = [i for i, name in enumerate(config["final_names"]) if not any(part in name for part in wandering)]
    norms = [state[config["final_names"][index]].norm().item() for index in steady]
    np.testing.assert_allclose(norms, recorded["final_norms"][steady], rtol=1e-3)


def read_records(folder, config):
    """Return the losses of all steps under the names of the trace, and the records of the evaluations."""
    weight, included = separation(config)
    with (folder / "losses.csv").open() as file:
        steps = list(csv.DictReader(file))
    names = {"lr": "lr", "loss1": "coarse", "loss2": "fine", "loss3": "separation", "loss": "loss"}
    losses = {name: np.array([float(row[column]) for row in steps]) for name, column in names.items()}
    losses["loss3"] /= 1 if included else weight
    return losses, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_outputs(case, config, model):
    """Return what a model, which ends with the best weights loaded back, gives for the recorded videos."""
    test = read_list(case / config["test_list"], case / config["data_root"], dataset_of(config))
    recorded = np.load(case / "final_outputs.npz")
    model.eval()
    with torch.no_grad():
        found = {"text_features": model.encode_text()}
        for number, video in enumerate(config["final_videos"]):
            windows, count = split_windows(load_features(test[video["index"]].path), model.visual_length)
            lengths = window_lengths(count, model.visual_length)
            assert lengths.tolist() == recorded[f"video{number}_window_lengths"].tolist()
            out = model(torch.from_numpy(windows).float(), torch.from_numpy(lengths))
            found |= {f"video{number}_logits1": out.coarse_logits, f"video{number}_logits2": out.fine_logits}
    return found
