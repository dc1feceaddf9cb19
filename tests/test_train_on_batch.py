"""Training on one batch at a time."""

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support import models

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")


def mlp():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="base"), layers.Dense(3, name="head")])


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}], ids=str)
def test_it_trains_as_a_fit_of_one_batch_does(how):
    one, other = mlp(), mlp()
    by_fit = tl.Trainer(one, tl.Freeze("base"), loss="mse", metrics=["mae"], optimizer="adam", **how)
    by_batch = tl.Trainer(other, tl.Freeze("base"), loss="mse", metrics=["mae"], optimizer="adam", **how)
    weights = np.ones(8, "float32")
    for number in range(3):
        history = by_fit.fit([(X, Y, weights)], progress="none").history
        logs = by_batch.train_on_batch(X, Y, weights)
        assert logs == pytest.approx({name: values[0] for name, values in history.items()}, rel=1e-5)
        assert by_batch.step == number + 1
    assert by_batch.epoch == 0
    for mine, theirs in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_batches_of_any_size_and_an_unbuilt_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Dense(3)])
    trainer = tl.Trainer(model, loss="mse")
    for size in (8, 5, 1, 7, 3):
        assert np.isfinite(trainer.train_on_batch(X[:size], Y[:size])["loss"])
    assert trainer.trace_count == 1


def test_the_whole_batch_goes_to_a_step_of_its_own():
    class Sums(tl.Trainer):
        def compute_loss(self, batch, training):
            return sum(keras.ops.mean(part**2) for part in (self.model(batch["one"]), batch["other"]))

    logs = Sums(mlp()).train_on_batch({"one": X, "other": Y})
    assert logs["loss"] > 0


def test_the_policy_is_asked_at_the_first_batch_and_every_so_many_steps():
    asked = []

    class Asked(tl.VariablePolicy):
        every = 3

        def at(self, progress):
            asked.append(progress.step)
            return tl.TrainOnly("head") if progress.step < 6 else tl.TrainAll()

    trainer = tl.Trainer(mlp(), Asked(), loss="mse")
    for _ in range(8):
        trainer.train_on_batch(X, Y)
    assert asked == [0, 3, 6]
    assert [len(phase.selection.trained) for phase in trainer.history.phases] == [2, 4]
    assert trainer.trace_count == 2
    trainer.policy = tl.Freeze("head")
    trainer.train_on_batch(X, Y)
    assert [v.path for v in trainer.history.phases[-1].selection.trained] == ["base/kernel", "base/bias"]


def test_it_goes_with_fit():
    trainer = tl.Trainer(mlp(), tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainAll()}), loss="mse")
    trainer.train_on_batch(X, Y)
    trainer.fit([(X, Y)], progress="none")
    before = trainer.model.get_layer("base").kernel.numpy()
    trainer.train_on_batch(X, Y)
    assert (trainer.model.get_layer("base").kernel.numpy() != before).any()
    assert (trainer.step, trainer.epoch) == (3, 1)


def test_a_bad_batch_changes_nothing():
    model = mlp()
    trainer = tl.Trainer(model, loss="mse", metrics=["mae"])
    trainer.train_on_batch(X, Y)
    before = models.values(model)
    with pytest.raises(tl.NonFiniteError, match="At step 1"):
        trainer.train_on_batch(np.full_like(X, np.nan), Y)
    assert models.values(model) == before
    with pytest.raises(tl.DataError, match="do not fit"):
        trainer.train_on_batch(X[:, :2], Y)
    assert models.values(model) == before
    trainer.train_on_batch(X, Y)
    assert trainer.step == 2
    skipping = tl.Trainer(model, loss="mse", nonfinite="skip", max_skipped=2)
    for _ in range(2):
        skipping.train_on_batch(np.full_like(X, np.nan), Y)
    with pytest.raises(tl.NonFiniteError, match="2 steps in a row"):
        skipping.train_on_batch(np.full_like(X, np.nan), Y)


def test_too_few_examples_for_micro_batches():
    with pytest.raises(tl.DataError, match="micro-batches"):
        tl.Trainer(mlp(), loss="mse", microbatches=4).train_on_batch(X[:3], Y[:3])
