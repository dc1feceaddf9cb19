"""A stack of layers that compute twice."""

import functools

import keras
import numpy as np
import pytest

from tests.support.models import trainer_of

layers = keras.layers


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """Convolutions with all that may go wrong when it is called twice: statistics, Dropout, a mode handed down."""

    def __init__(self, **options):
        super().__init__(**options)
        dtype = options.get("dtype")
        self.conv = layers.Conv2D(4, 3, padding="same", dtype=dtype)
        self.bn = layers.BatchNormalization(dtype=dtype)
        self.drop = layers.Dropout(0.5, seed=3, dtype=dtype)
        self.dense = layers.Dense(4, dtype=dtype)

    def call(self, inputs):
        return inputs + self.dense(self.drop(keras.ops.relu(self.bn(self.conv(inputs)))))


def stack(policy=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 4))
    x = inputs
    for number in range(3):
        x = Block(name=f"block{number}", dtype=policy)(x)
    return keras.Model(inputs, layers.Dense(3, name="head", dtype="float32")(layers.Flatten()(x)))


def data(model):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 8)
    if getattr(model, "input_shape", None) == (None, 5):
        return generator.integers(0, 11, (8, 5)), y
    return generator.normal(size=(8, 6, 6, 4)).astype("float32"), y


def trained(make, policy=None, steps=2, **options):
    model = make()
    trainer = trainer_of(model, policy, optimizer=keras.optimizers.SGD(0.1), **options)
    trainer.fit([data(model)] * steps, verbose=0)
    return trainer


TRAINED_ONCE = functools.cache(lambda make, steps, options: trained(make, steps=steps, **dict(options)))


def assert_twice_is_once(make, remat, steps=2, atol=1e-5, **options):
    """What is computed twice ends as what is computed once."""
    once = TRAINED_ONCE(make, steps, tuple(options.items()))
    twice = trained(make, steps=steps, remat=remat, **options)
    assert twice.history.history["loss"] == pytest.approx(once.history.history["loss"], rel=1e-5)
    for mine, its in zip(twice.selection.tree.variables, once.selection.tree.variables, strict=True):
        exact = mine.tf_variable.dtype != "float32"
        np.testing.assert_allclose(mine.tf_variable, its.tf_variable, atol=0 if exact else atol, err_msg=mine.path)
