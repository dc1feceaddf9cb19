"""Models, data and helpers of the tests of the feature cache."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.loader import DataSpec
from tapeloop.feature_cache import cache
from tapeloop.feature_cache.cache import FeatureCache
from tapeloop.model.tree import Tree
from tests.support.classifiers import backbone, classifier
from tests.support.compare import assert_close

layers = keras.layers
N, BATCH = 22, 4


def drawn(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype("float32") for shape in shapes]


def images(count=N):
    return tuple(drawn((count, 16, 16, 3), (count, 2)))


def tokens():
    return np.random.default_rng(0).integers(0, 50, (N, 7)), *drawn((N, 2))


def pairs():
    first, second, y = drawn((N, 4), (N, 5), (N, 2))
    return (first, second), y


def two_inputs():
    first, second = keras.Input((4,)), keras.Input((5,))
    joined = layers.Concatenate()([layers.Dense(3, name="one")(first), layers.Dense(2, name="other")(second)])
    return keras.Model([first, second], layers.Dense(2, name="head")(joined))


def around():
    inputs = keras.Input((16, 16, 3))
    beside = layers.Dense(3, name="trained")(layers.AveragePooling2D(8)(inputs))
    x = layers.Concatenate()([backbone()(inputs), layers.Flatten()(beside)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def sequence(recurrent, **options):
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 8, name="embedding", **options)(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(recurrent(x)))


def attention():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 8, name="embedding")(inputs)
    x = layers.LayerNormalization(name="norm")(x + layers.MultiHeadAttention(2, 4, name="attention")(x, x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def regularized():
    return classifier(behind=[layers.Dense(6, "relu", kernel_regularizer="l2", name="middle")])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.base = backbone()
        self.drop = layers.Dropout(0.3, seed=3)
        self.bn = layers.BatchNormalization()
        self.head = layers.Dense(2)

    def call(self, inputs, training=None):
        x = self.bn(self.base(inputs, training=training), training=training)
        return self.head(self.drop(x, training=training))


class Distilling(tl.Trainer):
    def compute_loss(self, batch, training):
        x, y = batch
        target, student = self.model["teacher"](x, training=False), self.model["student"](x, training=training)
        loss = tf.reduce_mean((student - target) ** 2) + tf.reduce_mean((student - y) ** 2)
        return loss, {"target": tf.reduce_mean(target)}


class TwoSteps(tl.Trainer):
    def train_step(self, batch):
        x, y = batch
        with self.tape() as tape:
            loss = tf.reduce_mean((self.model(x, training=True) - y) ** 2)
        self.update(tape, loss)
        with self.tape() as tape:
            again = tf.reduce_mean((self.model(x, training=True) - y) ** 4)
        self.update(tape, again)
        return {"loss": loss, "again": again}


def two_outputs():
    inputs = keras.Input((16, 16, 3))
    x = backbone()(inputs)
    return keras.Model(inputs, [layers.Dense(2, name="head_a")(x), layers.Dense(1, name="head_b")(x)])


def two_targets():
    x, y = images()
    return x, (y, y[:, :1])


def networks():
    return {"teacher": classifier(), "student": classifier()}


MODELS = {
    "functional": (classifier, tl.Freeze("base"), images, tl.Trainer),
    "head": (
        lambda: classifier(behind=[layers.Dropout(0.2, seed=1, name="late")]),
        tl.TrainOnly("head"),
        images,
        tl.Trainer,
    ),
    "subclassed": (Subclassed, tl.Freeze("base"), images, tl.Trainer),
    "two inputs": (two_inputs, tl.TrainOnly("head"), pairs, tl.Trainer),
    "around": (around, tl.TrainOnly("head", "trained"), images, tl.Trainer),
    "embedding": (
        lambda: sequence(layers.LSTM(5, name="lstm"), mask_zero=True),
        tl.Freeze("embedding"),
        tokens,
        tl.Trainer,
    ),
    "recurrent": (lambda: sequence(layers.GRU(5, name="gru")), tl.TrainOnly("head"), tokens, tl.Trainer),
    "attention": (attention, tl.TrainOnly("head"), tokens, tl.Trainer),
    "regularized": (regularized, tl.TrainOnly("middle", "head"), images, tl.Trainer),
    "teacher": (networks, tl.TrainOnly("student/head"), images, Distilling),
    "train_step": (classifier, tl.TrainOnly("head"), images, TwoSteps),
    "two outputs": (two_outputs, tl.Freeze("base"), two_targets, tl.Trainer),
    "weights": (classifier, tl.TrainOnly("head"), lambda: (*images(), np.arange(N, dtype="float32")), tl.Trainer),
}


def trainer_of(make, policy, kind=tl.Trainer, **options):
    keras.utils.set_random_seed(0)
    plain = {} if kind is Distilling else {"loss": "mse", "metrics": None if kind is TwoSteps else ["mae"]}
    if make is two_outputs:
        plain = {"loss": ["mse", "mae"]}
    return kind(make(), policy, optimizer="adam", seed=1, **{**plain, **options})


def frozen_base(kind=tl.Trainer, **options):
    return trainer_of(classifier, tl.Freeze("base"), kind, **options)


def weights(trainer):
    return {variable.path: np.asarray(variable.variable) for variable in Tree.of(trainer.model).variables}


def check_same(one, other, rtol=1e-5, atol=1e-5):
    """Check that two runs `(trainer, history)` came to the same."""
    (trainer, history), (plain, without) = one, other
    assert_close(history, without, rtol, atol / 10)
    assert_close(weights(trainer), weights(plain), rtol, atol)
    assert trainer.step == plain.step


@contextlib.contextmanager
def watched_cache():
    """Note the names of data of which features are computed, and of data in whose stead epochs are given features."""
    watched = SimpleNamespace(computed=[], served=[])

    def noting(function, names):
        def noted(*args):
            names.extend(arg.name for arg in args if isinstance(arg, DataSpec))
            return function(*args)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "_compute", noting(FeatureCache._compute, watched.computed))
        patch.setattr(cache, "_loader", noting(cache._loader, watched.served))
        yield watched


def check_cached_run(make, data, *, where="memory", computed=None, served=None, rtol=1e-5, atol=1e-5, **options):
    """Check that a run with a cache is the run without it, and that it did train and evaluate on features.

    Args:
        make: Makes a trainer.
        data: Makes what it is fitted to.
        where: Where features are kept.
        computed: The names of the data of which features should be computed; by default once of each.
        served: The names of the data in whose stead features should come; by default that of each, in each epoch.
    """
    names = ["x", "validation_data"] if "validation_data" in options else ["x"]
    runs = []
    for place in (where, None):
        trainer = make()
        with watched_cache() as watched:
            history = trainer.fit(data(), feature_cache=place, verbose=0, **options).history
        if place is not None:
            assert watched.computed == (names if computed is None else computed), watched
            expected = Counter(names * options.get("epochs", 1) if served is None else served)
            assert expected.keys() == set(watched.served), watched
            assert expected <= Counter(watched.served), watched  # a fit with validation asks once more, to trace
        runs.append((trainer, history))
    check_same(*runs, rtol, atol)
    return runs


def in_batches(data):
    return [tuple(part[start : start + BATCH] for part in data) for start in range(0, len(data[0]), BATCH)]


def of_kind(kind, data):
    batches = in_batches(data)

    class Py(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, number):
            return batches[number]

    dataset = tf.data.Dataset.from_tensor_slices(data)
    return {
        "arrays": data,
        "dataset": dataset.batch(BATCH),
        "list": batches,
        "uneven": [batches[0], tuple(part[4:7] for part in data), *batches[2:]],
        "pydataset": Py(),
        "shuffled": dataset.shuffle(N, seed=0).batch(BATCH),
    }[kind]
