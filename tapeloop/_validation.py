"""Checks of plain arguments."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np


def whole_number(name: str, value: Any, least: int) -> int:
    """Check a user's whole number, which may be NumPy's.

    Args:
        name: What the user calls it.
        value: What was passed for it.
        least: The smallest that will do.

    Raises:
        ValueError: It is no whole number, or less than `least`.
    """
    try:
        # `operator.index` takes NumPy's whole numbers too, and also bools, which here are a mistake.
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"`{name}` must be a whole number, {least} or more. Received: {value!r}.")
    return number


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, which may be NumPy's."""
    # Python counts a bool as a number; where a rate or a norm is asked for, it is a mistake.
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def not_negative(name: str, value: Any) -> float:
    """Check a user's learning rate or factor, which may be NumPy's.

    Args:
        name: What the user calls it.
        value: What was passed for it.

    Raises:
        ValueError: It is no number, below 0, or not finite.
    """
    # NaN fails this comparison, too.
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number, 0 or more. Received: {value!r}.")
    return float(value)
