"""What every test starts from."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

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
