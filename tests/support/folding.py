"""Having tests run with the frozen part folded, and as it is."""

import pytest


def folded_and_not(slow):
    """Return a fixture that has each test run with all steps folded, and in one of both ways in `make test-all` alone.

    Args:
        slow: `"plain"` or `"folded"`.
    """
    # A step is folded from the first batch on if it is worth it from no step on.
    least = {"folded": 0, "plain": 50}

    @pytest.fixture(autouse=True, params=[pytest.param(m, marks=[pytest.mark.slow] * (m == slow)) for m in least])
    def folding(request, monkeypatch):
        monkeypatch.setattr("tapeloop.folding.option.LEAST_STEPS", least[request.param])

    return folding
