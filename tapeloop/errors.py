"""The errors that tapeloop raises, each before anything has moved.

Every message names what was asked, what was found and what to do about it.
"""


class TapeloopError(Exception):
    """The base of every error of tapeloop."""

    # AutoGraph keeps the type of an error only where it knows how to make another of it: by this very constructor.
    __init__ = Exception.__init__


class PolicyError(TapeloopError, ValueError):
    """A policy cannot be resolved for a model: no match, overlap, nothing left to train."""


class DisconnectedError(TapeloopError, ValueError):
    """A variable that should train receives no gradient."""


class DataError(TapeloopError, ValueError):
    """The data is empty, or does not fit the model."""
