"""Training where TensorFlow allows deterministic ops alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

import tapeloop as tl

X, Y = np.random.default_rng(0).normal(size=(24, 4, 4, 3)).astype("float32"), np.ones((24, 1), "float32")


@pytest.fixture
def deterministic():
    tf.config.experimental.enable_op_determinism()
    yield
    config.disable_op_determinism()


def trained(data, **options):
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten()], name="base")
    model = keras.Sequential([keras.Input((4, 4, 3)), base, keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", seed=0, **options)
    trainer.fit(data, batch_size=None if isinstance(data, tf.data.Dataset) else 8, epochs=2, verbose=0)
    return np.concatenate([variable.numpy().ravel() for variable in model.variables])


@pytest.mark.parametrize("options", [{}, {"fold_frozen": True}, {"nonfinite": "skip"}])
def test_two_runs_are_bit_identical(deterministic, options):
    np.testing.assert_array_equal(trained((X, Y), **options), trained((X, Y), **options))


def test_so_are_two_runs_on_a_dataset(deterministic):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    np.testing.assert_array_equal(trained(data), trained(data))
