"""Digests of data and of weights that are kept from one fit to the next."""

import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.feature_cache import known_digests
from tapeloop.feature_cache.digests import of_arrays
from tests.support.classifiers import classifier, images


@pytest.fixture
def counted(monkeypatch):
    """The shapes of the arrays that were digested."""
    seen = []

    def counting(structure):
        seen.extend(np.shape(array) for array in tf.nest.flatten(structure))
        return of_arrays(structure)

    monkeypatch.setattr(known_digests, "of_arrays", counting)
    return seen


def test_the_same_arrays_are_digested_once_and_a_change_in_place_is_noticed(counted):
    known = known_digests.KnownDigests()
    x, y = np.arange(4000.0).reshape(1000, 4), tf.range(1000)
    first = known.of_data("x", (x, y, None))
    assert first == of_arrays((x, y, None))
    counted.clear()
    assert known.of_data("x", (x, y, None)) == first
    assert counted == [(334, 4)]  # every third row
    x *= 2
    assert known.of_data("x", (x, y, None)) == of_arrays((x, y, None)) != first


def test_equal_arrays_that_are_others_are_digested_anew(counted):
    known = known_digests.KnownDigests()
    x = np.arange(10.0)
    first = known.of_data("x", x)
    counted.clear()
    assert known.of_data("x", x.copy()) == first
    assert counted == [(10,), (10,)]


def test_an_array_in_a_file_is_digested_each_time(counted, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10.0))
    known, x = known_digests.KnownDigests(), np.load(tmp_path / "x.npy", mmap_mode="r")
    assert known.of_data("x", x) == known.of_data("x", x)
    assert len(counted) == 2


def test_a_second_fit_digests_nothing_and_weights_set_by_hand_are_noticed(counted, caplog):
    model = classifier()
    trainer = tl.Trainer(model, tl.TrainOnly("head"), loss="mse", optimizer="sgd")
    data = images()
    trainer.fit(*data, feature_cache="memory", verbose=0)
    counted.clear()
    trainer.fit(*data, feature_cache="memory", verbose=0)
    assert all(not shape or shape[0] == 0 for shape in counted), counted  # tensors cannot change
    kernel = model.get_layer("base").get_layer("conv").kernel
    kernel.assign(2 * kernel)
    trainer.fit(*data, feature_cache="memory", verbose=0)
    assert "weights changed" in caplog.text
