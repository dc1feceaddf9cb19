"""Metrics in steps: returned, held by the trainer or by layers, and those that the trainer was made with."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import refused
from tests.support.steps import OneUpdate

layers = keras.layers
X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.arange(12, dtype="float32").reshape(12, 1)
BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


def mlp(*more):
    return keras.Sequential([keras.Input((4,)), *more, layers.Dense(1, name="head")])


def fit(kind=tl.Trainer, model=None, epochs=2, data=BATCHES, validation=None, **options):
    """The logs of some epochs."""
    trainer = kind(model or mlp(), optimizer="sgd", **options)
    return trainer.fit(data, epochs=epochs, validation_data=validation, verbose=0).history


class Custom(OneUpdate):
    """A step of its own that takes the mean of the targets into a metric: 5.5 over an epoch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = keras.metrics.Mean(name="seen")

    def loss_of(self, batch):
        return tf.reduce_mean((self.model(batch[0], training=True) - batch[1]) ** 2)

    def train_step(self, batch):
        logs = super().train_step(batch)
        self.seen.update_state(batch[1])
        return {**logs, **self.more()}

    def more(self):
        return {}


class Holding(layers.Layer):
    """Holds a metric of a function of its inputs."""

    def __init__(self, function, name):
        super().__init__()
        self.function, self.held = function, keras.metrics.Mean(name=name)

    def call(self, x):
        self.held.update_state(self.function(x))
        return x


def one(x):
    return 1.0


by_how = pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}], ids=str)


@by_how
def test_a_metric_that_is_returned_logs_its_result_and_starts_anew_each_epoch(how):
    class Returns(Custom):
        def more(self):
            return {"targets": self.seen}

    trainer = Returns(mlp(), optimizer="sgd", **how)
    assert trainer.fit(BATCHES, epochs=2, verbose=0).history["targets"] == [5.5, 5.5]
    assert trainer.fit(BATCHES[:1], verbose=0).history["targets"] == [1.5]


@by_how
def test_a_metric_that_is_held_and_updated_is_logged_under_its_own_name(how):
    assert fit(Custom, **how)["seen"] == [5.5, 5.5]


def test_metrics_in_lists_and_mappings_are_held_too_and_those_not_updated_are_not_logged():
    class Several(Custom):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.several = [keras.metrics.Mean(name="listed")]
            self.named = {"of": [keras.metrics.Mean(name="idle")]}

        def more(self):
            self.several[0].update_state(7.0)
            return {}

    history = fit(Several)
    assert history["listed"] == [7.0, 7.0]
    assert "idle" not in history


@by_how
def test_a_metric_that_a_layer_holds_is_logged_and_reset(how):
    history = fit(model=mlp(Holding(tf.reduce_max, "largest")), loss="mse", validation=BATCHES[:1], **how)
    pieces = how.get("microbatches", 1)
    parts = [part for x, _ in BATCHES for part in np.split(x, pieces)]
    np.testing.assert_allclose(history["largest"], [np.mean([part.max() for part in parts])] * 2, rtol=1e-5)
    np.testing.assert_allclose(history["val_largest"], [X[:4].max()] * 2, rtol=1e-6)


@pytest.mark.parametrize(("computed", "eagerly"), [(False, False), (True, False), (False, True)])
def test_what_is_read_of_a_metric_is_refused(computed, eagerly):
    class Reads(Custom):
        def more(self):
            result = self.seen.result()
            return {"targets": result * 2.0 if computed else result}

    text = r"`train_step` returned for 'targets' what it read of a metric.*`\{\"targets\": metric\}`"
    with pytest.raises(TypeError, match=text):
        fit(Reads, run_eagerly=eagerly)


def test_metrics_of_the_trainer_are_logged_where_they_are_updated_alone():
    history = fit(Custom, loss="mse", metrics=["mae"], validation=BATCHES)
    assert "mae" not in history
    assert min(history["val_mae"]) > 0
    plain = fit(loss="mse", metrics=["mae"], validation=BATCHES)
    assert set(plain) == {"loss", "mae", "val_loss", "val_mae"}


def test_a_metric_that_builds_itself_on_its_first_batch_serves_too():
    class Scores(Custom):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.f1 = keras.metrics.F1Score(threshold=0.5)

        def more(self):
            self.f1.update_state(tf.ones((4, 1)), tf.ones((4, 1)))
            return {"f1": self.f1}

    assert [value.tolist() for value in fit(Scores)["f1"]] == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({"name": "abc"}, r"Received for 'name': 'abc'. Leave it out, or give its number"),
        ({"name": None}, r"Received for 'name': None. Leave it out"),
        ({"name": {"inner": 1.0}}, r"Received for 'name': \{'inner': 1.0\}. Flatten it"),
        ({"name": [1.0, 2.0]}, r"Received for 'name': \[1.0, 2.0\]. Flatten it"),
        ({"name": tf.ones(3)}, r"Received for 'name': .*Reduce it, such as by `tf.reduce_mean`"),
        ({3: 1.0}, r"names as strings. Received: 3"),
        (None, r'`train_step` must return a mapping `{"name": scalar}`. Received: None'),
    ],
)
def test_what_a_step_may_not_return(returned, text):
    class Returns(Custom):
        def train_step(self, batch):
            super().train_step(batch)
            return returned

    model = mlp()
    with refused(model, TypeError, text):
        fit(Returns, model)


def test_metrics_of_one_name_are_all_logged():
    model = mlp(Holding(one, "act"), Holding(lambda x: 3.0, "act"), Holding(lambda x: 5.0, "loss"))
    trainer = tl.Trainer(model, loss="mse", metrics=["mae"], optimizer="sgd")
    trainer.mae = keras.metrics.Mean(name="mae")
    history = trainer.fit(BATCHES, verbose=0).history
    assert set(history) == {"loss", "mae", "act", "act_1", "loss_1"}
    assert (history["act"], history["act_1"], history["loss_1"]) == ([1.0], [3.0], [5.0])
    assert history["loss"] != [5.0]


def test_what_is_returned_has_its_name_before_the_metrics_of_the_trainer():
    class Returns(tl.Trainer):
        def train_step(self, batch):
            return {**super().train_step(batch), "mae": tf.constant(50.0)}

    history = fit(Returns, loss="mse", metrics=["mae"], epochs=1)
    assert history["mae"] == [50.0]
    assert 0 < history["mae_1"][0] < 50


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_bad_step_leaves_no_mark_on_any_metric(eagerly):
    class Returns(Custom):
        def more(self):
            elsewhere.update_state(self.model(BATCHES[0][0]) * self.scale)
            return {"elsewhere": elsewhere}

    elsewhere = keras.metrics.Mean()
    trainer = Returns(mlp(Holding(one, "act")), optimizer="sgd", nonfinite="skip", run_eagerly=eagerly)
    trainer.scale = 1.0
    bad = (np.full((4, 4), np.nan, "float32"), np.full((4, 1), np.nan, "float32"))
    history = trainer.fit([BATCHES[0], bad, BATCHES[1]], verbose=0).history
    assert history["skipped_steps"] == [1.0]
    assert np.isfinite([history[name][0] for name in ("loss", "seen", "act", "elsewhere")]).all()
    assert history["seen"] == [3.5]
