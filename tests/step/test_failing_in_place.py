"""A step of which nothing but its update would have to be undone fails at an Inf or NaN, and that is cheaper."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop._backend.assertions import can_stop
from tests.support.inspect import everything, ops_of_the_loop, own_variables
from tests.support.models import Seen

layers = keras.layers
BAD = 37


def data(bad=BAD):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64 * 4, 6)).astype("float32"), generator.normal(size=(64 * 4, 2)).astype("float32")
    if bad is not None:
        y[4 * bad] = np.inf
    return x, y


def network(*more):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu", name="body"), *more, layers.Dense(2, name="head")]
    )


def batches(given):
    for number in range(len(given[0]) // 4):
        yield tuple(tf.constant(part[4 * number : 4 * number + 4]) for part in given)


KINDS = {
    "arrays": lambda given: given,
    "dataset": lambda given: tf.data.Dataset.from_tensor_slices(given).batch(4),
    "generator": batches,
}
OPTIONS = {
    "plain": {"optimizer": "adam"},
    "decay": {"optimizer": keras.optimizers.AdamW(0.01, weight_decay=0.1), "ema": 0.9},
    "momentum": {"optimizer": keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), "clip_norm": 0.5},
    "schedule": {"optimizer": keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9))},
    "groups": {"policy": tl.Groups({"a": "head", "b": "body"}), "optimizer": {"a": "adam", "b": "rmsprop"}},
    "calls": {"policy": tl.Freeze("body"), "optimizer": "adam", "steps_per_call": 5},
}


def kinds_and_options():
    """Every kind of data with every option; quickly arrays with most, and others with one."""
    for kind in KINDS:
        for name in OPTIONS:
            slow = name in ("momentum", "schedule") if kind == "arrays" else name != "calls"
            yield pytest.param(kind, OPTIONS[name], id=f"{kind}-{name}", marks=[pytest.mark.slow] * slow)


def trainer_of(model, kind=tl.Trainer, **options):
    return kind(model, loss="mse", metrics=["mae"], **options)


def fit(trainer, given, **options):
    return trainer.fit(given, batch_size=4, shuffle=False, verbose=0, **options)


@pytest.mark.parametrize(("kind", "options"), list(kinds_and_options()))
def test_all_is_as_after_the_last_good_step_and_training_goes_on(kind, options):
    trainer, other = trainer_of(network(), **options), trainer_of(network(), **options)
    with pytest.raises(tl.NonFiniteError, match=rf"At step {BAD}, epoch 0, the loss is inf, .*`head/kernel`") as raised:
        fit(trainer, KINDS[kind](data()))
    assert raised.value.step == BAD
    assert "Assert" in ops_of_the_loop(trainer)
    assert not {"If", "StatelessIf"} & ops_of_the_loop(trainer)
    good = data(bad=None)
    fit(other, KINDS[kind](tuple(part[: 4 * BAD] for part in good)))
    assert everything(trainer) == everything(other)
    logs = [fit(each, KINDS[kind](good)).history for each in (trainer, other)]
    assert logs[0] == logs[1]
    assert everything(trainer) == everything(other)


def clipped(self, tape, loss):
    """An `update` that keeps weights small."""
    tl.Trainer.update(self, tape, loss)
    for variable in self.model.trainable_variables:
        variable.assign(tf.clip_by_value(variable.value, -0.1, 0.1))


class Clipped(tl.Trainer):
    update = clipped


class Noting(tl.Trainer):
    """Something is read after the update."""

    def train_step(self, batch):
        logs = super().train_step(batch)
        return {**logs, "head": tf.reduce_sum(self.model.get_layer("head").kernel ** 2)}


class Counting(tl.Trainer):
    """The loss leaves something behind."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = tf.Variable(0.0)

    def compute_loss(self, batch, training):
        self.seen.assign_add(tf.reduce_sum(batch[0]))
        return super().compute_loss(batch, training)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        # Each alone, for together one that goes unnoticed would be rolled back with the others.
        ([lambda: layers.BatchNormalization(name="more")], tl.Trainer),
        pytest.param([lambda: layers.Dropout(0.5, seed=0, name="more")], tl.Trainer, marks=pytest.mark.slow),
        ([Seen], tl.Trainer),
        ([], Clipped),
        ([], Noting),
        ([], Counting),
    ],
    ids=["statistics", "seed", "untracked", "update", "train_step", "compute_loss"],
)
def test_what_leaves_more_than_its_update_behind_is_undone(more, kind):
    def left(trainer):
        seen = [layer.count().numpy() for layer in trainer.model.layers if isinstance(layer, Seen)]
        return everything(trainer), seen, own_variables(trainer)

    trainer, other = (trainer_of(network(*(make() for make in more)), kind, optimizer="adam") for _ in range(2))
    with pytest.raises(tl.NonFiniteError, match=f"At step {BAD}, epoch 0, the loss is inf"):
        fit(trainer, data())
    assert "Assert" not in ops_of_the_loop(trainer)
    fit(other, tuple(part[: 4 * BAD] for part in data(bad=None)))
    assert left(trainer) == left(other)


