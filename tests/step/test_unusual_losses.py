"""Losses, metrics and logs that broke an earlier version, or might have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import RANDOM, X, Y, dense, fit
from tests.support.steps import OneUpdate

layers = keras.layers


def test_masked_metrics_equal_those_of_keras():
    ids = RANDOM.integers(1, 9, (8, 6))
    ids[:, 3:] = 0
    y = RANDOM.normal(size=(8, 6, 2)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.LSTM(3, return_sequences=True),
            layers.Dense(2),
        ]
    )
    mine = tl.Trainer(model, loss="mse", metrics=["mae"]).evaluate((ids, y), verbose=0)
    model.compile("sgd", "mse", metrics=["mae"])
    assert mine == pytest.approx(model.evaluate(ids, y, verbose=0, return_dict=True), rel=1e-5)


class OneOfTwo(OneUpdate):
    """Each step calls the model `a` alone, each evaluation `b`."""

    groups = ("a",)

    def loss_of(self, batch):
        error = tf.reduce_mean((self.model["a"](batch[0], training=True) - batch[1]) ** 2)
        return tf.add_n([error, *self.added_losses()])

    def eval_step(self, batch):
        return {"output": tf.reduce_mean(self.model["b"](batch[0], training=False))}


def test_losses_added_in_other_traces_and_calls_are_left_out():
    def make():
        keras.utils.set_random_seed(0)
        penalized = [keras.Sequential([keras.Input((4,)), layers.Dense(3, activity_regularizer="l2")]) for _ in "ab"]
        return OneOfTwo(dict(zip("ab", penalized)), tl.Groups({"a": "a", "b": "b"}))

    expected = make().fit([(X, Y)], verbose=0).history
    trainer = make()
    trainer.model["b"](X * 100)
    assert trainer.fit([(X, Y)], verbose=0).history == expected
    trainer = make()
    trainer.evaluate([(X, Y)], verbose=0)
    assert trainer.fit([(X, Y)], verbose=0, validation_data=[(X, Y)]).history["loss"] == expected["loss"]


def test_evaluation_reports_what_it_computed_and_nothing_else():
    trainer = OneOfTwo({"a": dense(), "b": dense()}, tl.Groups({"a": "a", "b": "b"}))
    history = trainer.fit([(X, Y)], epochs=2, validation_data=[(X, Y)], verbose=0).history
    assert {name: len(values) for name, values in history.items()} == {"loss": 2, "val_output": 2}
    assert list(trainer.evaluate([(X, Y)], verbose=0)) == ["output"]


def pairwise(y, p):
    first, second = tf.split(p, 2)
    return tf.reduce_mean((first - second) ** 2)


def asserting(y, p):
    tf.debugging.assert_positive(y)
    return tf.reduce_mean((y - p) ** 2)


@pytest.mark.parametrize("loss", [pairwise, asserting])
def test_a_loss_is_never_run_on_made_up_data(loss):
    data = [(X, abs(Y) + 1)]
    assert fit(dense(), loss=loss, data=data).step == 1


def test_a_metric_of_several_values_is_kept_as_an_array():
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2, 0, 1]]
    history = tl.Trainer(dense(), loss="mse", metrics=[keras.metrics.F1Score()]).fit([(X, labels)], epochs=2).history
    assert [values.shape for values in history["f1_score"]] == [(3,), (3,)]
