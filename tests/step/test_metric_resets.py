"""Metrics start anew with each epoch: Keras' own by their variables, others by what they override."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.step.metrics import reset


class Counts(keras.metrics.Mean):
    resets = 0

    def reset_state(self):
        type(self).resets += 1
        super().reset_state()


@pytest.mark.parametrize(
    "metric",
    [keras.metrics.Mean(), keras.metrics.AUC(num_thresholds=5), keras.metrics.MeanIoU(2), keras.metrics.F1Score()],
)
def test_a_metric_is_reset_to_what_keras_resets_it_to(metric):
    arguments = ([[0.0, 1.0]], [[0.2, 0.9]])[: 1 if isinstance(metric, keras.metrics.Mean) else 2]
    metric.update_state(*arguments)
    metric.reset_state()
    start = [np.array(variable) for variable in metric.variables]
    for _ in range(3):
        metric.update_state(*arguments)
        reset(metric)
        for variable, value in zip(metric.variables, start):
            np.testing.assert_array_equal(variable, value)


def model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


DATA = np.ones((4, 2)), np.ones((4, 1))


def test_what_a_metric_or_the_user_overrides_is_called_in_each_epoch():
    patched, calls = keras.metrics.Mean(name="patched"), []
    patched.reset_state = lambda: calls.append(1)
    trainer = tl.Trainer(model(), loss="mse")
    trainer.counts, trainer.patched = Counts(), patched
    before = Counts.resets
    trainer.fit(DATA, epochs=3, verbose=0)
    assert (Counts.resets - before, len(calls)) == (3, 3)


def test_a_metric_of_the_users_among_keras_own_is_reset_by_its_own_code():
    metric = Counts(name="counts")
    metric.update_state = lambda y, p, sample_weight=None: keras.metrics.Mean.update_state(metric, tf.ones(()))
    trainer = tl.Trainer(model(), loss="mse", metrics=[metric, "mae"])
    before = Counts.resets
    trainer.fit(DATA, epochs=3, verbose=0)
    assert Counts.resets - before >= 3


class SaysTwoThings(keras.metrics.Mean):
    def result(self):
        return {"once": super().result(), "twice": 2 * super().result()}

    def update_state(self, y, y_pred, sample_weight=None):
        super().update_state(y_pred)


def test_a_metric_of_the_users_may_say_several_things():
    trainer = tl.Trainer(model(), loss="mse", metrics=[SaysTwoThings(name="two")])
    logs = trainer.fit(DATA, verbose=0).history
    assert logs["twice"][0] == pytest.approx(2 * logs["once"][0])
