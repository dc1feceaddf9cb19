"""A bad step changes nothing: skipping, raising, undoing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.inspect import everything, live_ops, own_variables
from tests.support.models import trainer_of
from tests.support.params import params
from tests.support.steps import InTurn

layers = keras.layers
HOW = [{}, {"microbatches": 2}, {"run_eagerly": True}]


def batches(count, bad=(), size=4):
    x, y = models.images(count * size)
    data = [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(count)]
    for number in bad:
        data[number] = (np.full_like(data[number][0], np.nan), data[number][1])
    return data


def made(make=models.functional, kind=tl.Trainer, **options):
    keras.utils.set_random_seed(0)
    options = {"metrics": ["accuracy"], "optimizer": keras.optimizers.AdamW(0.01), "ema": 0.9, **options}
    return kind(make(), loss=models.cross_entropy(), **options)


class Shrinking(layers.Layer):
    """Assigns to its own trained weight when it is called, and to another value each time."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, inputs):
        self.kernel.assign(0.5 * self.kernel)
        return inputs @ self.kernel


def shrinking():
    return keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), Shrinking(name="shrinking")])


def stateful():
    """A model with states that Keras does not track."""
    inputs = keras.Input((6, 6, 1), batch_size=4)
    x = layers.LSTM(4, stateful=True, name="lstm")(layers.Reshape((6, 6))(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


class Own(tl.Trainer):
    """Keeps a metric and a random state of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.metric = keras.metrics.Mean()
        self.random = tf.random.Generator.from_seed(1)

    def compute_loss(self, batch, training):
        loss = super().compute_loss(batch, training)
        self.metric.update_state(loss)
        return loss * self.random.uniform(())


CASES = {
    "many": (models.functional, tl.Trainer, 50, {}),
    "clipped": (models.functional, tl.Trainer, 50, {"clip_norm": 0.5}),
    "in pieces": (models.functional, tl.Trainer, 50, {"microbatches": 2}),
    "the first": (models.functional, tl.Trainer, 0, {}),
    "assigned in the forward pass": (shrinking, tl.Trainer, 2, {}),
    "untracked states": (stateful, tl.Trainer, 2, {}),
    "kept by a subclass": (models.functional, Own, 1, {}),
}
EAGERLY = [name for name in CASES if name not in ("clipped", "in pieces")]
KINDS = [*((name, False) for name in CASES), *((name, True) for name in EAGERLY)]


@pytest.mark.parametrize(("name", "eagerly"), params(KINDS, {("clipped", False), ("many", True), ("the first", True)}))
def test_a_skipped_batch_might_as_well_not_have_been_there(name, eagerly):
    make, kind, bad, options = CASES[name]
    bad = min(bad, 10) if eagerly else bad
    count = max(2 * bad, 3)
    trainer, other = (made(make, kind, nonfinite="skip", run_eagerly=eagerly, **options) for _ in range(2))
    history = trainer.fit(batches(count, [bad]), verbose=0).history
    without = other.fit([each for number, each in enumerate(batches(count)) if number != bad], verbose=0).history
    assert everything(trainer) == everything(other)
    assert [v.tolist() for v in own_variables(trainer)] == [v.tolist() for v in own_variables(other)]
    assert trainer.step == count - 1
    assert (history.pop("skipped_steps"), without.pop("skipped_steps")) == ([1.0], [0.0])
    assert history == without


@pytest.mark.parametrize("how", HOW, ids=str)
def test_raising_leaves_all_as_after_the_step_before(how):
    count = 10 if "run_eagerly" in how else 50
    data = batches(2 * count, bad=[count])
    trainer, other = made(optimizer="adam", **how), made(optimizer="adam", **how)
    with pytest.raises(tl.NonFiniteError, match=rf"At step {count}, epoch 0, .*not finite: .*`base/conv/kernel`") as e:
        trainer.fit(data, verbose=0)
    assert e.value.step == count
    assert "base/conv/kernel" in e.value.paths
    other.fit(data[:count], verbose=0)
    assert everything(trainer) == everything(other)
    for each in (trainer, other):  # it can go on
        each.fit(data[:2], verbose=0)
    assert everything(trainer) == everything(other)


def test_ignoring_looks_at_nothing_and_moves_everything():
    trainer, looking = made(nonfinite="ignore"), made()
    trainer.fit(batches(2, bad=[1]), verbose=0)
    assert np.isnan(trainer.model.get_layer("base").get_layer("conv").kernel.numpy()).all()
    assert trainer.step == 2
    looking.fit(batches(1), verbose=0)
    assert ["IsFinite" in live_ops(each, batches(1)[0]) for each in (trainer, looking)] == [False, True]


GOOD = np.ones((4, 3), "float32"), np.ones(4, "float32")
OVERFLOWS = GOOD[0], np.full(4, np.inf, "float32")


class Pair(InTurn):
    """Two networks, updated one after the other; the second loss is what the batch says."""

    def __init__(self, **options):
        keras.utils.set_random_seed(0)
        parts = lambda: (layers.Dense(4, name="dense"), layers.BatchNormalization(name="bn"))  # noqa: E731
        networks = {name: keras.Sequential([keras.Input((3,)), *parts()]) for name in self.order}
        policy = tl.Groups({name: name for name in self.order})
        super().__init__(networks, policy, optimizer="adam", **options)
        self.calls = tf.Variable(0, trainable=False)

    def train_step(self, batch):
        self.calls.assign_add(1, read_value=False)
        return super().train_step(batch)

    def loss_of(self, group, batch):
        loss = tf.reduce_mean(self.model[group](batch[0], training=True) ** 2)
        return loss * tf.reduce_mean(batch[1]) if group == "second" else loss


class Sometimes(Pair):
    """Updates the second network in a branch that the graph takes in every other step."""

    def train_step(self, batch):
        self.calls.assign_add(1)
        first = self.turn("first", batch)
        if self.calls % 2 == 0:
            self.turn("second", batch)
        return {"first": first}


@pytest.mark.parametrize("how", HOW, ids=str)
def test_an_update_that_came_before_the_bad_one_is_undone_with_it(how):
    trainer, other = Pair(nonfinite="skip", **how), Pair(nonfinite="skip", **how)
    history = trainer.fit([GOOD, OVERFLOWS, GOOD], verbose=0).history
    without = other.fit([GOOD, GOOD], verbose=0).history
    assert everything(trainer) == everything(other)
    assert history["first"] == without["first"]
    assert int(trainer.calls) == int(other.calls)
    with pytest.raises(tl.NonFiniteError, match=r"the loss is (inf|nan)") as error:
        Pair(**how).fit([OVERFLOWS], verbose=0)
    assert {path.split("/")[0] for path in error.value.paths} == {"second"}


def test_an_update_in_a_branch_is_guarded_like_any_other():
    trainer, other = Sometimes(nonfinite="skip"), Sometimes(nonfinite="skip")
    history = trainer.fit([GOOD, OVERFLOWS, GOOD, GOOD], verbose=0).history
    assert history["skipped_steps"] == [1.0]
    assert trainer.trace_count == 1
    assert trainer.step == 3
    other.fit([GOOD] * 3, verbose=0)
    assert everything(trainer) == everything(other)


def test_an_update_in_a_branch_cannot_wait_for_other_microbatches():
    with pytest.raises(RuntimeError, match=r"`update` in a branch or a loop .* `microbatches=1`, or move it out"):
        Sometimes(microbatches=2).fit([GOOD], verbose=0)


def test_an_epoch_of_which_nothing_counts_is_logged_as_that():
    trainer = trainer_of(nonfinite="skip", metrics=["accuracy"])
    history = trainer.fit(batches(2, bad=[0, 1]), verbose=0).history
    assert np.isnan(history["loss"] + history["accuracy"]).all()
    assert history["skipped_steps"] == [2.0]
    assert len(trainer.fit(batches(1), verbose=0).history["loss"]) == 1
