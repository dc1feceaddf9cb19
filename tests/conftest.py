import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _begins_anew():
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)  # collecting garbage takes seconds, once many graphs were traced
    yield
    gc.freeze()  # what is left of traces is not looked through again: each collection would take seconds
