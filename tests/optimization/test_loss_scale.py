"""Mixed precision: the scale of float16 losses, decided on once a step for all groups."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.optimization.loss_scale import FIRST_SCALE, GROWS_AFTER, LossScale
from tests.support import models
from tests.support.steps import InTurn

layers = keras.layers


def half(units=3, factor=1.0, policy="mixed_float16"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = layers.Dense(8, activation="relu", dtype=policy, name="hidden")(inputs)
    hidden = layers.Rescaling(factor, dtype=policy, name="times")(hidden)
    return keras.Model(inputs, layers.Dense(units, dtype="float32", name="head")(hidden))


def numbers(count=64):
    generator = np.random.default_rng(0)
    return generator.normal(size=(count, 4)).astype("float32"), generator.integers(0, 3, count)


def test_an_overflow_in_float16_halves_the_scale_and_moves_nothing():
    model = half(factor=100.0)
    trainer = tl.Trainer(model, loss=models.cross_entropy(), optimizer="adam")
    data = [numbers(8)]
    before = models.values(model)
    scales = []
    while not trainer.step:
        trainer.fit(data, verbose=0)
        scales.append(trainer.loss_scale)
        assert (models.values(model) == before) == (trainer.step == 0)
        assert len(scales) < 20
    assert len(scales) > 1, "nothing overflowed"
    assert scales[:-1] == [FIRST_SCALE / 2 ** (1 + number) for number in range(len(scales) - 1)]
    assert scales[-1] == scales[-2]


class Grouped(InTurn):
    order = ("hidden", "head")

    def loss_of(self, group, batch):
        factor = 1e6 if group == "hidden" else 1.0
        return factor * models.cross_entropy()(batch[1], self.model(batch[0], training=True))


def test_an_overflow_in_one_group_halves_the_scale_once_and_moves_none():
    model = half()
    trainer = Grouped(model, tl.Groups({"hidden": "hidden", "head": "head"}), optimizer="adam")
    before = models.values(model)
    trainer.fit([numbers(8)], verbose=0)
    assert trainer.loss_scale == FIRST_SCALE / 2
    assert models.values(model) == before
    assert trainer.step == 0


def test_a_step_in_half_precision_equals_one_in_float32_and_float16_alone_is_scaled():
    kernels = {}
    for policy in ("mixed_float16", "mixed_bfloat16", "float32"):
        model = half(policy=policy)
        trainer = tl.Trainer(model, loss=models.cross_entropy(), optimizer=keras.optimizers.SGD(0.1))
        trainer.fit([numbers(16)], verbose=0)
        kernels[policy] = model.get_layer("hidden").kernel.numpy()
        assert (trainer.loss_scale is None) == (policy != "mixed_float16")
    for policy in ("mixed_float16", "mixed_bfloat16"):
        np.testing.assert_allclose(kernels[policy], kernels["float32"], atol=1e-3)


def test_a_loss_that_is_not_finite_is_no_overflow():
    x, y = numbers(8)
    trainer = tl.Trainer(half(), loss=models.cross_entropy(), optimizer="adam")
    with pytest.raises(tl.NonFiniteError, match="the loss is nan"):
        trainer.fit([(np.full_like(x, np.nan), y)], verbose=0)


def test_the_scale_doubles_after_many_finite_steps_and_ends_at_one():
    scale, sums = LossScale(), tf.zeros(2)
    scale.prepare(tl.Trainer(half(), loss="mse").selection)
    for _ in range(GROWS_AFTER - 1):
        scale.update(sums, tf.constant(True))
    assert float(scale.value) == FIRST_SCALE
    scale.update(sums, tf.constant(True))
    assert float(scale.value) == 2 * FIRST_SCALE
    for _ in range(20):
        scale.update(sums, tf.constant(False))
    assert float(scale.value) == 1.0
