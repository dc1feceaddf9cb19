"""Image classifiers with a backbone to freeze, and where their training step is cut."""

import keras
import tensorflow as tf

import tapeloop as tl
from tapeloop.feature_cache.splitting import split
from tests.support import inspect

layers = keras.layers
N = 6


def images():
    return tf.random.stateless_normal((N, 16, 16, 3), (0, 1)), tf.random.stateless_normal((N, 2), (0, 2))


def backbone():
    blocks = [
        layers.Conv2D(4, 3, activation="relu", name="conv"),
        layers.BatchNormalization(name="bn"),
        layers.Dropout(0.5, name="drop"),
        layers.GlobalAveragePooling2D(name="pool"),
    ]
    return keras.Sequential([keras.Input((16, 16, 3)), *blocks], name="base")


def classifier(before=(), behind=()):
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((16, 16, 3))
    for layer in before:
        x = layer(x)
    x = backbone()(x)
    for layer in behind:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


class Wrapped(layers.Layer):
    """Changes its inputs in a way that mixes examples, before weights that are frozen."""

    def __init__(self, mix, width=None, **options):
        super().__init__(**options)
        self.mix, self.width = mix, width

    def build(self, shape):
        self.scale = self.add_weight(shape=(self.width or shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return self.mix(inputs) * self.scale


class Counting(layers.Layer):
    """A layer that the training step moves, and an evaluation does not."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, initializer="zeros", name="count")

    def call(self, inputs, training=False):
        if training:
            self.count.assign_add(1.0)
        return inputs * (1.0 + self.count)


def cut_of(model, policy, batch, kind="train", random=False, trainer_type=tl.Trainer):
    trainer = trainer_type(model, policy, loss="mse", optimizer="sgd")
    trainer.fit(batch, batch_size=N, verbose=0)
    step = inspect.start_phase(trainer) if kind == "train" else inspect.eval_step(trainer)
    spec = tf.nest.map_structure(lambda value: tf.TensorSpec([None, *value.shape[1:]], value.dtype), batch)
    return split(step, spec, batch, random=random)
