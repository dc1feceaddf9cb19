"""Weights and logs that must be the same, or nearly."""

import numpy as np


def arrays(given):
    """The weights of a model or a trainer, the arrays of a list, or one array, by number; or a mapping by its names."""
    given = getattr(given, "model", given)
    if isinstance(given, dict):
        return given
    weights = given.get_weights() if hasattr(given, "get_weights") else given
    return dict(enumerate(weights if isinstance(weights, (list, tuple)) else [weights]))


def assert_close(mine, theirs, rtol=0.0, atol=0.0):
    mine, theirs = arrays(mine), arrays(theirs)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=rtol, atol=atol, err_msg=str(name))


def assert_same(mine, theirs):
    """To the bit, but for the sign of a zero."""
    assert_close(mine, theirs)
