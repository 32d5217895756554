"""Everything that computes, on a device that is not the CPU: nothing is left behind there, and the numbers agree.

The device is that of tests/helpers/second_device.py, so that this is tested on machines without a GPU. TEST_DEVICE=cuda
tests a GPU instead, and what only a GPU has; python benchmarks/gpu.py does that.
"""

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pair
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from made_videos import write_video
from small_detect import write_model
from test_distributed_runs import RUNS, assert_alike, train_member
from test_seeds import no_plots  # noqa: F401
from tiny import METHOD_FLAGS, WIDTH, make_tiny, package_main, quietly, strings
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import backend_registration

from clipfusionvad.data import loaders
from clipfusionvad.data.packed import open_store, store_folder
from clipfusionvad.engine.distributed import gather_rows, sync_batchnorm
from clipfusionvad.engine.run_folder import seed_folder
from clipfusionvad.models import find_method

DEVICE = os.environ.get("TEST_DEVICE", "elsewhere")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "elsewhere" and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch takes no device that is written in Python",
    ),
]
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and TEST_DEVICE=cuda")
TESTS = Path(__file__).resolve().parents[1] / "helpers"
METHODS = [
    name
    for name, method in ((name, find_method(name)) for name in METHOD_FLAGS)
    if method.trained and ("prompt_encoder" not in method.option_names() or find_spec("transformers"))
]
ELSEWHERE = ["--device", DEVICE]
# A training whose rates fall along a cosine cannot be made longer.
SCHEDULE = ["--lr-schedule", "milestones", "--warmup-epochs", 0]


def run_elsewhere(*commands):
    """Run commands, each of which has to end well; what training steps waited for."""
    program = [sys.executable, TESTS / "second_device.py", json.dumps([strings(command) for command in commands])]
    places = os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not any(said["codes"]), done.stderr
    return said["waits"]


def run_in_both(folder, *commands):
    """Run commands, which end in the name of their output, on the CPU and elsewhere; return both folders of outputs."""
    here, there = places = folder / "here", folder / "there"
    for device, place in zip(("cpu", DEVICE), places, strict=True):
        place.mkdir()
        made = [[*argv[:-1], place / argv[-1], "--device", device] for argv in commands]
        if place == there:
            run_elsewhere(*made)
            break
        for argv in made:
            assert (done := quietly(package_main, strings(argv))).code == 0, done.err
    return here, there


def losses_of(run):
    return pd.read_csv(run / "losses.csv")["loss"]


def assert_same_training(one, other):
    np.testing.assert_allclose(losses_of(one), losses_of(other), rtol=1e-3)
    # Steps of Adam make more of what was rounding. On a GPU it may swap two snippets of a few videos.
    tolerance = 0.05 if DEVICE == "cuda" else 1e-2
    assert_same_metrics(one / "metrics.json", other / "metrics.json", tolerance)


def assert_same_metrics(one, other, tolerance=1e-4):
    found, expected = (json.loads(path.read_text()) for path in (one, other))
    assert flat(found) == pytest.approx(flat(expected), abs=tolerance)


