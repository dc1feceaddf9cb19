"""Fixtures of the tests of the feature cache."""

import pytest

from tests.support.cached import watched_cache


@pytest.fixture
def watched():
    with watched_cache() as watched:
        yield watched
