"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def ordinary_arithmetic():
    """A program run within the test process flushes denormals, which would last for the tests after it."""
    yield
    torch.set_flush_denormal(False)
