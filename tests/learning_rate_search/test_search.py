"""The search for a learning rate: what it finds, by hand, and that it leaves everything as it was."""

import signal
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.loop.compiled_step import CompiledStep
from tests.support import models, runs
from tests.support.fitting import refused
from tests.support.params import params
from tests.support.policies import Asked
from tests.support.snapshot import snapshot
from tests.support.steps import OneUpdate

Adam, SGD = keras.optimizers.Adam, keras.optimizers.SGD
ONES = np.ones((200, 1), "float32")  # gathered in the graph: a list of one batch would begin anew for each step


# What is found


class Weight(tf.Module):
    def __init__(self, value):
        self.w = tf.Variable(value)

    def __call__(self, inputs):
        return inputs * self.w


class Squares(OneUpdate):
    """The loss is the sum of the squares of two weights."""

    def loss_of(self, batch):
        return self.model["a"].w ** 2 + self.model["b"].w ** 2


def squares(policy=None, optimizer=None, **options):
    weights = {"a": Weight(2.0), "b": Weight(1.0)}
    return Squares(weights, policy, optimizer=optimizer or SGD(0.1), **options)


def by_hand(rates_a, rates_b):
    """The losses at each step, before its update."""
    a, b, losses = np.float64(2), np.float64(1), []
    for rate_a, rate_b in zip(rates_a, rates_b):
        losses.append(a**2 + b**2)
        a, b = a * (1 - 2 * rate_a), b * (1 - 2 * rate_b)
    return losses


RATES = np.geomspace(1e-4, 0.9, 40)
GROUPS = tl.Groups({"a": "a", "b": "b"}, multipliers={"b": 0.01})


@pytest.mark.parametrize(
    ("policy", "group", "expected"),
    [
        (tl.TrainAll(), None, (RATES, RATES)),
        (GROUPS, None, (RATES, 0.01 * RATES)),  # by a common factor
        (GROUPS, "a", (RATES, np.full(40, 0.001))),  # while the other keeps its own
        (GROUPS, "b", (np.full(40, 0.1), RATES)),
    ],
)
def test_the_losses_are_those_of_steps_at_these_rates(policy, group, expected):
    search = tl.find_learning_rate(squares(policy), ONES, group=group, lowest=1e-4, highest=0.9, steps=40)
    np.testing.assert_allclose(search.rates, RATES)
    np.testing.assert_allclose(search.losses, by_hand(*expected), rtol=1e-4)
    # The formula of a mean with a corrected start, written out.
    weights = [[0.1 * 0.9 ** (n - k) / (1 - 0.9 ** (n + 1)) for k in range(n + 1)] for n in range(40)]
    smoothed = [np.dot(weight, search.losses[: len(weight)]) for weight in weights]
    np.testing.assert_allclose(search.smoothed, smoothed, rtol=1e-6)
    falls = np.diff(search.smoothed[4:39])
    assert abs(int(np.argmin(np.abs(RATES - search.suggestion))) - (4 + int(falls.argmin()))) <= 1
    assert (search.group, search.reason) == (group, "")


def test_it_ends_where_the_loss_diverges():
    search = tl.find_learning_rate(squares(), ONES, lowest=1e-2, highest=1e4, steps=60)
    rates = np.geomspace(1e-2, 1e4, 60)
    assert len(search.rates) < 60
    losses = by_hand(rates, rates)
    np.testing.assert_allclose(search.losses, losses[: len(search.rates)], rtol=1e-3)
    assert search.smoothed[-1] > 4 * search.smoothed.min()
    assert all(search.smoothed[:-1] <= 4 * np.minimum.accumulate(search.smoothed[:-1]))
    assert search.rates[-1] > 1 > search.suggestion  # above 1 each step makes the weights larger


class Shifted(Squares):
    shift = -10.0

    def loss_of(self, batch):
        return super().loss_of(batch) + self.shift


