"""The errors that tapeloop raises, each before anything has moved, or with all of it put back.

Every message names what was asked, what was found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


def listed(paths: Sequence[str], most: int = 8) -> str:
    """Name paths for a message: the first of them, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"`{path}`" for path in paths[:most]) + more


class TapeloopError(Exception):
    """The base of every error of tapeloop."""

    # AutoGraph keeps the type of an error only where it knows how to make another of it: by this very constructor.
    __init__ = Exception.__init__


class PolicyError(TapeloopError, ValueError):
    """A policy cannot be resolved for a model: no match, overlap, nothing left to train."""


class DisconnectedError(TapeloopError, ValueError):
    """A variable that should train receives no gradient."""


class NonFiniteError(TapeloopError, ArithmeticError):
    """A loss or a gradient is Inf or NaN.

    Attributes:
        step: How many steps were trained before.
        paths: The variables whose gradients are not finite.
    """

    step: int = 0
    paths: tuple[str, ...] = ()


class CacheError(TapeloopError):
    """Features cannot be cached: nothing can, it would be wrong, or they do not fit."""


class DataError(TapeloopError, ValueError):
    """The data is empty, or does not fit the model."""
