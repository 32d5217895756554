"""What every test starts from."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# A process that a shell starts in the background ignores Ctrl-C, which some tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, not whether the code is right. A change is judged by
# the same examples every time; new ones are for those who look for them.
settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def ordinary_arithmetic():
    """A program run within the test process flushes denormals, which would last for the tests after it."""
    yield
    torch.set_flush_denormal(False)


# Files that take a minute or more begin first, so that no process is left alone with one of them.
LONG = ["docs_run", "sweep", "export", "structure", "resume", "scripts", "stream", "bad_input", "torture"]


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def ordinary_signals():
    """Nor are a library's handlers those of the next test."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A benchmark with a trained model, never written to."""
    from tiny import make_tiny  # loads the programs, which few tests need

    tiny = make_tiny("ucf", tmp_path_factory.mktemp("built") / "data")
    assert tiny.train("--max-epoch", 1).code == 0
    shutil.rmtree(tiny.folder / "run")
    (tiny.folder / "checkpoint.pth").unlink()
    return tiny


@pytest.fixture
def tiny(built, tmp_path):
    """A copy to spoil; outputs would lie beside the data."""
    shutil.copytree(built.folder, tmp_path / "data")
    return type(built)(built.dataset, tmp_path / "data", tmp_path / "data", built.videos)
