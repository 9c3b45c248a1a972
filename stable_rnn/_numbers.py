"""Arguments that are numbers: any integer or real type will do, numpy's and 0-dimensional tensors too, but no bool."""

from __future__ import annotations

import math
from operator import index
from typing import Any


def to_int(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int. TypeError for what is none, ValueError below `least`."""
    try:
        number = None if _is_bool(value) else index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def to_float(name: str, value: Any, allowed: str = "a number") -> float:
    """The value as a float, infinite where it is beyond all floats. TypeError for what is no real number."""
    if (
        _is_bool(value)
        or not hasattr(value, "__float__")
        or hasattr(value, "dtype")
        and (value.ndim or "complex" in str(value.dtype))
    ):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
