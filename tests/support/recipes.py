"""Nested models made from recipes, which Hypothesis draws: the same recipe makes the same model again."""

import inspect
import os

import keras
import tensorflow as tf
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

layers = keras.layers
WIDTH = 4


class Attention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attend = layers.MultiHeadAttention(1, 2, dropout=0.2, seed=3)

    def build(self, shape):
        self.attend.build((None, 2, 2), (None, 2, 2))

    def call(self, x):
        tokens = tf.reshape(x, (-1, 2, 2))
        return tf.reshape(self.attend(tokens, tokens), (-1, WIDTH)) + x


class Recurrent(layers.Layer):
    def __init__(self):
        super().__init__()
        self.rnn = layers.GRU(WIDTH, dropout=0.2, seed=4)

    def build(self, shape):
        self.rnn.build((None, 2, 2))

    def call(self, x):
        return self.rnn(tf.reshape(x, (-1, 2, 2))) + x


class Lookup(layers.Layer):
    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(3, WIDTH)

    def build(self, shape):
        self.table.build()

    def call(self, x):
        return x + self.table(tf.argmax(x[:, :3], axis=-1))


class Augment(layers.Layer):
    """Random brightness, on what might have been an image."""

    def __init__(self):
        super().__init__()
        self.random = layers.RandomBrightness(0.2, value_range=(-9, 9), seed=5)

    def build(self, shape):
        self.built = True

    def call(self, x, training=None):
        return tf.reshape(self.random(tf.reshape(x, (-1, 2, 2, 1)), training=training), (-1, WIDTH))


def takes_training(layer):
    return "training" in inspect.signature(layer.call).parameters


class Chain(layers.Layer):
    """A subclassed container, its children in a list; some of it insists on training mode."""

    def __init__(self, children, insists, name):
        super().__init__(name=name)
        self.steps = children
        self.insists = insists

    def build(self, shape):
        for child in self.steps:
            if not child.built:
                child.build((None, WIDTH))

    def call(self, x, training=None):
        for child in self.steps:
            x = child(x, training=True) if self.insists and takes_training(child) else child(x)
        return x


LEAVES = {
    "dense": lambda: layers.Dense(WIDTH, activation="tanh", kernel_regularizer="l2"),
    "bn": lambda: layers.BatchNormalization(momentum=0.5),
    "bare_bn": lambda: layers.BatchNormalization(scale=False, center=False, momentum=0.5),
    "ln": lambda: layers.LayerNormalization(),
    "dropout": lambda: layers.Dropout(0.3, seed=1),
    "noise": lambda: layers.GaussianNoise(0.3, seed=2),
    "spectral": lambda: layers.SpectralNormalization(layers.Dense(WIDTH)),
    "attention": Attention,
    "recurrent": Recurrent,
    "lookup": Lookup,
    "augment": Augment,
}


UNQUIET = ("spectral", "augment")  # what plain Keras has no way to hold still


def leaves(recipe):
    return [leaf for step in recipe for leaf in ([step] if isinstance(step, str) else leaves(step[1]))]


def thorough(share=1.0):
    """Settings of a law: how many examples there are is said by `TAPELOOP_EXAMPLES`, of which some take a share."""
    count = int(int(os.environ.get("TAPELOOP_EXAMPLES", "40")) * share)
    checks = list(HealthCheck)
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks, print_blob=True)


def recipes(without=(), depth=3, most=8):
    """Draw lists of leaves and `(kind, children)`, nested up to `depth`; "shared" repeats the first dense layer."""
    leaf = st.sampled_from([name for name in (*LEAVES, "shared") if name not in without])
    inner = leaf
    for _ in range(depth):
        containers = st.sampled_from(["sequential", "functional", "chain", "insistent"])
        inner = st.one_of(leaf, st.tuples(containers, st.lists(inner, min_size=1, max_size=3)))
    return st.lists(inner, min_size=1, max_size=3).filter(lambda recipe: 2 <= len(leaves(recipe)) <= most)


def make(recipe):
    """Build the model of a recipe: its blocks, each under a path of its own, and a head."""
    made = {}

    def part(step, name):
        if step == "shared":
            return made.setdefault("shared", layers.Dense(WIDTH, activation="tanh", name="shared"))
        if isinstance(step, str):
            layer = LEAVES[step]()
            layer.name = name
            return layer
        kind, children = step
        parts = [part(child, f"part{index}") for index, child in enumerate(children)]
        if kind in ("chain", "insistent"):
            return Chain(parts, kind == "insistent", name)
        inputs = x = keras.Input((WIDTH,))
        if kind == "sequential" and len({id(p) for p in parts}) == len(parts):
            return keras.Sequential([keras.Input((WIDTH,)), *parts], name=name)
        for layer in parts:
            x = layer(x)
        return keras.Model(inputs, x, name=name)

    inputs = x = keras.Input((WIDTH,))
    for index, step in enumerate(recipe):
        x = part(step, f"block{index}")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))