def test_a_loss_below_zero_ends_it_by_how_far_it_rises():
    shifted = Shifted({"a": Weight(2.0), "b": Weight(1.0)}, optimizer=SGD(0.1))
    search = tl.find_learning_rate(shifted, ONES, lowest=1e-3, highest=0.9, steps=30)
    assert len(search.rates) == 30
    assert search.suggestion is not None
    shifted = Shifted({"a": Weight(2.0), "b": Weight(1.0)}, optimizer=SGD(0.1))
    search = tl.find_learning_rate(shifted, ONES, lowest=1e-3, highest=1e4, steps=60)
    assert len(search.rates) < 60


BAD = [(np.full((2, 1), np.nan, "float32"),)]


class Scaled(Squares):
    """Its loss is the batch's mean times that of the weights."""

    def loss_of(self, batch):
        return tf.reduce_mean(batch[0]) * super().loss_of(batch)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("good", params([0, 5, 25], [25]))
def test_it_ends_at_a_step_that_is_not_finite(nonfinite, good):
    trainer = Scaled({"a": Weight(2.0), "b": Weight(1.0)}, optimizer=Adam(0.1), nonfinite=nonfinite)
    before = runs.digest(trainer)
    search = tl.find_learning_rate(trainer, [(ONES,)] * good + BAD, lowest=1e-4, highest=0.1, steps=30)
    assert runs.digest(trainer) == before
    assert len(search.rates) == len(search.losses) == good
    if good == 25:
        assert search.suggestion is not None
    else:
        assert search.suggestion is None
        assert search.reason == (
            f"the loss was not finite at a rate of {np.geomspace(1e-4, 0.1, 30)[good]:.2e}, after {good} steps: "
            + ("begin at a lower rate" if good else "no rate is to blame, look at the data and the weights")
        )


class Rising(Squares):
    def loss_of(self, batch):
        return tf.cast(self.step, tf.float32) + 0.0 * super().loss_of(batch) + 10.0


def test_where_nothing_falls_nothing_is_suggested():
    trainer = Rising({"a": Weight(2.0), "b": Weight(1.0)}, optimizer=SGD(0.1))
    search = tl.find_learning_rate(trainer, ONES, steps=20)
    np.testing.assert_allclose(search.losses, 10 + np.arange(20))  # the step counts on while it searches
    assert (search.suggestion, search.reason) == (None, "the loss falls at none of the rates")
    assert repr(search) == "<LearningRateSearch: no suggestion, the loss falls at none of the rates; 20 rates>"
    assert trainer.step == 0


# Everything is put back


def trainer_of(kind):
    if kind == "two groups":
        policy = lambda: tl.Groups({"body": ["base", "norm"], "head": "head"}, multipliers={"body": 0.1})  # noqa: E731
        return runs.made(policy, optimizer=lambda: Adam(0.01), metrics=["mae"], ema=0.9)()
    if kind == "asked often":
        return runs.made(lambda: Asked(lambda p: tl.TrainOnly("head", ["base", "norm"][p.step % 2]), every=1))()
    if kind == "eager":
        return runs.made(run_eagerly=True, metrics=["mae"])()
    return runs.RUNS[kind].trainer()


# Each is searched before its first fit or between two.
KINDS = [
    *(("two groups", 0), ("drawn", 0), ("float16", 0), ("eager", 0)),
    *(("plain", 1), ("asked often", 1), ("counting", 1), ("microbatches", 1)),
]
SLOW = {("counting", 1), ("drawn", 0), ("float16", 0), ("eager", 0), ("asked often", 1), ("microbatches", 1)}


def search(trainer, data=(runs.X, runs.Y), **options):
    return tl.find_learning_rate(trainer, data, **{"batch_size": runs.BATCH, "steps": 12, "highest": 0.1, **options})


