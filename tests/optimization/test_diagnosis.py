"""Why a variable gets no gradient: the causes that the traced graph tells apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import refused
from tests.support.steps import OneUpdate

layers = keras.layers


@tf.custom_gradient
def without_gradient(x):
    return x, lambda upstream: None


def branch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.stop_gradient(x), lambda: tf.stop_gradient(2 * x))


CAUSES = {
    "on the way to the loss is a `stop_gradient`": tf.stop_gradient,
    "on the way to the loss is `Cast` of int32, and integers": lambda x: tf.cast(tf.cast(x, tf.int32), tf.float32),
    "on the way to the loss is `Cast` of int64, and integers": lambda x: tf.cast(tf.argmax(x, axis=-1), tf.float32),
    "on the way to the loss is a custom gradient": without_gradient,
    "on the way to the loss is a `py_function`": lambda x: tf.numpy_function(np.tanh, [x], tf.float32),
    "on the way to the loss is `Round`, without gradient": tf.round,
    "on the way to the loss is something in a branch or a loop": branch,
    "on the way to the loss is a `stop_gradient`.": lambda x: tf.nn.silu(tf.stop_gradient(tf.nn.silu(x))),
    # Of a tensor whose shape is known, `tf.zeros_like` makes a constant.
    "on the way to the loss is `ZerosLike`, without gradient": lambda x: tf.raw_ops.ZerosLike(x=x),
    "what is computed from it does not reach the loss": lambda x: tf.zeros(2),
}


ONES = np.ones((4, 3), "float32")


class Detached(OneUpdate):
    """The head is connected, the neck is not."""

    def loss_of(self, batch):
        neck = self.detach(self.model["neck"](batch))
        return tf.reduce_mean(self.model["head"](batch) ** 2) + tf.reduce_mean(neck)


class Early(OneUpdate):
    """The neck is called before the tape is opened."""

    def train_step(self, batch):
        self.early = tf.nn.silu(self.model["neck"](batch))  # whose gradient is a custom one, and innocent
        return super().train_step(batch)

    def loss_of(self, batch):
        return tf.reduce_mean(self.model["head"](batch) ** 2) + tf.reduce_mean(self.early)


def trainer_of(kind, detach=None, **options):
    dense = lambda: layers.Dense(2, use_bias=False, name="dense")  # noqa: E731
    networks = {name: keras.Sequential([keras.Input((3,)), dense()]) for name in ("neck", "head")}
    trainer = kind(networks, optimizer="sgd", **options)
    trainer.detach = detach
    return trainer


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_told(cause):
    text = rf"1 of the 2 variables that should train get no gradient. `neck/dense/kernel`: {cause}.*Let the loss depend"
    trainer = trainer_of(Detached, CAUSES[cause])
    with refused(trainer, tl.DisconnectedError, text):
        trainer.fit(iter([ONES]), verbose=0)


def test_what_is_read_outside_of_the_tape_is_told():
    with pytest.raises(tl.DisconnectedError, match=r"`neck/dense/kernel`: read outside of `with self.tape\(...\):`"):
        trainer_of(Early).fit(iter([ONES]), verbose=0)


def test_eagerly_there_is_no_graph_to_ask_and_nothing_has_moved():
    trainer = trainer_of(Detached, tf.stop_gradient, run_eagerly=True)
    text = r"`neck/dense/kernel`: the loss does not depend on it, or through a"
    with refused(trainer, tl.DisconnectedError, text):
        trainer.fit(iter([ONES]), verbose=0)


def test_integers_are_told():
    class Module(tf.Module):
        def __init__(self):
            self.count = tf.Variable(1)
            self.scale = tf.Variable(1.0)

        def __call__(self, inputs):
            return inputs * self.scale * tf.cast(self.count, tf.float32)

    with pytest.raises(tl.DisconnectedError, match=r"`count`: integers \(int32\) have no gradient"):
        tl.Trainer(Module(), loss="mse", optimizer="sgd").fit([(ONES, ONES)], verbose=0)
