"""Averages of what trains: by hand, from when it joins, swapped in and out."""

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support import models
from tests.support.inspect import averages
from tests.support.models import trainer_of

HEAD, ALL = tl.Freeze("base"), tl.TrainAll()
DATA = models.images(8)


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"run_eagerly": True}], ids=str)
def test_the_average_is_that_of_the_formula(options):
    trainer = trainer_of(policy=HEAD, ema=0.75, optimizer=keras.optimizers.SGD(0.1), **options)
    kernel = trainer.model.get_layer("head").kernel
    expected = kernel.numpy().astype("float64")
    for _ in range(4):
        trainer.fit([DATA], verbose=0)
        expected = 0.75 * expected + 0.25 * kernel.numpy()
    np.testing.assert_allclose(averages(trainer)["head/kernel"], expected, atol=1e-6)


def test_evaluation_in_the_context_sees_the_averages_and_after_it_all_is_as_before():
    trainer = trainer_of(policy=HEAD, ema=0.5, optimizer=keras.optimizers.SGD(0.5))
    trainer.fit([DATA] * 3, verbose=0)
    before, expected = models.values(trainer.model), averages(trainer)
    live = trainer.evaluate(DATA, verbose=0)
    with trainer.ema_weights():
        assert trainer.evaluate(DATA, verbose=0) != live
        np.testing.assert_array_equal(trainer.model.get_layer("head").kernel, expected["head/kernel"])
        assert models.values(trainer.model, "base") == {p: v for p, v in before.items() if p.startswith("base/")}
    assert models.values(trainer.model) == before
    with pytest.raises(KeyError), trainer.ema_weights():
        raise KeyError
    assert models.values(trainer.model) == before
    assert trainer.evaluate(DATA, verbose=0) == live


def test_the_average_of_what_is_frozen_by_now_goes_on_towards_its_value():
    trainer = trainer_of(policy=tl.Phases({0: ALL, 1: HEAD}), ema=0.5)
    conv = trainer.model.get_layer("base").get_layer("conv").kernel
    first = conv.numpy()
    trainer.fit([DATA], epochs=3, verbose=0)
    frozen = conv.numpy()
    average = 0.5 * first + 0.5 * frozen  # after the one step in which it trained; two more would halve what is left
    with trainer.ema_weights():
        np.testing.assert_allclose(conv.numpy(), frozen + 0.25 * (average - frozen), atol=1e-6)
    np.testing.assert_array_equal(conv.numpy(), frozen)


def test_groups_that_train_in_turn_are_averaged_over_all_steps_from_when_they_join():
    turns = tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base/conv")], every=2)
    trainer = trainer_of(policy=turns, ema=0.75, optimizer=keras.optimizers.SGD(0.1))
    kernels = [trainer.model.get_layer("head").kernel, trainer.model.get_layer("base").get_layer("conv").kernel]
    expected = [kernel.numpy().astype("float64") for kernel in kernels]
    for step in range(8):
        trainer.fit([DATA], verbose=0)
        later = {"base/conv/kernel", "base/conv/bias"} if step >= 2 else set()
        assert set(averages(trainer)) == {"head/kernel", "head/bias"} | later
        for number, kernel in enumerate(kernels):
            if number == 0 or step >= 2:  # the second joins at step 2
                expected[number] = 0.75 * expected[number] + 0.25 * kernel.numpy()
    with trainer.ema_weights():
        for kernel, average in zip(kernels, expected):
            np.testing.assert_allclose(kernel.numpy(), average, atol=1e-6)


def test_contexts_nest_and_there_is_no_fit_in_them():
    trainer = trainer_of(policy=HEAD, ema=0.5)
    trainer.fit([DATA] * 2, verbose=0)
    before = models.values(trainer.model)
    with trainer.ema_weights():
        within = models.values(trainer.model)
        with trainer.ema_weights():
            assert models.values(trainer.model) == within
        assert models.values(trainer.model) == within
        with pytest.raises(RuntimeError, match=r"`fit` was called inside `ema_weights\(\)`, which would undo it"):
            trainer.fit([DATA], verbose=0)
    assert models.values(trainer.model) == before
    trainer.fit([DATA], verbose=0)


def test_a_trainer_without_averages_says_so():
    with pytest.raises(RuntimeError, match=r"no averages to evaluate with: the trainer was made without `ema`"):
        trainer_of().ema_weights().__enter__()
    with pytest.raises(RuntimeError, match=r"no averages to evaluate with: nothing was trained yet. Pass `ema=0.999`"):
        trainer_of(ema=0.9).ema_weights().__enter__()