@pytest.mark.parametrize(("kind", "at"), params(KINDS, SLOW))
def test_a_run_goes_on_as_if_there_had_been_no_search(kind, at):
    searched, other = trainer_of(kind), trainer_of(kind)
    for epoch in range(2):
        if epoch == at:
            before, random = runs.digest(searched), np.random.get_state()[1].tobytes()
            assert len(search(searched).rates) == 12
            assert runs.digest(searched) == before
            assert np.random.get_state()[1].tobytes() == random
        for trainer in (searched, other):
            trainer.fit((runs.X, runs.Y), batch_size=runs.BATCH, verbose=0)
    assert runs.digest(searched) == runs.digest(other)
    assert searched.trace_count == other.trace_count
    if kind == "asked often":
        assert searched.policy.seen == other.policy.seen


def test_nothing_of_the_trainer_has_changed():
    trainer = trainer_of("two groups")
    # One cohort is spread over two groups, which then have rates and counts of their own.
    split = tl.Groups({"base": "base", "norm": "norm", "head": "head"}, multipliers={"base": 0.5, "head": 0.3})
    for policy in (trainer.policy, split):
        trainer.policy = policy
        trainer.fit((runs.X, runs.Y), batch_size=runs.BATCH, validation_data=(runs.X, runs.Y), verbose=0)
    renamed = tl.Groups({"b": "base", "n": "norm", "h": "head"})
    for policy in (split, renamed, tl.TrainAll()):  # the others have not trained yet
        trainer.policy = policy
        rates = dict(trainer.learning_rates)
        before = snapshot(trainer)
        search(trainer)
        assert snapshot(trainer) == before
        assert dict(trainer.learning_rates) == rates


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_what_a_layer_keeps_in_a_closure_is_put_back_too(run_eagerly):
    model = keras.Sequential([keras.Input((4,)), models.Seen(), keras.layers.Dense(3)])
    trainer = tl.Trainer(model, loss="mse", run_eagerly=run_eagerly)
    assert len(search(trainer).rates) == 12
    assert int(model.layers[0].count()) == 0


def test_the_optimizer_that_was_passed_is_the_one_that_trains():
    adam = Adam(0.01)
    trainer = runs.made(optimizer=lambda: adam)()
    search(trainer)
    assert not adam.built
    trainer.fit((runs.X, runs.Y), batch_size=runs.BATCH, verbose=0)
    assert int(adam.iterations) == 5


def failing(at, error):
    def batches():
        for number in range(20):
            if number == at:
                raise error
            yield runs.X[:4], runs.Y[:4]

    return batches()


class Unhappy(Exception):
    pass


def test_an_error_of_the_data_puts_everything_back():
    trainer = trainer_of("two groups")
    before = runs.digest(trainer)
    with pytest.raises(Unhappy):
        search(trainer, failing(7, Unhappy()))
    assert runs.digest(trainer) == before
    assert not trainer.state.optimizers.cohorts
    trainer.evaluate((runs.X, runs.Y), verbose=0)  # no epoch is under way


