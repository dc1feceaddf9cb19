"""Small models and fits for layers of unusual kinds."""

import keras
import numpy as np

import tapeloop as tl

layers = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(8, 5)).astype("float32")
Y = RANDOM.normal(size=(8, 3)).astype("float32")


def dense():
    return keras.Sequential([keras.Input((5,)), layers.Dense(3, name="d")])


def fit(model, policy=None, steps=3, loss="mse", data=None, **options):
    trainer = tl.Trainer(model, policy, loss=loss, **options)
    trainer.fit(data or [(X, Y)] * steps, progress="none")
    return trainer
