"""Training on one batch at a time."""

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support.compare import assert_close, assert_same
from tests.support.fitting import BAD, X, Y, mlp, moved
from tests.support.policies import Asked


def trainer_of(policy=None, kind=tl.Trainer, **options):
    return kind(mlp("base", "head"), policy, loss="mse", **options)


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}], ids=str)
def test_it_trains_as_a_fit_of_one_batch_does(how):
    by_fit, by_batch = (trainer_of(tl.Freeze("base"), metrics=["mae"], optimizer="adam", **how) for _ in range(2))
    weights = np.ones(8, "float32")
    for number in range(3):
        history = by_fit.fit([(X, Y, weights)], verbose=0).history
        logs = by_batch.train_on_batch(X, Y, weights)
        assert logs == pytest.approx({name: values[0] for name, values in history.items()}, rel=1e-5)
        assert by_batch.step == number + 1
    assert by_batch.epoch == 0
    assert_close(by_batch, by_fit, rtol=1e-6, atol=1e-7)


def test_batches_of_any_size_and_an_unbuilt_model():
    trainer = tl.Trainer(keras.Sequential([keras.layers.Dense(3)]), loss="mse")
    for size in (8, 5, 1, 7, 3):
        assert np.isfinite(trainer.train_on_batch(X[:size], Y[:size])["loss"])
    assert trainer.trace_count == 1


def test_the_whole_batch_goes_to_a_step_of_its_own():
    class Sums(tl.Trainer):
        def compute_loss(self, batch, training):
            return sum(keras.ops.mean(part**2) for part in (self.model(batch["one"]), batch["other"]))

    assert trainer_of(kind=Sums).train_on_batch({"one": X, "other": Y})["loss"] > 0


def test_the_policy_is_asked_at_the_first_batch_and_every_so_many_steps():
    policy = Asked(lambda progress: tl.TrainOnly("head") if progress.step < 6 else tl.TrainAll(), every=3)
    trainer = trainer_of(policy)
    for _ in range(8):
        trainer.train_on_batch(X, Y)
    assert policy.steps == [0, 3, 6]
    assert [len(phase.selection.trained) for phase in trainer.history.phases] == [2, 4]
    assert trainer.trace_count == 2
    trainer.policy = tl.Freeze("head")
    trainer.train_on_batch(X, Y)
    assert [v.path for v in trainer.history.phases[-1].selection.trained] == ["base/kernel", "base/bias"]


def test_it_goes_with_fit():
    trainer = trainer_of(tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainAll()}))
    trainer.train_on_batch(X, Y)
    trainer.fit([(X, Y)], verbose=0)
    assert "base/kernel" in moved(trainer.model, lambda: trainer.train_on_batch(X, Y))
    assert (trainer.step, trainer.epoch) == (3, 1)


def test_a_bad_batch_changes_nothing():
    trainer = trainer_of(metrics=["mae"])
    trainer.train_on_batch(X, Y)
    before = trainer.model.get_weights()
    with pytest.raises(tl.NonFiniteError, match="At step 1"):
        trainer.train_on_batch(BAD, Y)
    with pytest.raises(tl.DataError, match="do not fit"):
        trainer.train_on_batch(X[:, :2], Y)
    assert_same(trainer, before)
    trainer.train_on_batch(X, Y)
    assert trainer.step == 2


def test_too_many_bad_batches_in_a_row_raise():
    trainer = trainer_of(nonfinite="skip", max_skipped=2)
    for _ in range(2):
        trainer.train_on_batch(BAD, Y)
    with pytest.raises(tl.NonFiniteError, match="2 steps in a row"):
        trainer.train_on_batch(BAD, Y)


def test_too_few_examples_for_micro_batches():
    with pytest.raises(tl.DataError, match="micro-batches"):
        trainer_of(microbatches=4).train_on_batch(X[:3], Y[:3])


def test_batches_that_differ_in_the_kind_of_a_tensor_are_traced_apart():
    class Weighted(tl.Trainer):
        def compute_loss(self, batch, training):
            x, weight = batch
            return keras.ops.mean(self.model(x) ** 2) * keras.ops.mean(weight)

    trainer = trainer_of(kind=Weighted)
    losses = [trainer.train_on_batch(X, weight)["loss"] for weight in (np.float32(2.0), np.full(8, 2.0, "float32"))]
    assert trainer.trace_count == 2
    assert 0 < losses[1] < losses[0]


def test_a_batch_of_other_lengths_or_of_none_is_refused_before_anything_moves():
    trainer = trainer_of()
    with pytest.raises(tl.DataError, match=r"The arrays of the batch must have the same number of examples.*\(5, "):
        trainer.train_on_batch(X, Y[:5])
    with pytest.raises(tl.DataError, match="The arrays of the batch must"):
        trainer.train_on_batch(X, Y, np.ones(5, "float32"))
    with pytest.raises(tl.DataError, match="The batch is empty: its arrays have no examples"):
        trainer.train_on_batch(X[:0], Y[:0])
    assert trainer.step == 0
