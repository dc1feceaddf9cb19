import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.fitting import moved
from tests.support.models import trainer_of


def test_fit_returns_the_logs_of_each_epoch_and_counts_on():
    trainer = trainer_of(metrics=["accuracy"])
    history = trainer.fit(models.images(40), epochs=2, batch_size=16, validation_data=models.images(8), verbose=0)
    assert list(history.history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert all(len(values) == 2 for values in history.history.values())
    assert (trainer.step, trainer.epoch, history.epoch) == (6, 2, [1, 2])
    assert trainer.fit(models.images(40), batch_size=40, verbose=0).epoch == [3]
    assert (trainer.step, trainer.epoch) == (7, 3)


def test_one_trace_for_one_selection_and_signature_and_one_more_for_a_ragged_batch():
    trainer = trainer_of(metrics=["accuracy"])
    trainer.fit(models.images(32), batch_size=16, epochs=3, verbose=0)
    assert trainer.trace_count == 1
    trainer.fit(models.images(40), batch_size=16, epochs=3, verbose=0)
    assert trainer.trace_count == 2
    trainer.policy = tl.Freeze("base")
    trainer.fit(models.images(32), batch_size=16, verbose=0)
    assert trainer.trace_count == 3
    trainer.policy = tl.TrainOnly("head")  # the same selection
    trainer.fit(models.images(32), batch_size=16, verbose=0)
    trainer.policy = tl.TrainAll()
    trainer.fit(models.images(32), batch_size=16, verbose=0)
    assert trainer.trace_count == 3


@pytest.mark.parametrize(("verb", "steps", "traces"), [("fit", 2, 1), ("evaluate", 0, 0)])
def test_an_unbuilt_model_is_built_from_the_first_batch(verb, steps, traces):
    trainer = trainer_of(models.Subclassed(), metrics=["accuracy"])
    getattr(trainer, verb)(models.images(32), batch_size=16, verbose=0)
    assert (trainer.step, trainer.trace_count) == (steps, traces)
    assert "base/conv/kernel" in models.values(trainer.model)


def test_evaluation_and_prediction_move_nothing_and_drop_nothing():
    trainer = trainer_of(metrics=["accuracy"])
    before = models.values(trainer.model)
    pieces, whole = (trainer.evaluate(models.images(40), batch_size=size, verbose=0) for size in (32, 40))
    assert pieces == pytest.approx(whole, abs=1e-5)
    assert trainer.predict(models.images(40)[0]).shape == (40, 3)
    assert trainer.predict(models.images(40)).shape == (40, 3)
    assert models.values(trainer.model) == before


def test_an_overridden_loss_may_log_more():
    class Custom(tl.Trainer):
        def compute_loss(self, batch, training):
            x, y = batch
            error = tf.reduce_mean((self.forward(x, training)[:, 0] - tf.cast(y, tf.float32)) ** 2)
            return error, {"twice": 2 * error}

    trainer = Custom(models.functional())
    history = trainer.fit(models.images(8), verbose=0, validation_data=models.images(8)).history
    assert list(history) == ["loss", "twice", "val_loss", "val_twice"]
    np.testing.assert_allclose(history["twice"], 2 * np.array(history["loss"]), rtol=1e-6)


def test_two_trainers_share_submodels():
    base = keras.Sequential([keras.Input((6, 6, 1)), *models.base_layers()], name="base")
    inputs = keras.Input((6, 6, 1))
    one, two = (keras.Model(inputs, keras.layers.Dense(3, name="head")(base(inputs))) for _ in range(2))
    trainer_of(one, tl.Freeze("base")).fit(models.images(8), verbose=0)
    assert "base/conv/kernel" in moved(two, lambda: trainer_of(two).fit(models.images(8), verbose=0))


def test_a_flag_set_between_two_fits_takes_effect():
    model = models.functional()
    trainer = trainer_of(model)
    trainer.fit(models.images(8), verbose=0)
    model.get_layer("base").trainable = False
    assert moved(model, lambda: trainer.fit(models.images(8), verbose=0), "base") == set()
