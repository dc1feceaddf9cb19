"""Where steps run on a GPU, a bad step is masked: all comes out as with branches, and the host decides nothing."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.inspect import everything, own_variables
from tests.support.masking import decided_by_devices, masked
from tests.support.params import params
from tests.support.steps import InTurn

layers = keras.layers
SIZE = 4


def data(*bad, batches=40):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SIZE * batches, 6)).astype("float32")
    y = generator.normal(size=(SIZE * batches, 2)).astype("float32")
    for number in bad:
        y[SIZE * number] = np.inf
    return x, y


def network(*more, dtype=None):
    keras.utils.set_random_seed(0)
    body = [
        layers.Dense(8, "relu", name="body", dtype=dtype),
        layers.BatchNormalization(name="bn"),
        layers.Dropout(0.2, seed=1, name="drop"),
    ]
    return keras.Sequential([keras.Input((6,)), *body, *more, layers.Dense(2, name="head", dtype="float32")])


class Own(tl.Trainer):
    """Keeps a counter, and moves a copy of the model towards it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = tf.Variable(0, trainable=False)

    def train_step(self, batch):
        self.seen.assign_add(1)
        return {**super().train_step(batch), "step": self.step}


class Pair(InTurn):
    """Two updates; the targets of a bad batch spoil the second alone."""

    order = ("body", "head")

    def loss_of(self, group, batch):
        predicted = self.model(batch[0], training=True)
        return tf.reduce_mean(predicted**2) + (tf.reduce_mean(batch[1]) if group == "head" else 0.0) * predicted[0, 0]


class Sometimes(Pair):
    """The second update stands in a branch of the user's own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.calls = tf.Variable(0, trainable=False)

    def train_step(self, batch):
        self.calls.assign_add(1)
        first = self.turn("body", batch)
        if self.calls % 2 == 0:
            self.turn("head", batch)
        return {"first": first}


def adam(**more):
    return {"optimizer": "adam", "ema": 0.9, **more}


GROUPS = tl.Groups({"head": "head", "body": "body"})
# Of each the kind of trainer and its options, made anew for each trainer.
CASES = {
    "plain": (tl.Trainer, lambda: {"optimizer": keras.optimizers.AdamW(0.01, weight_decay=0.1)}),
    "micro-batches": (tl.Trainer, lambda: adam(microbatches=2, log_updates=True)),
    "groups": (tl.Trainer, lambda: {"policy": GROUPS, "optimizer": {"head": "adam", "body": "rmsprop"}}),
    "spread": (tl.Trainer, lambda: adam(policy=tl.Cycle([tl.TrainAll(), GROUPS], every=7))),
    "own": (Own, adam),
    "two updates": (Pair, lambda: adam(policy=GROUPS)),
    "a branch": (Sometimes, lambda: adam(policy=GROUPS)),
}
BAD, SKIPPED = 23, (3, 24, 27)  # those in which `Sometimes` takes its branch


def both(name, nonfinite):
    """A trainer with a mask, and one with branches or an assertion."""
    kind, options = CASES[name]

    def made(make, *args):
        given = {"loss": "mse", "metrics": ["mae"], "nonfinite": nonfinite, "steps_per_call": 16, **options()}
        return make(*args, network(), **given)

    return made(masked, kind), made(kind)


def fit(trainer, given):
    return trainer.fit(given, batch_size=SIZE, shuffle=False, verbose=0).history


QUICK = {
    *(("plain", "raise"), ("own", "skip"), ("two updates", "raise"), ("a branch", "skip")),
}
EVERY = [(name, nonfinite) for name in CASES for nonfinite in ("raise", "skip")]


@pytest.mark.parametrize(("name", "nonfinite"), params(EVERY, set(EVERY) - QUICK))
def test_all_is_as_with_branches(name, nonfinite):
    trainers = both(name, nonfinite)
    if nonfinite == "raise":
        said = []
        for trainer in trainers:
            with pytest.raises(tl.NonFiniteError) as raised:
                fit(trainer, data(BAD))
            said.append((str(raised.value), raised.value.step, raised.value.paths))
        assert said[0] == said[1]
        assert said[0][1] == BAD
        histories = [fit(trainer, data(batches=9)) for trainer in trainers]
    else:
        histories = [fit(trainer, data(*SKIPPED)) for trainer in trainers]
        assert histories[0]["skipped_steps"] == [3.0]
    assert histories[0] == histories[1]
    assert everything(trainers[0]) == everything(trainers[1])
    assert [v.tolist() for v in own_variables(trainers[0])] == [v.tolist() for v in own_variables(trainers[1])]
    assert decided_by_devices(trainers[0]) == (["If"] if name == "a branch" else [])
    assert decided_by_devices(trainers[1])


def test_the_run_ends_where_as_many_as_may_be_were_skipped_in_a_row_though_the_call_goes_on():
    trainer = masked(tl.Trainer, network(), loss="mse", optimizer="adam", nonfinite="skip", max_skipped=2)
    other = tl.Trainer(network(), loss="mse", optimizer="adam")
    x, y = data(3, 5, 6, 7, 12)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(SIZE)
    with pytest.raises(tl.NonFiniteError, match=r"At step 4, .* 2 steps in a row were skipped before it"):
        trainer.fit(dataset, verbose=0)
    good = [number for number in range(5 * SIZE) if number // SIZE != 3]
    fit(other, (x[good], y[good]))
    assert everything(trainer) == everything(other)
    assert trainer.train_on_batch(x[:SIZE], y[:SIZE]) == other.train_on_batch(x[:SIZE], y[:SIZE])
    trainer.train_on_batch(x[3 * SIZE : 4 * SIZE], y[3 * SIZE : 4 * SIZE])
    assert everything(trainer) == everything(other)


def test_a_loss_that_is_scaled_too_far_is_no_bad_step():
    def made(make, *kind):
        model = network(layers.Rescaling(20.0, dtype="mixed_float16"), dtype="mixed_float16")
        return make(*kind, model, loss="mse", optimizer="adam", steps_per_call=8)

    trainers = made(masked, tl.Trainer), made(tl.Trainer)
    for trainer in trainers:
        fit(trainer, data(batches=16))
    assert 0 < trainers[0].step < 16
    assert trainers[0].loss_scale == trainers[1].loss_scale
    assert everything(trainers[0]) == everything(trainers[1])
    assert decided_by_devices(trainers[0]) == []


class Remembering(tl.Trainer):
    """Keeps what it has seen where no mask can put anything back."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, 0)

    def compute_loss(self, batch, training):
        self.table.insert(tf.constant(0, tf.int64), self.step)
        return super().compute_loss(batch, training)


class Shrinking(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.parametrize(
    ("kind", "optimizer", "reason"),
    [
        (Remembering, "sgd", "nobody can mask what the op `LookupTableInsertV2` leaves behind"),
        (tl.Trainer, Shrinking(0.01), "an optimizer that is not Keras' own may move more than variables"),
    ],
    ids=["table", "optimizer"],
)
def test_what_cannot_be_masked_is_branched_around_and_the_log_says_why(kind, optimizer, reason, caplog):
    caplog.set_level(logging.INFO, "tapeloop")
    trainer = masked(kind, network(), loss="mse", optimizer=optimizer)
    with pytest.raises(tl.NonFiniteError, match=f"At step {BAD}, epoch 0, the loss is inf"):
        fit(trainer, data(BAD))
    assert [record.message for record in caplog.records if "branched" in record.message] == [
        f"Steps that are not finite are branched around, for which the host waits in each step: {reason}."
    ]
    assert "While" in decided_by_devices(trainer)
    assert trainer.step == BAD
