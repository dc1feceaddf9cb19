"""Rematerialization: the same gradients, state moved once, nothing kept, no gradient for what is frozen."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.inspect import live_ops
from tests.support.models import trainer_of
from tests.support.stacks import Block, data, stack, weights

layers = keras.layers


def attention():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 8, mask_zero=True, name="embed")(inputs)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.2, seed=1), name="block0")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


class Doubled(tf.Module):
    """A raw variable that counts, beside a layer."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        self.block = Block(name="block")
        self.count = tf.Variable(0.0, trainable=False)
        self.head = layers.Dense(3)

    def __call__(self, inputs, training=False):
        self.count.assign_add(1.0)
        return self.head(tf.reshape(self.block(inputs, training=training), [-1, 144]))


def bfloat16():
    return stack("mixed_bfloat16")


CHOSEN = {
    "glob": (stack, "block*"),
    "class": (stack, Block),
    "several": (stack, ["block0", "block2/dense"]),
    "first": (stack, tl.first(2, of=Block)),
    "recurrent": (attention, "block0"),
    "module": (Doubled, "block"),
    "bfloat16": (bfloat16, "block1"),
}
ONCE = functools.cache(lambda make, options: weights(make, **dict(options)))  # to compare with, for each model


def cases():
    """Each choice of layers; with micro-batches, those of ordinary and of recurrent layers, and slowly all."""
    for name in CHOSEN:
        for options in ({}, {"microbatches": 2}, {"run_eagerly": True}):
            slow = options == {"microbatches": 2} and name not in ("glob", "recurrent")
            yield pytest.param(name, options, id=f"{name}-{options}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_what_is_computed_twice_ends_as_what_is_computed_once(name, options):
    make, filter_ = CHOSEN[name]
    once, loss_once, _ = ONCE(make, tuple(options.items()))
    twice, loss_twice, _ = weights(make, remat=filter_, **options)
    np.testing.assert_allclose(loss_twice, loss_once, rtol=1e-5)
    for path, value in once.items():
        np.testing.assert_allclose(twice[path], value, atol=1e-5 if value.dtype == np.float32 else 0, err_msg=path)


def convolutions(trainer):
    ops = live_ops(trainer, data(trainer.model))
    return [ops.count(kind) for kind in ("Conv2D", "Conv2DBackpropFilter", "Conv2DBackpropInput")]


def test_the_graph_computes_it_again_and_no_gradient_for_what_is_frozen():
    assert convolutions(weights(stack)[2]) == [3, 3, 2]
    assert convolutions(weights(stack, remat="block*")[2])[0] == 6
    once = convolutions(weights(stack, tl.Freeze("block1/conv"))[2])
    twice = convolutions(weights(stack, tl.Freeze("block1/conv"), remat="block*")[2])
    assert (once[1], twice[1]) == (2, 2)
    assert (once[2], twice[2]) == (2, 3)  # `tf.recompute_grad` takes the gradient of its inputs, needed or not


@pytest.mark.parametrize("eagerly", [False, True])
def test_what_is_frozen_stays_bit_identical_under_it(eagerly):
    model = stack()
    before = models.values(model, "block0")
    policy = tl.Freeze("block0")
    trainer = trainer_of(model, policy, remat="block*", run_eagerly=eagerly, optimizer="adam")
    trainer.fit([data(model)] * 2, progress="none")
    assert models.values(model, "block0") == before
    assert models.values(model, "block1") != {}


def test_the_model_is_left_as_it_was():
    model = stack()
    trainer = trainer_of(model, remat="block*")
    trainer.fit([data(model)], progress="none")
    assert "call" not in vars(model.get_layer("block0"))
    assert convolutions(trainer)[0] == 6
    trainer.evaluate([data(model)], progress="none")


class Penalized(Block):
    def call(self, inputs):
        self.add_loss(tf.reduce_mean(inputs**2))
        return super().call(inputs)


def penalized():
    inputs = keras.Input((6, 6, 4))
    x = Penalized(name="block0")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


@pytest.mark.parametrize(
    ("make", "filter_", "error", "text"),
    [
        (stack, "blocks/*", tl.PolicyError, r"`remat` was asked for glob\('blocks/\*'\), which names no layer"),
        (stack, layers.LSTM, tl.PolicyError, r"`remat` was asked for of_type\(LSTM\), which names no layer"),
        (stack, tl.named("kernel"), TypeError, r"`remat` takes filters that name layers: .* which speaks of variables"),
        (penalized, "block0", tl.PolicyError, r"`remat` cannot hold for `block0`: a layer in it adds a loss"),
    ],
)
def test_what_it_cannot_do(make, filter_, error, text):
    model = make()
    before = models.values(model)
    with pytest.raises(error, match=text):
        trainer_of(model, remat=filter_).fit([data(model)], progress="none")
    assert models.values(model) == before


def test_it_takes_wheres_only():
    with pytest.raises(TypeError, match=r"A filter must be a path glob, .* or a `Filter`. Received: 3"):
        trainer_of(remat=3)
