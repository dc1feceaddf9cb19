"""Fixtures of the tests of the feature cache."""

import pytest

from tests.support.cached import watched_cache
from tests.support.folding import folded_and_not

folding = folded_and_not(slow="plain")


@pytest.fixture
def watched():
    with watched_cache() as watched:
        yield watched
