"""Metrics start anew with each epoch, and are read at its end: Keras' own by their variables, others by what they
override."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.step.metrics import reset, result_of
from tapeloop.step.objective import Objective


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


class KeepsItsTotalElsewhere(keras.metrics.Mean):
    total = property(lambda self: tf.constant(6.0), lambda self, value: None)

    def update_state(self, values):
        self.count.assign_add(4.0)


def patched_mean():
    metric = keras.metrics.Mean()
    metric.result = lambda: tf.constant(7.0)
    return metric


class Squared(keras.metrics.Mean):
    def result(self):
        return super().result() ** 2


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(keras.metrics.Mean, dtype=kind) for kind in ("float32", "float64", "float16", "bfloat16")),
        *(KeepsItsTotalElsewhere, patched_mean, Squared, keras.metrics.Sum, keras.metrics.MeanIoU),
    ],
)
def test_a_metric_says_what_keras_has_it_say(make):
    metric = make(2) if make is keras.metrics.MeanIoU else make()
    arguments = ([1, 0, 1], [0, 0, 1]) if make is keras.metrics.MeanIoU else ([0.1, 0.7, 1e-3],)
    for _ in range(3):  # at first of nothing
        found, expected = result_of(metric), metric.result()
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
        metric.update_state(*arguments)


def test_compiled_metrics_are_logged_under_keras_names():
    two, metrics = SaysTwoThings(name="two"), ["mae", keras.metrics.MeanSquaredError("mae"), "mse"]
    objective = Objective(["mse", "mae"], None, [[*metrics, two], ["mae"]], [["mae"], ["mae", "mse"]], ["a", "b"])
    y, predicted = [tf.ones((4, 1)), tf.ones((4, 2))], [tf.fill((4, 1), 3.0), tf.fill((4, 2), 0.25)]
    for factor in (1.0, 2.0, 3.0):
        weights = [tf.range(4.0), tf.range(4.0) + 1.0]
        objective.loss(y, [factor * each for each in predicted], weights)
        objective.update(y, [factor * each for each in predicted], weights)
        expected = {}
        for metric in objective.metrics:
            result = metric.result()
            for name, value in (result if isinstance(result, dict) else {metric.name: result}).items():
                expected |= value if isinstance(value, dict) else {name: value}
        assert float(expected.pop("loss")) == 0.0  # the total, which is the step's: nobody updates it, or resets it
        found = objective.results()
        assert list(found) == list(expected)
        assert len(found) > 9
        assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in expected.items()}
        objective.reset()
        assert {float(value) for value in objective.results().values()} == {0.0}


class Shared(keras.layers.Layer):
    def __init__(self, metric):
        super().__init__()
        self.seen = metric

    def call(self, inputs):
        self.seen.update_state(inputs)
        return inputs


class Noting(tl.Trainer):
    """Keeps metrics among its attributes, and returns one."""

    def compute_loss(self, batch, training):
        loss = super().compute_loss(batch, training)
        for metric in self.kept:
            metric.update_state(loss)
        return loss, {"offset": loss + 1.0}

    def eval_step(self, batch):
        self.returned.update_state(batch[1])
        return {**super().eval_step(batch), "returned": self.returned}


def keras_reset(metric):
    metric.reset_state()


def keras_result(metric):
    return metric.result()


def logs_of_a_run(*, eagerly):
    keras.utils.set_random_seed(3)
    shared = Squared(name="shared")
    layers = [Shared(shared), keras.layers.Dense(2, name="body"), Shared(shared), keras.layers.Dense(1)]
    policy = tl.Phases({0: tl.TrainAll(), 2: tl.Freeze("body")}, unit="step")
    metrics = ["mae", keras.metrics.AUC(5, name="auc"), SaysTwoThings(name="two"), Counts(name="counts")]
    metrics[-1].update_state = lambda y, p, sample_weight=None: keras.metrics.Mean.update_state(metrics[-1], p)
    net = keras.Sequential([keras.Input((2,)), *layers])
    trainer = Noting(net, policy, loss="mse", metrics=metrics, weighted_metrics=["mae"], run_eagerly=eagerly)
    trainer.returned, trainer.kept = keras.metrics.Sum(), [keras.metrics.Mean("first"), Squared("own")]
    generator = np.random.default_rng(0)
    data = generator.uniform(size=(20, 2)), generator.integers(0, 2, (20, 1)).astype("float32")
    options = {"validation_data": data, "batch_size": 4, "verbose": 0}
    logs = [trainer.fit(data, epochs=3, **options).history]
    trainer.kept = [*trainer.kept, keras.metrics.Mean("later", dtype="float64")]
    logs += [trainer.evaluate(data, verbose=0), trainer.fit(data, epochs=2, **options).history]
    return [*logs, trainer.train_on_batch(*data)]


@pytest.mark.parametrize("eagerly", [False, True])
def test_what_is_logged_is_what_keras_own_code_makes_of_the_same_run(eagerly, monkeypatch):
    found = logs_of_a_run(eagerly=eagerly)
    for module in ("tapeloop.step.metrics", "tapeloop.step.objective"):
        monkeypatch.setattr(f"{module}.result_of", keras_result)
        monkeypatch.setattr(f"{module}.reset", keras_reset)
    monkeypatch.setattr("tapeloop.loop.step_cache.reset", keras_reset)
    assert found == logs_of_a_run(eagerly=eagerly)
    assert {"shared", "first", "own", "once", "twice", "counts", "mae", "auc", "weighted_mae"} <= set(found[0])
    assert "returned" in found[1]
