"""Weights and logs that must be the same, or nearly."""

import numpy as np


def arrays(given):
    """The weights of a model or a trainer, the values of a mapping, or the arrays of a list, or one array."""
    given = getattr(given, "model", given)
    if hasattr(given, "get_weights"):
        return given.get_weights()
    if isinstance(given, dict):
        return [given[name] for name in sorted(given)]
    return given if isinstance(given, (list, tuple)) else [given]


def assert_close(mine, theirs, rtol=0.0, atol=0.0):
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
    for one, other in zip(arrays(mine), arrays(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_same(mine, theirs):
    """To the bit, but for the sign of a zero."""
    for one, other in zip(arrays(mine), arrays(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