def flat(values, name=""):
    if not isinstance(values, dict):
        return {name: values}
    return {key: value for inner in values for key, value in flat(values[inner], f"{name}/{inner}").items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of each method, a model that the CPU trained, and one of elsewhere; under "waits", what training waited for."""
    made, commands = {}, []
    data = make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")
    for method in METHODS:
        here, there = (data.of(method).at(tmp_path_factory.mktemp(name)) for name in ("here", "there"))
        made[method] = here, there
        assert here.train(*SCHEDULE).code == 0
        train = ["train", "--dataset", "ucf", *there.train_flags(*SCHEDULE, *ELSEWHERE, "--use-checkpoint")]
        test = ["test", "--dataset", "ucf", *there.test_flags(*ELSEWHERE, "--metrics-json", there.work / "tested.json")]
        commands += [[*train, "--max-epoch", 1], train, test]
        if method == "iefvad":
            commands += [["uncertainty", *test[1:-2], "--levels", 0.5, "--output-dir", there.work / "uncertainty"]]
    return made | {"waits": run_elsewhere(*commands)}


@pytest.mark.parametrize("method", METHODS)
def test_training_resuming_and_testing_give_the_numbers_of_the_cpu(method, trained):
    here, there = trained[method]
    assert_same_training(here.work / "run", there.work / "run")
    best = json.loads((there.work / "run/metrics.json").read_text())["best"]
    assert json.loads((there.work / "tested.json").read_text()) == best
    # A model that was trained there is one for everywhere.
    assert there.test("--metrics-json", there.work / "cpu.json").code == 0
    assert_same_metrics(there.work / "tested.json", there.work / "cpu.json")


def test_a_training_step_does_not_wait_for_the_device(trained):
    assert trained["waits"] == {}


@pytest.fixture(scope="module")
def trained_in_bf16(tmp_path_factory):
    """Folders of the same trainings with bfloat16, which the device that is written in Python does not have."""
    data = make_tiny("ucf", tmp_path_factory.mktemp("data") / "tiny")
    made = {method: data.of(method).at(tmp_path_factory.mktemp("bf16")) for method in METHODS}
    flags = [*SCHEDULE, "--device", "cuda" if DEVICE == "cuda" else "cpu", "--precision", "bf16"]
    run_elsewhere(*(["train", "--dataset", "ucf", *place.train_flags(*flags)] for place in made.values()))
    return {method: place.work / "run" for method, place in made.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_with_bf16_is_close_to_one_with_float32(method, trained, trained_in_bf16):
    found, expected = losses_of(trained_in_bf16[method]), losses_of(trained[method][0].work / "run")
    assert found[0] == pytest.approx(expected[0], rel=0.02) and not found.equals(expected)
    np.testing.assert_allclose(found, expected, rtol=0.15)


def test_packed_features_and_several_seeds(tmp_path):
    """Batches that are gathered ahead of the device, trainings in turns."""
    data = make_tiny("ucf", tmp_path / "data").of("anomalyclip")
    here, there = data.at(tmp_path / "here"), data.at(tmp_path / "there")
    assert quietly(package_main, ["pack", "--dataset", "ucf", *data.train_flags()]).code == 0
    assert here.train("--seeds", 5, 3).code == 0
    assert run_elsewhere(["train", "--dataset", "ucf", *there.train_flags(*ELSEWHERE, "--seeds", 5, 3)]) == {}
    for seed in (5, 3):
        assert_same_training(*(seed_folder(place.work / "run", seed) for place in (here, there)))


def test_features_of_a_video_and_what_is_found_in_it(tmp_path):
    """Pictures through CLIP's image tower, and those of events for a model of two streams."""
    (tmp_path / "videos").mkdir()
    video = write_video(tmp_path / "videos" / "video.mp4", 70)
    write_model(tmp_path / "model.pt", "iefvad")
    toy = ["--clip", "toy", "--embed-dim", WIDTH]
    places = run_in_both(
        tmp_path,
        ["extract", "--videos", video.parent, "--dtype", "float32", *toy, "--output", "features"],
        ["detect", video, "--checkpoint", tmp_path / "model.pt", "--clip", "toy", "--output", "found"],
    )
    names = sorted(path.relative_to(places[0]) for path in places[0].rglob("*.npy"))
    assert names
    for name in names:
        np.testing.assert_allclose(*(np.load(place / name) for place in places), atol=1e-5)
    one, other = (json.loads((place / "found/video.json").read_text()) for place in places)
    assert one["snippets"]["anomaly"] == pytest.approx(other["snippets"]["anomaly"], abs=1e-5)


def test_what_looks_into_a_model(tmp_path):
    tiny = make_tiny("ucf", tmp_path / "data").at(tmp_path)
    assert tiny.train("--max-epoch", 1).code == 0
    kinds = ("prompts", "gates", "graph", "attention")
    here, there = run_in_both(
        tmp_path, *(["insight", kind, tiny.work / "run", "--output", f"{kind}.png"] for kind in kinds)
    )
    tables = list(here.glob("*.csv"))
    assert len(tables) == 4
    for path in tables:
        one, other = map(pd.read_csv, (path, there / path.name))
        pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("share", [0.5, 0])
def test_packed_batches_from_the_gpus_memory_and_from_pinned_memory(share, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "_GPU_SHARE", share)
    data = make_tiny("ucf", tmp_path / "data")
    assert quietly(package_main, ["pack", "--dataset", "ucf", *data.train_flags()]).code == 0
    store = open_store(store_folder(data.train_list))
    there, here = (loaders.PackedBatches(store, torch.device(name)) for name in (DEVICE, "cpu"))
    assert (there.on_gpu is not None) == bool(share)
    batches = [np.array([4, 0, 2]), np.array([1])]
    for one, other in zip(there.gather(iter(batches)), here.gather(iter(batches)), strict=True):
        assert one.device.type == DEVICE and torch.equal(one.cpu(), other)


def train_on_the_same_gpu(rank, argv):
    """A training of two machines with a GPU each, which is one GPU here: NCCL refuses that, gloo does not."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    torch.backends.cudnn.allow_tf32 = False
    with mock.patch.object(dist, "init_process_group", functools.partial(join, dist.init_process_group)):
        return train_member(rank, argv)


def join(init, backend, **options):
    init("gloo", **options)


@on_gpu
@pytest.mark.parametrize("method", RUNS)
def test_two_processes_with_tensors_on_a_gpu_train_as_one(method, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data = make_tiny("ucf", tmp_path / "data").of(method)
    one, two = data.at(tmp_path / "one"), data.at(tmp_path / "two")
    assert one.train(*RUNS[method], *ELSEWHERE).code == 0
    two.work.mkdir()
    ends = pair.run(train_on_the_same_gpu, (two.train_flags(*RUNS[method], *ELSEWHERE),), two.work)
    assert [end.code for end in ends] == [0, 0], ends
    assert_alike(one, two)


def step_with_nccl(rank):
    """Return 0 if averaged gradients, a BatchNorm over all processes and gathered rows work with NCCL."""
    dist.init_process_group("cpu:gloo,cuda:nccl")
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).cuda()
    (norm,) = sync_batchnorm(model, torch.device("cuda"))
    rows = DistributedDataParallel(model)(torch.eye(4, device="cuda"))
    gather_rows(rows, slice(0, 4), 4).square().sum().backward()
    dist.destroy_process_group()
    return int(not isinstance(norm, nn.SyncBatchNorm) or model[0].weight.grad is None)


@on_gpu
def test_nccl_starts_with_one_process(tmp_path):
    (end,) = pair.run(step_with_nccl, (), tmp_path, size=1)
    assert end.code == 0, end
