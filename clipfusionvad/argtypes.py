"""Types of command-line values that say what they expect."""

from __future__ import annotations

import argparse
from typing import Any


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a positive whole number")


def non_negative_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


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


def _number(text: str, kind: type, accept: Any, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value
