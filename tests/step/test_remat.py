"""Rematerialization: the same gradients, state moved once, nothing kept, no gradient for what is frozen."""

import keras
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import moved, refused
from tests.support.inspect import live_ops
from tests.support.models import trainer_of
from tests.support.stacks import TRAINED_ONCE, Block, assert_twice_is_once, data, stack, trained

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


class Penalized(Block):
    def call(self, inputs):
        self.add_loss(tf.reduce_mean(inputs**2))
        return super().call(inputs)


def penalized():
    inputs = keras.Input((6, 6, 4))
    x = Penalized(name="block0")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


CHOSEN = {
    "glob": (stack, "block*"),
    "class": (stack, Block),
    "several": (stack, ["block0", "block2/dense"]),
    "first": (stack, tl.first(2, of=Block)),
    "recurrent": (attention, "block0"),
    "module": (Doubled, "block"),
    "bfloat16": (bfloat16, "block1"),
}


def cases():
    """Each choice of layers in each way to run steps; quickly some, and one of them in each."""
    for name in CHOSEN:
        for options in ({}, {"microbatches": 2}, {"run_eagerly": True}):
            slow = name != "glob" and (options or name in ("recurrent", "first", "module", "several", "bfloat16"))
            yield pytest.param(name, options, id=f"{name}-{options}", marks=[pytest.mark.slow] * bool(slow))


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_what_is_computed_twice_ends_as_what_is_computed_once(name, options):
    assert_twice_is_once(*CHOSEN[name], **options)


def convolutions(trainer):
    ops = live_ops(trainer, data(trainer.model))
    return [ops.count(kind) for kind in ("Conv2D", "Conv2DBackpropFilter", "Conv2DBackpropInput")]


def test_the_graph_computes_it_again_and_the_model_is_left_as_it_was():
    # One gradient of inputs less than of kernels: the first block's inputs are the data.
    assert convolutions(TRAINED_ONCE(stack, 2, ())) == [3, 3, 2]
    trainer = trained(stack, remat="block*")
    assert convolutions(trainer)[0] == 6
    assert "call" not in vars(trainer.model.get_layer("block0"))
    trainer.evaluate([data(trainer.model)], verbose=0)


def test_the_graph_has_no_gradient_for_what_is_frozen():
    once, twice = (convolutions(trained(stack, tl.Freeze("block1/conv"), remat=it)) for it in (None, "block*"))
    assert (once[1], twice[1]) == (2, 2)
    assert (once[2], twice[2]) == (2, 3)  # `tf.recompute_grad` takes the gradient of its inputs, needed or not


@pytest.mark.parametrize("eagerly", [False, True])
def test_what_is_frozen_stays_bit_identical_under_it(eagerly):
    model = stack()
    trainer = trainer_of(model, tl.Freeze("block0"), remat="block*", run_eagerly=eagerly, optimizer="adam")
    found = moved(model, lambda: trainer.fit([data(model)] * 2, verbose=0))
    assert {path.split("/")[0] for path in found} == {"block1", "block2", "head"}


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
    with refused(model, error, text):
        trainer_of(model, remat=filter_).fit([data(model)], verbose=0)
