"""Reading the tree of a model again, only where it has changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.reader import TreeReader

layers = keras.layers


def network():
    inner = keras.Sequential([layers.Dense(3, name="first"), layers.Dense(3, name="second")], name="inner")
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="head")])


def test_an_unchanged_model_is_read_once():
    reader = TreeReader(network())
    assert reader.read() is reader.read()


CHANGES = {
    "the flag of a layer": lambda model: setattr(model.get_layer("inner").get_layer("first"), "trainable", False),
    "the flag of a variable": lambda model: setattr(model.get_layer("head").kernel, "trainable", False),
    "a layer more": lambda model: model.add(layers.Dense(1)),
    "an attribute more": lambda model: setattr(model.get_layer("head"), "raw", tf.Variable(1.0)),
    "low-rank terms": lambda model: model.get_layer("head").enable_lora(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_has_changed_is_seen(change):
    model = network()
    reader = TreeReader(model)
    before = reader.read()
    change(model)
    after = reader.read()
    assert after is not before
    assert [v.trainable for v in after.variables] == [
        v.trainable for v in tl.Trainer(model, loss="mse").selection.tree.variables
    ]


def test_another_model_in_a_mapping_is_seen():
    models = {"one": network(), "other": network()}
    reader = TreeReader(models)
    before = reader.read()
    assert reader.read() is before
    models["other"] = network()
    assert reader.read() is not before


def test_a_module_is_read_each_time_since_nothing_tells_of_its_changes():
    module = tf.Module()
    module.v = tf.Variable(1.0)
    reader = TreeReader(module)
    assert reader.read() is not reader.read()


def test_a_flag_that_is_lifted_between_two_epochs_of_a_fit_or_two_fits_counts():
    model = network()
    model.get_layer("inner").trainable = False
    trainer = tl.Trainer(model, loss="mse", optimizer="sgd")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    lift = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: setattr(model.get_layer("inner"), "trainable", True))
    trainer.fit(x, y, epochs=2, callbacks=[lift], verbose=0)
    assert [len(phase.selection.trained) for phase in trainer.history.phases] == [2, 6]
    model.get_layer("head").trainable = False
    trainer.fit(x, y, verbose=0)
    assert len(trainer.history.phases[-1].selection.trained) == 4
    assert len(trainer.selection.trained) == 4
