"""The loop in the graph: how many steps it runs, when it stops, what it counts."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.compare import assert_close
from tests.support.fitting import refused
from tests.support.inspect import calls_of_the_loop
from tests.support.models import trainer_of
from tests.support.params import params
from tests.support.policies import Asked
from tests.support.steps import Counting

X, Y = models.images(20)


def batches():
    return [(X[start : start + 4], Y[start : start + 4]) for start in range(0, 20, 4)]


def weighted(bad):
    """Batches some of which have weights that are not finite."""
    return [(x, y, np.full(4, np.nan if number in bad else 1.0)) for number, (x, y) in enumerate(batches())]


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return batches()[index]


class Endless(Pairs):
    num_batches = None


KINDS = {
    "arrays": lambda: (X, Y),
    "dataset": dataset,
    "dataset of unknown length": lambda: dataset().filter(lambda x, y: True),
    "list": batches,
    "generator": lambda: (batch for batch in batches()),
    "PyDataset": Pairs,
}


def counting(**options):
    keras.utils.set_random_seed(0)
    return Counting(models.functional(), tl.Freeze("base"), loss=models.cross_entropy(), optimizer="adam", **options)


@pytest.fixture(scope="module")
def expected():
    """The logs of an epoch in calls of one step."""
    trainer = counting(steps_per_call=1)
    return trainer.fit(batches(), batch_size=4, validation_data=(X, Y), verbose=0).history


def kinds_and_options():
    """Every kind of data in every way to run steps; quickly all in the ordinary way, and two in each."""
    for options in ({}, {"steps_per_call": 3}, {"run_eagerly": True}, {"microbatches": 2}):
        for kind in KINDS:
            slow = (options and kind not in ("arrays", "generator")) or ("microbatches" in options and kind != "arrays")
            yield pytest.param(kind, options, id=f"{kind}-{options}", marks=[pytest.mark.slow] * bool(slow))


@pytest.mark.parametrize(("kind", "options"), list(kinds_and_options()))
def test_every_batch_is_trained_on_once(kind, options, expected):
    trainer = counting(**options)
    history = trainer.fit(KINDS[kind](), batch_size=4, shuffle=False, validation_data=(X, Y), verbose=0).history
    pieces = options.get("microbatches", 1)
    assert (trainer.step, int(trainer.trained), int(trainer.evaluated)) == (5, 5 * pieces, 5)
    assert trainer.trace_count == (0 if "run_eagerly" in options else 1)
    assert_close(history, expected, rtol=1e-5)
    trainer.evaluate(KINDS[kind](), batch_size=4, verbose=0)
    assert int(trainer.evaluated) == 10
    assert trainer.predict(KINDS[kind](), batch_size=4).shape == (20, 3)


EPOCHS = [(1, 3), (3, 4), (5, 2), (7, 2)]  # of so many steps, so many epochs in each fit


@pytest.fixture(scope="module")
def weights_after_each_fit():
    trainer, given = counting(), batches()
    found = []
    for steps, epochs in EPOCHS:
        trainer.fit([given[number % 5] for number in range(steps * epochs)], verbose=0)
        found.append(models.values(trainer.model))
    return found


@pytest.mark.parametrize("kind", params(sorted(set(KINDS) - {"generator"}), ["dataset", "list"]))
def test_epochs_of_any_length_go_around_the_data(kind, weights_after_each_fit):
    trainer, done = counting(), 0
    for (steps, epochs), weights in zip(EPOCHS, weights_after_each_fit):
        trainer.fit(KINDS[kind](), batch_size=4, shuffle=False, steps_per_epoch=steps, epochs=epochs, verbose=0)
        done += steps * epochs
        assert trainer.step == int(trainer.trained) == done
        assert models.values(trainer.model) == weights


def test_how_many_steps_a_call_runs_changes_nothing():
    found = []
    for count in (7, 1, 2, 100, "auto"):
        keras.utils.set_random_seed(0)
        trainer = trainer_of(models.functional(), optimizer="adam", metrics=["accuracy"], steps_per_call=count)
        history = trainer.fit((X, Y), batch_size=3, epochs=3, shuffle=False, verbose=0).history
        found.append((models.values(trainer.model), history))
    assert found == found[:1] * 5


def calls_of(trainer, data, **options):
    return [batches for batches, _ in calls_of_the_loop(trainer, data, **options)]


def test_no_call_goes_past_the_end_of_an_epoch_or_a_change_of_policy():
    trainer = trainer_of(policy=tl.TrainAll(), steps_per_call=4)
    assert calls_of(trainer, (X, Y), batch_size=2, epochs=2) == [4, 4, 2, 4, 4, 2]
    trainer = trainer_of(policy=tl.Cycle([tl.Freeze("base"), tl.TrainAll()], every=3), steps_per_call=100)
    assert calls_of(trainer, (X, Y), batch_size=2, epochs=2) == [3, 3, 3, 1, 2, 3, 3, 2]


def test_bad_batches_count_as_no_step_where_a_policy_counts_them():
    policy = tl.Cycle([tl.Freeze("base"), tl.TrainAll()], every=2)
    trainer = trainer_of(policy=policy, nonfinite="skip", steps_per_call=100)
    assert calls_of(trainer, weighted([1, 2])) == [2, 1, 1, 1]
    assert trainer.step == 3


@pytest.mark.parametrize("steps_per_call", [1, 2, "auto"])
def test_so_many_bad_batches_in_a_row_are_counted_over_calls(steps_per_call):
    options = {"nonfinite": "skip", "max_skipped": 2, "steps_per_call": steps_per_call}
    trainer = trainer_of(**options)
    history = trainer.fit(weighted([0, 1, 3, 4]), verbose=0).history
    assert (trainer.step, history["skipped_steps"]) == (1, [4.0])
    with pytest.raises(tl.NonFiniteError, match="2 steps in a row were skipped before it, as many as may be"):
        trainer.fit(weighted([0, 1]), verbose=0)  # with the two before it
    assert trainer.step == 1


def test_all_data_that_is_skipped_or_ends_early_is_said():
    trainer = trainer_of()
    none_left = dataset().filter(lambda x, y: False)
    for empty in ([], iter([]), dataset().take(0), none_left):
        with refused(trainer, tl.DataError, "`x` is empty"):
            trainer.fit(empty, verbose=0)
        if empty is none_left:  # of which nobody can know without reading it
            continue
        with refused(trainer, tl.DataError, "`validation_data` is empty"):
            trainer.fit((X, Y), validation_data=empty, verbose=0)


@pytest.mark.parametrize("endless", [lambda: dataset().repeat(), Endless], ids=["dataset", "PyDataset"])
@pytest.mark.parametrize(("verb", "steps"), [("fit", "steps_per_epoch"), ("evaluate", "steps"), ("predict", "steps")])
def test_data_without_end_needs_a_number_of_steps(verb, steps, endless):
    run = functools.partial(getattr(trainer_of(), verb), endless())
    with pytest.raises(tl.DataError, match=rf"`x` never ends. Pass `{steps}`, or a dataset with an end"):
        run()
    run(**{steps: 2})
    with pytest.raises(ValueError, match=rf"`{steps}` must be a whole number, 1 or more. Received: 0"):
        run(**{steps: 0})


def test_validation_without_end_needs_a_number_of_steps():
    with pytest.raises(tl.DataError, match=r"`validation_data` never ends. Pass `validation_steps`"):
        trainer_of().fit((X, Y), validation_data=dataset().repeat(), verbose=0)


@pytest.mark.parametrize(
    ("weights", "data", "error", "text"),
    [
        (
            [1.0],
            (X, Y),
            TypeError,
            r"`class_weight` must be a mapping from classes, which are whole numbers, to weights. Received: \[1.0\]",
        ),
        ({"cat": 1.0}, (X, Y), TypeError, r"`class_weight` must be a mapping"),
        ({}, (X, Y), ValueError, r"`class_weight` is empty"),
        ({0: 2.0}, (X, Y, np.ones(20)), tl.DataError, "`class_weight` was given, and the data has sample weights"),
        ({0: 2.0}, X, tl.DataError, r"`class_weight` needs one target for each example.*The targets are missing"),
        ({0: 2.0}, (X, {"a": Y}), tl.DataError, r"`class_weight` needs one target for each example"),
        ({0: 2.0}, (X, np.zeros((20, 2, 2))), tl.DataError, r"`class_weight` needs one target .* \(20, 2, 2\) float32"),
    ],
)
def test_class_weights_that_are_none_or_do_not_fit_the_data(weights, data, error, text):
    with refused(trainer := trainer_of(), error, text):
        trainer.fit(data, class_weight=weights, verbose=0)


def test_a_step_that_fails_says_at_which_batch_and_counts_those_before():
    labels = Y.copy()
    labels[13] = 99

    class Asserting(tl.Trainer):
        def compute_loss(self, batch, training):
            with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(batch[1] < 3), ["no such label"])]):
                return super().compute_loss(batch, training)

    trainer = Asserting(models.functional(), loss=models.cross_entropy())
    with pytest.raises(tf.errors.InvalidArgumentError, match="no such label") as raised:
        trainer.fit((X, labels), batch_size=4, shuffle=False, verbose=0)
    assert any("batch 3 of `x` (the first is 0)" in note for note in raised.value.__notes__)
    assert trainer.step == 3


def test_an_evaluation_within_an_epoch_is_refused():
    def evaluating(progress):
        if progress.step:
            trainer.evaluate((X, Y), verbose=0)
        return tl.TrainAll()

    trainer = trainer_of(policy=Asked(evaluating, every=2))
    with pytest.raises(RuntimeError, match="`evaluate` was called within an epoch of the same trainer"):
        trainer.fit((X, Y), batch_size=4, verbose=0)
    trainer.policy = tl.TrainAll()
    trainer.evaluate((X, Y), verbose=0)


def test_counters_of_ones_own_are_no_strangers_in_an_evaluation():
    counting().evaluate((X, Y), verbose=0)  # a warning would be an error
