"""Fixtures and settings of all tests."""

import contextlib
import os
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

from clipfusionvad.engine import setup
from clipfusionvad.io.errors import UserError
from clipfusionvad.models import clip
from clipfusionvad.models.layers import distilbert

# A process that a shell starts in the background ignores Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: how long an example takes depends on the machine. With CI set, the examples are the same every time.
settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("unhurried")


# Long files start first, so that both processes end at about the same time.
LONG = "docs disk distributed_runs every_method sweep export resume scripts stream torture".split()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def ordinary_process():
    """Restore what a program that runs within the test process sets: signal handlers, and flushing of denormals."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_flush_denormal(False)
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture
def no_plots(monkeypatch):
    """Trainings without the figures, which take most of their time here."""
    for name in ("draw_score_curves", "draw_training"):
        monkeypatch.setattr(f"clipfusionvad.cli.training.{name}", lambda *args: None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A benchmark with a trained model; tests must not write to it."""
    from tiny import make_tiny  # imports the programs, which few tests need

    tiny = make_tiny("ucf", tmp_path_factory.mktemp("built") / "data")
    assert tiny.train("--max-epoch", 1).code == 0
    shutil.rmtree(tiny.folder / "run")
    (tiny.folder / "checkpoint.pth").unlink()
    return tiny


@pytest.fixture
def tiny(built, tmp_path):
    """A copy that a test may change; outputs go beside the data."""
    shutil.copytree(built.folder, tmp_path / "data")
    return type(built)(built.dataset, tmp_path / "data", tmp_path / "data", built.videos)


@pytest.fixture
def without_clip(monkeypatch):
    """A context in which CLIP's weights, its tokenizer and DistilBERT cannot be had."""

    def refuse(*args, **kwargs):
        raise UserError("no network")

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(setup, "load_clip", refuse)
            patch.setattr(clip, "openai_clip", refuse)
            patch.setattr(distilbert.DistilBert, "find", refuse)
            yield

    return context
