"""Checks of plain arguments."""

from __future__ import annotations

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
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"`{name}` must be a whole number, {least} or more. Received: {value!r}.")
    return number
