"""Parameters of tests, of which some are slow."""

import pytest


def params(values, slow):
    """The values of a parameter; `make test-all` alone tries those of `slow`, which are variants of the others."""
    values, slow = list(values), list(slow)
    assert all(value in values for value in slow), slow
    # A tuple is the values of several parameters.
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=[pytest.mark.slow] * (value in slow)) for value, each in zip(values, several)]
