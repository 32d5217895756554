"""Everything that computes, on a device that is not the CPU: nothing is left behind there, and the numbers agree.

The device is that of tests/helpers/second_device.py, so that this is tested on machines without a GPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_videos import write_video
from small_detect import write_model
from test_seeds import no_plots  # noqa: F401
from tiny import METHOD_FLAGS, WIDTH, make_tiny, package_main, quietly, strings
from torch.utils import backend_registration

from clipfusionvad.engine.run_folder import seed_folder
from clipfusionvad.models import find_method

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch takes no device that is written in Python",
    ),
]
TESTS = Path(__file__).resolve().parents[1] / "helpers"
METHODS = [
    name
    for name, method in ((name, find_method(name)) for name in METHOD_FLAGS)
    if method.trained and ("prompt_encoder" not in method.option_names() or find_spec("transformers"))
]
ELSEWHERE = ["--device", "elsewhere"]


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
    places = {"cpu": folder / "here", "elsewhere": folder / "there"}
    made = {}
    for device, place in places.items():
        place.mkdir()
        made[device] = [[*argv[:-1], place / argv[-1], "--device", device] for argv in commands]
    for argv in made["cpu"]:
        assert (done := quietly(package_main, strings(argv))).code == 0, done.err
    run_elsewhere(*made["elsewhere"])
    return list(places.values())


def assert_same_training(one, other):
    losses = [pd.read_csv(run / "losses.csv")["loss"] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    # Steps of Adam make more of what was rounding.
    assert_same_metrics(one / "metrics.json", other / "metrics.json", tolerance=1e-2)


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
        # A training whose rates fall along a cosine cannot be made longer.
        flags = ["--lr-schedule", "milestones", "--warmup-epochs", 0]
        assert here.train(*flags).code == 0
        train = ["train", "--dataset", "ucf", *there.train_flags(*flags, *ELSEWHERE, "--use-checkpoint")]
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
