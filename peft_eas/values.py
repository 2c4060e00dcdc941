"""Checks of plain values that users give."""

import math
from numbers import Integral, Real
from typing import Any


def python_number(value: Any) -> Any:
    """`value` as an int or a float where it is a number of another library, which JSON does not take; else itself."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_int(value: Any, least: float = -math.inf) -> bool:
    """Whether `value` is an int of at least `least`, and none that is True or False."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: Any) -> bool:
    """Whether `value` is an int or a float, and neither True, False, infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
