import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

from tests.parts import part


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)  # collecting garbage takes seconds, once many graphs were traced


def pytest_addoption(parser):
    parser.addoption("--part", metavar="I/N", help="run the files of the I-th of N parts of the tests")


def pytest_collection_modifyitems(config, items):
    which = config.getoption("--part")
    if which is not None:
        chosen = part((str(item.path) for item in items), which)
        config.hook.pytest_deselected(items=[item for item in items if str(item.path) not in chosen])
        items[:] = [item for item in items if str(item.path) in chosen]
