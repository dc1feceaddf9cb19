"""Small models, and fits of a few steps."""

import concurrent.futures
import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models

layers = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(8, 4)).astype("float32")
Y = RANDOM.normal(size=(8, 3)).astype("float32")
BAD = np.full_like(X, np.nan)


def mlp(*names):
    """A chain of Dense layers of these names: 4 numbers in, 4 in between, 3 out."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(4, name=name) for name in names[:-1]]
    return keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(3, name=names[-1])])


def dense():
    return mlp("d")


class CountingModule(tf.Module):
    """Counts its calls beside a weight, with nothing of Keras in it."""

    def __init__(self):
        self.scale = tf.Variable(tf.ones(4), name="scale")
        self.calls = tf.Variable(0.0, trainable=False, name="calls")

    def __call__(self, x):
        self.calls.assign_add(1.0)
        return x * self.scale


def fit(model, policy=None, steps=3, epochs=1, loss="mse", data=None, kind=tl.Trainer, **options):
    """A trainer that has trained for some epochs, of so many steps on one batch, or on other data."""
    trainer = kind(model, policy, loss=loss, **options)
    trainer.fit(data or [(X, Y)] * steps, epochs=epochs, verbose=0)
    return trainer


def history_of(model, policy=None, steps=1, **options):
    """The logs of one epoch, by their names."""
    return fit(model, policy, steps, **options).history.history


def moved(model, run, under=""):
    """The paths of the variables that a function changes."""
    before = models.values(model, under)
    run()
    after = models.values(model, under)
    return {path for path in before if before[path] != after[path]}


def state(given):
    """The variables of a model or of a trainer's, and how many steps the trainer has counted."""
    return models.values(getattr(given, "model", given)), getattr(given, "step", None)


@contextlib.contextmanager
def refused(given, error, text):
    """A block that raises, and has changed no variable of a model or of a trainer's, and counted no step."""
    before = state(given)
    with pytest.raises(error, match=text) as raised:
        yield raised
    assert state(given) == before


def in_threads(functions):
    """Call functions in a thread each, and raise what one of them raises."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()
