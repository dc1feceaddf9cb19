"""What the tests of tuning send to other processes, which find it here by its name."""

import dataclasses
import os
import signal

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tapeloop.tuning.candidates import Facts

layers = keras.layers


def doubled(y, outputs):
    return 2 * keras.ops.mean(keras.ops.square(y - outputs))


class Halved(keras.losses.Loss):
    def call(self, y, outputs):
        return 0.5 * keras.ops.mean(keras.ops.square(y - outputs), axis=-1)


class Counted(keras.metrics.Metric):
    def __init__(self, start=0, **kwargs):
        super().__init__(**kwargs)
        self.start = start
        self.total = self.add_weight(initializer="zeros", name="total")

    def update_state(self, y, outputs, sample_weight=None):
        self.total.assign_add(1.0)

    def result(self):
        return self.total + self.start

    def get_config(self):
        return {**super().get_config(), "start": self.start}


class Tempered(tl.Trainer):
    """A subclass whose `__init__` has arguments of its own, and makes what others are made of."""

    def __init__(self, model, temperature, *, teacher=None, table=None, noise=None):
        super().__init__(model, loss=doubled, optimizer=keras.optimizers.SGD(0.1))
        self.temperature = temperature
        self.teacher = teacher
        self.table = table
        self.noise = noise
        self.made_by_itself = lambda: None  # which nobody could send


class Module(tf.Module):
    """Raw variables, in a list too, beside a Keras layer."""

    def __init__(self):
        super().__init__()
        self.layer = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        self.w = tf.Variable(tf.ones((3, 2)), name="w")
        self.b = [tf.Variable(tf.zeros(2)), tf.Variable(0.0, trainable=False)]

    def __call__(self, inputs):
        return self.layer(inputs) @ self.w + self.b[0]


class Deadly(layers.Layer):
    """Is killed where it computes in bfloat16, as by a system that is out of memory."""

    def build(self, shape):
        self.weight = self.add_weight(shape=())

    def call(self, inputs):
        if self.compute_dtype == "bfloat16":
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs


def mlp(*between):
    dense = [layers.Dense(8, activation="relu", name="base"), *between, layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((4,)), *dense])


def data(examples=64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(examples, 4)).astype("float32"), rng.normal(size=(examples, 2)).astype("float32")


def facts(**others):
    """What is known of a trainer of which nothing can be made faster, but for some facts."""
    none = Facts(
        on_gpu=False,
        uses_xla=False,
        folds=False,
        steps_per_call="auto",
        frozen_dtype=None,
        remats=False,
        is_frozen=False,
        can_lower=False,
        blocks=(),
        draws=False,
    )
    return dataclasses.replace(none, **others)