@pytest.mark.parametrize("at", [1, 6])
def test_ctrl_c_lets_the_step_end_and_puts_everything_back(at, monkeypatch):
    trainer, ran, run = trainer_of("plain"), [], CompiledStep.run_on_batch
    before = runs.digest(trainer)

    def interrupted(*args):
        ran.append(run(*args))
        if len(ran) == at:
            signal.raise_signal(signal.SIGINT)
        return ran[-1]

    monkeypatch.setattr(CompiledStep, "run_on_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(trainer)
    assert len(ran) == at
    assert runs.digest(trainer) == before


# Schedules and errors


def test_a_rate_that_follows_a_schedule_cannot_be_searched_but_others_can():
    trainer = trainer_of("groups")  # the base follows a schedule, the head has a number
    for group in (None, "base"):
        with refused(trainer, TypeError, r"The learning rate of the group 'base' follows a schedule"):
            search(trainer, group=group)
    before = runs.digest(trainer)
    assert len(search(trainer, group="head").rates) == 12
    assert runs.digest(trainer) == before


class Unlisted(SGD):
    def __init__(self, boost, **options):
        super().__init__(**options)
        self.boost = boost


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group": "head"}, tl.PolicyError, r"There is no group 'head': the groups are \['default'\]"),
        ({"lowest": 0}, ValueError, "`lowest` must be a learning rate above 0. Received: 0"),
        ({"highest": float("inf")}, ValueError, "`highest` must be a learning rate above 0. Received: inf"),
        ({"highest": 1e-9}, ValueError, "`highest` must be above `lowest`. Received: 1e-09, and `lowest` is 1e-07"),
        ({"steps": 9}, ValueError, "`steps` must be a whole number, 10 or more. Received: 9"),
        ({"data": []}, tl.DataError, "`x` is empty"),
        ({"data": iter([ONES] * 5)}, tl.DataError, "`x` ended after 5 batches, and more were asked for"),
        ({"data": [(runs.X[:, :3], runs.Y)], "kind": "plain"}, tl.DataError, "The inputs do not fit the model"),
        ({"kind": "adversarial"}, ValueError, r"logs \['judge', 'maker'\], and a search looks at 'loss'"),
    ],
)
def test_what_cannot_be_searched(options, error, text):
    kind = options.pop("kind", None)
    trainer = squares() if kind is None else trainer_of(kind)
    data = options.pop("data", ONES if kind is None else (runs.X, runs.Y))
    with refused(trainer, error, text):
        tl.find_learning_rate(trainer, data, **{"steps": 12, **options})


def test_it_takes_a_trainer():
    with pytest.raises(TypeError, match=r"`trainer` must be a `tl.Trainer`. Received: <Sequential"):
        tl.find_learning_rate(keras.Sequential([keras.Input((1,))]), ONES)


def test_rates_of_zero_have_no_ratio():
    trainer = squares(tl.Groups({"a": "a", "b": "b"}, multipliers={"a": 0, "b": 0}))
    with refused(trainer, ValueError, r"All learning rates are 0, and have no ratio: \{'a': 0.0, 'b': 0.0\}"):
        tl.find_learning_rate(trainer, ONES)


def test_an_optimizer_that_cannot_be_copied_is_searched_once_it_has_trained():
    trainer = squares(optimizer=Unlisted(3))
    with refused(trainer, tl.PolicyError, r"A second Unlisted is needed, to try learning rates on it, .*train a step"):
        tl.find_learning_rate(trainer, ONES, steps=12)
    trainer.train_on_batch(ONES)
    assert len(tl.find_learning_rate(trainer, ONES, steps=12).rates) == 12


def test_it_is_refused_inside_an_epoch_and_inside_ema_weights():
    trainer = squares(ema=0.9)
    trainer.train_on_batch(ONES)
    with trainer.ema_weights(), pytest.raises(RuntimeError, match=r"`find_learning_rate` was called inside `ema_wei"):
        tl.find_learning_rate(trainer, ONES)

    def batches():
        yield ONES
        tl.find_learning_rate(trainer, ONES)

    with pytest.raises(RuntimeError, match="within an epoch of the same trainer"):
        trainer.fit(batches(), verbose=0)


# The picture


def test_a_search_is_drawn_in_the_colours_of_matplotlib_itself(tmp_path):
    search = tl.find_learning_rate(squares(), ONES, lowest=1e-3, highest=1.0, steps=20)
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.color": "#123456"}):
        figure = search.plot(tmp_path / "search.png")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "learning rate", "loss")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["loss", "smoothed", f"suggestion: {search.suggestion:.2e}"]
    assert matplotlib.colors.to_hex(axes.lines[-1].get_color()) == "#123456"
    np.testing.assert_allclose(axes.lines[1].get_ydata(), search.smoothed)
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    search = tl.LearningRateSearch(np.ones(1), np.ones(1), np.ones(1), None, "", "head")
    with pytest.raises(ImportError, match=r"`search.plot` draws with matplotlib, .*pip install matplotlib"):
        search.plot()
