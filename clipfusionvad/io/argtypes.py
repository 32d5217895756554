"""Types of command-line values that say what they expect."""

from __future__ import annotations

import argparse
import math
from typing import Any

# What counters and generators of numbers take everywhere.
_LARGEST = 2**31 - 1
# Widths, lengths and depths beyond these are slips of the keyboard, which would only exhaust the memory.
_LARGEST_SIZE, _MOST_LAYERS = 2**16, 1000


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a positive whole number", _LARGEST)


def non_negative_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more", _LARGEST)


def size(text: str) -> int:
    """Of a tensor's axis."""
    return _number(text, int, lambda value: value > 0, "a positive whole number", _LARGEST_SIZE)


def layers(text: str) -> int:
    """Of a model, or other things that are made one by one."""
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more", _MOST_LAYERS)


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a positive number")


def non_negative_float(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number, 0 or more")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def rate(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to less than 1")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, kind: type, accept: Any, what: str, largest: float = math.inf) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    if value > largest:
        raise argparse.ArgumentTypeError(f"must be at most {largest}, got {text!r}")
    return value