def test_what_comes_after_an_update_sees_what_it_did():
    noting = trainer_of(network(), Noting, optimizer="sgd")
    logs = fit(noting, tuple(part[:4] for part in data(bad=None))).history
    assert logs["head"] == [pytest.approx(float(np.sum(noting.model.get_layer("head").kernel.numpy() ** 2)), rel=1e-6)]


@pytest.mark.parametrize("where", ["subclass", "object", "class"])
def test_an_update_that_is_replaced_even_after_the_trainer_was_made_comes_before_what_follows(where):
    kind = Clipped if where == "subclass" else type("Patched", (tl.Trainer,), {})
    trainer = trainer_of(network(), kind, optimizer=keras.optimizers.SGD(1.0))
    if where == "object":
        trainer.update = types.MethodType(clipped, trainer)
    elif where == "class":
        kind.update = clipped
    fit(trainer, data(bad=None))
    assert max(np.abs(variable).max() for variable in trainer.model.get_weights()) <= np.float32(0.1)


class Twice(tl.Trainer):
    """The loss makes an update of its own before it is computed."""

    def compute_loss(self, batch, training):
        if training:
            with self.tape() as tape:
                inner = tf.reduce_mean(self.model(batch[0]) ** 2)
            self.update(tape, inner)
        return tf.reduce_mean(self.model(batch[0]) ** 2)


def test_an_update_within_the_loss_is_seen_by_the_loss():
    trainer, eager = (
        trainer_of(network(), Twice, optimizer=keras.optimizers.SGD(0.1), run_eagerly=eagerly)
        for eagerly in (False, True)
    )
    logs = [fit(each, tuple(part[:4] for part in data(bad=None))).history["loss"] for each in (trainer, eager)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert "Assert" not in ops_of_the_loop(trainer)


def test_an_optimizer_may_look_at_what_the_step_computed():
    seen = {}

    class Keeping(layers.Layer):
        def call(self, inputs):
            seen["inputs"] = inputs
            return inputs

    class Scaled(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            scale = tf.sqrt(tf.reduce_mean(seen["inputs"] ** 2))
            super().update_step(gradient * scale, variable, learning_rate)

    trainer = trainer_of(network(Keeping(name="more")), optimizer=Scaled(0.1))
    fit(trainer, data(bad=None))
    assert trainer.step == 64


def test_no_step_fails_where_tensorflow_would_not_heed_it():
    options = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"debug_stripper": True})
    try:
        assert not can_stop()
        trainer = trainer_of(network(), optimizer="adam")
        with pytest.raises(tl.NonFiniteError, match=f"At step {BAD}, "):
            fit(trainer, data())
        assert trainer.step == BAD
    finally:
        tf.config.optimizer.set_experimental_options({**options, "debug_stripper": False})
    assert can_stop()
    tf.config.experimental.set_synchronous_execution(False)
    try:
        assert not can_stop()
    finally:
        tf.config.experimental.set_synchronous_execution(True)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"nonfinite": "skip"}, {"nonfinite": "ignore"}], ids=str)
def test_no_step_fails_where_it_must_not_or_cannot(options):
    trainer = trainer_of(network(), optimizer="adam", **options)
    if "jit_compile" in options:
        with pytest.raises(tl.NonFiniteError, match=f"At step {BAD}, epoch 0, the loss is inf"):
            fit(trainer, data())
    else:
        fit(trainer, data())
        assert trainer.step == (63 if options["nonfinite"] == "skip" else 64)
    assert "Assert" not in ops_of_the_loop(trainer)


def test_an_eval_step_of_its_own_is_none_of_the_training_steps_business():
    class Evaluating(tl.Trainer):
        def eval_step(self, batch):
            return {"ones": tf.ones(())}

    trainer = trainer_of(network(), Evaluating, optimizer="adam")
    fit(trainer, data(bad=None))
    assert "Assert" in ops_of_the_loop(trainer)
