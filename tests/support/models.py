"""Small models that the tests share, each made anew by a function."""

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree

layers = keras.layers


def base_layers():
    return [
        layers.Conv2D(4, 3, name="conv", activation="relu"),
        layers.BatchNormalization(name="bn"),
        layers.Dropout(0.5, name="drop"),
        layers.Flatten(name="flat"),
    ]


def functional(**call):
    """A sequential base nested in a functional model, called as `call` says."""
    inputs = keras.Input((6, 6, 1))
    base = keras.Sequential([keras.Input((6, 6, 1)), *base_layers()], name="base")
    return keras.Model(inputs, layers.Dense(3, name="head")(base(inputs, **call)))


def pinned():
    """The same, with the base built in by `base(x, training=False)`."""
    return functional(training=False)


class Subclassed(keras.Model):
    """A base and a head with Dropout of its own; the base is called as the parent is."""

    def __init__(self):
        super().__init__()
        self.base = keras.Sequential([keras.Input((6, 6, 1)), *base_layers()])
        self.drop = layers.Dropout(0.5)
        self.head = layers.Dense(3)

    def call(self, inputs):
        return self.head(self.drop(self.base(inputs)))


class Insistent(Subclassed):
    """Calls its base in training mode, whatever it is called in itself."""

    def call(self, inputs, training=None):
        return self.head(self.base(inputs, training=True))


class Module(tf.Module):
    """A `tf.Module` with raw variables beside a Keras layer."""

    def __init__(self):
        self.base = keras.Sequential([keras.Input((6, 6, 1)), *base_layers()])
        self.w = tf.Variable(tf.random.stateless_normal((64, 3), (1, 2)), name="w")
        self.b = [tf.Variable(tf.zeros(3)), tf.Variable(0.0, trainable=False)]

    def __call__(self, inputs, training=False):
        return self.base(inputs, training=training) @ self.w + self.b[0]


def network(penalty=None):
    """A network without anything random, whose batches may be cut in pieces."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(4, 3, activation="tanh", kernel_regularizer=penalty, name="conv")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def blocks(count=4):
    """A stem, numbered blocks and a head."""
    numbered = [layers.Dense(3, name=f"block{index}") for index in range(count)]
    return keras.Sequential([keras.Input((3,)), layers.Dense(3, name="stem"), *numbered, layers.Dense(1, name="head")])


def tied():
    """A model with a weight of its embedding as an attribute of its own."""
    model = keras.Model()
    model.embed = layers.Embedding(5, 2)
    model.embed.build()
    model.out = model.embed.embeddings
    return model


class Seen(layers.Layer):
    """Counts its calls in a variable that nobody tracks, since it stands in a closure."""

    def __init__(self):
        super().__init__()
        self.count = (lambda variable: lambda: variable)(tf.Variable(0, trainable=False))

    def call(self, inputs):
        self.count().assign_add(1)
        return inputs


def built(model):
    model(tf.zeros((2, 6, 6, 1)))
    return model


def images(count=40):
    generator = np.random.default_rng(0)
    return generator.normal(size=(count, 6, 6, 1)).astype("float32"), generator.integers(0, 3, count)


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def values(model, under=""):
    """The bytes of every variable of a model, by path."""
    return {
        variable.path: variable.tf_variable.numpy().tobytes()
        for variable in Tree.of(model).variables
        if any(f"{path}/".startswith(f"{under}/" if under else "") for path in variable.paths)
    }


def trainer_of(model=None, policy=None, kind=tl.Trainer, **options):
    options.setdefault("loss", cross_entropy())
    return kind(model or functional(), policy, **options)
