"""Optimizer state belongs to variables: through new names of groups, splits, joins, and what an optimizer decides."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import inspect
from tests.support.compare import assert_close
from tests.support.fitting import X, Y, fit, mlp, moved, refused
from tests.support.steps import InTurn

layers = keras.layers
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
TAIL = ["mid", "head"]
TWO = tl.Groups({"m": "mid", "h": "head"})
LATER = tl.GradualUnfreeze(["head", "mid"])


def network():
    return mlp("base", *TAIL)


def by_keras(names, steps, rate=0.1, optimizer=Adam):
    """A model of which some layers were trained by a Keras optimizer."""
    model, mine = network(), optimizer(rate)
    variables = [v for name in names for v in model.get_layer(name).trainable_variables]
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X) - Y) ** 2)
        mine.apply(tape.gradient(loss, variables), variables)
    return model


def assert_alike(trainer, model):
    assert_close(trainer, model, rtol=1e-5, atol=1e-6)


SECOND = {
    "renamed": tl.Groups({"tail": TAIL}),
    "split": TWO,
    "split, with multipliers of 1": tl.Groups({"m": "mid", "h": "head"}, multipliers={"m": 1, "h": 1.0}),
}


def optimizers_and_policies():
    """Every optimizer with each second policy; quickly Adam with the two that differ most."""
    for optimizer in (Adam, keras.optimizers.Nadam, keras.optimizers.Lion):
        for second in SECOND:
            slow = optimizer is not Adam or second not in ("renamed", "split")
            yield pytest.param(optimizer, second, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("optimizer", "second"), list(optimizers_and_policies()))
def test_state_survives_another_name_of_the_group(optimizer, second):
    first = tl.Freeze("base")
    phases = tl.Phases({0: first, 2: SECOND[second], 4: first, 6: SECOND[second]})
    trainer = fit(network(), phases, steps=1, epochs=8, optimizer=optimizer(0.1))
    assert_alike(trainer, by_keras(TAIL, 8, optimizer=optimizer))
    assert trainer.trace_count == 2  # phases that return cost no trace
    assert inspect.iterations(trainer) == [8]


def test_the_groups_of_one_cohort_have_rates_of_their_own():
    trainer = fit(network(), steps=1, optimizer=SGD(0.1))
    step = lambda: trainer.fit([(X, Y)], verbose=0)  # noqa: E731
    trainer.policy = tl.Groups({"slow": "base", "fast": TAIL}, multipliers={"slow": 0.0})
    assert moved(trainer.model, step) == {f"{name}/{part}" for name in TAIL for part in ("kernel", "bias")}
    assert dict(trainer.learning_rates) == pytest.approx({"slow": 0.0, "fast": 0.1})
    trainer.learning_rates["fast"] = 0.0
    assert moved(trainer.model, step) == set()
    assert trainer.trace_count == 2


class Both(InTurn):
    order = ("m", "h")

    def loss_of(self, group, batch):
        return self.compute_loss(batch, training=True)


def test_two_updates_of_one_cohort_each_have_their_own_count():
    trainer = Both(network(), loss="mse", optimizer=Adam(0.1))
    for policy, fits in ((tl.Freeze("base"), False), (TWO, True), (tl.Freeze("base"), False)):
        trainer.policy = policy
        if fits:
            trainer.fit([(X, Y)] * 3, verbose=0)
        else:
            with pytest.raises(tl.PolicyError, match="`tape` was asked for the groups"):
                trainer.fit([(X, Y)], verbose=0)
    assert inspect.iterations(trainer) == [3]


def test_a_stage_that_joins_at_a_rate_of_its_own_leaves_the_state_of_those_before_alone():
    trainer = fit(network(), tl.GradualUnfreeze(["head", TAIL, "base"], decay=0.5), epochs=3, optimizer=Adam(0.1))
    assert dict(trainer.learning_rates) == pytest.approx({"stage2": 0.025, "stage1": 0.05, "stage0": 0.1})
    assert inspect.iterations(trainer) == [9, 6, 3]
    # By hand: an Adam for each stage, from the step on at which it joins.
    model = network()
    stages = [(model.get_layer(name), Adam(rate)) for name, rate in (("head", 0.1), ("mid", 0.05), ("base", 0.025))]
    for epoch in range(3):
        for _ in range(3):
            weights = [layer.trainable_variables for layer, _ in stages[: epoch + 1]]
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(X) - Y) ** 2)
            for gradients, variables, (_, adam) in zip(tape.gradient(loss, weights), weights, stages):
                adam.apply(gradients, variables)
    assert_alike(trainer, model)
    # A rate that the user sets stays, whatever stage joins after.
    trainer.learning_rates["stage1"] = 0.5
    trainer.fit([(X, Y)], verbose=0)
    assert trainer.learning_rates["stage1"] == pytest.approx(0.5)


# Two steps each under "a", "b" and "a" again: a count that goes along comes to 2, 4 and 6, others to 2, 2 and 4.
@pytest.mark.parametrize(("kind", "counts"), [(Adam, [6, 4]), (SGD, [4, 2])], ids=["of its kind", "of another"])
def test_a_variable_that_goes_to_another_optimizer_of_its_kind_takes_its_state_along(kind, counts):
    phases = tl.Phases({0: tl.Groups({"a": TAIL}), 1: tl.Groups({"b": TAIL}), 2: tl.Groups({"a": TAIL})})
    trainer = fit(network(), phases, steps=2, epochs=3, optimizer={"a": Adam(0.1), "b": kind(0.1)})
    assert inspect.iterations(trainer) == counts
    if kind is Adam:
        assert_alike(trainer, by_keras(TAIL, 6))


# What an optimizer decides over all of its variables


@pytest.mark.parametrize(
    "policy",
    [TWO, tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainOnly(*TAIL)}), tl.Phases({0: tl.Freeze("base"), 1: TWO})],
    ids=["groups", "cohorts", "one cohort in two groups"],
)
def test_a_global_norm_is_that_of_all_variables(policy):
    sgd = SGD(1.0, global_clipnorm=0.01)
    trainer = fit(network(), policy, steps=1, epochs=2, optimizer=sgd)
    before = trainer.model.get_weights()
    trainer.fit([(X, Y)], verbose=0)
    squares = [((old - new) ** 2).sum() for old, new in zip(before, trainer.model.get_weights())]
    assert float(np.sqrt(sum(squares))) == pytest.approx(0.01, rel=1e-3)
    assert sgd.global_clipnorm == 0.01


def test_one_cohort_clips_to_the_bit_as_keras_does():
    clipped = lambda rate: Adam(rate, global_clipnorm=0.01)  # noqa: E731
    trainer = fit(network(), tl.Freeze("base"), optimizer=clipped(0.1))
    assert_alike(trainer, by_keras(TAIL, 3, optimizer=clipped))


class Overwritten(layers.Layer):
    """A layer with a scale whose "gradient" is its next value, as Keras' float8 has them."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), initializer="ones")
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.scale.overwrite_with_gradient = True

    def call(self, x):
        @tf.custom_gradient
        def scaled(x, scale):
            return x * tf.stop_gradient(scale), lambda upstream: (upstream, tf.reduce_max(tf.abs(x)) * 100.0)

        return scaled(x, self.scale) @ self.kernel


OVERWRITTEN = 100.0 * np.abs(X).max()


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.1}, {"ema": 0.5}, {"microbatches": 2}, {"clip_norm": {"default": 0.1}}], ids=str
)
def test_what_overwrites_its_variable_is_not_clipped_averaged_or_spread_over_pieces(options):
    model = keras.Sequential([keras.Input((4,)), Overwritten()])
    kernel, scale = model.layers[0].kernel, model.layers[0].scale
    before = kernel.numpy()
    trainer = fit(model, steps=1, optimizer=SGD(0.1), **options)
    if "clip_norm" in options:  # and it is not counted in the norm of the others
        assert np.linalg.norm(kernel.numpy() - before) == pytest.approx(0.1 * 0.1, rel=1e-3)
    np.testing.assert_allclose(scale, OVERWRITTEN, rtol=1e-6)
    (info,) = [v for v in trainer.selection.trained if v.variable is scale]
    assert info.path not in inspect.averages(trainer)
    if "ema" in options:
        with trainer.ema_weights():
            np.testing.assert_allclose(scale, OVERWRITTEN, rtol=1e-6)


def test_a_loss_scale_does_not_divide_it():
    model = keras.Sequential([keras.Input((4,)), Overwritten(), layers.Dense(3, dtype="mixed_float16")])
    trainer = fit(model, steps=12, optimizer=SGD(0.001))  # the first few overflow, and halve the scale
    assert trainer.loss_scale > 1
    assert trainer.step > 0
    np.testing.assert_allclose(model.layers[0].scale, OVERWRITTEN, rtol=1e-3)


# The optimizer that the user passed


class Boosted(SGD):
    """Its config does not list what its constructor takes."""

    def __init__(self, learning_rate=0.1, boost=2.0, **options):
        super().__init__(learning_rate, **options)
        self.boost = boost

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate * self.boost)


class Listed(Boosted):
    def get_config(self):
        return {**super().get_config(), "boost": self.boost}


class Strict(SGD):
    def __init__(self, needed, **options):
        super().__init__(needed, **options)


@pytest.mark.parametrize(("policy", "kind"), [(tl.Freeze("base"), Boosted), (TWO, Listed)], ids=["one", "a clone too"])
def test_the_first_cohort_has_the_very_optimizer_and_the_next_a_clone_that_is_the_same(policy, kind):
    optimizer = kind(0.1, boost=5.0)
    trainer = fit(network(), policy, steps=1, optimizer=optimizer)
    first, *clones = inspect.optimizers(trainer)
    assert first is optimizer
    assert optimizer not in clones
    assert len(clones) == (policy is TWO)
    assert_alike(trainer, by_keras(TAIL, 1, rate=0.5, optimizer=SGD))
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize(
    ("policy", "optimizer", "text"),
    [
        *(
            (policy, Boosted(0.1, boost=5.0), r"A second Boosted is needed.*`boost` would be 2.0 and not 5.0. Have its")
            for policy in (TWO, LATER, tl.Phases({0: tl.TrainOnly("head"), 5: tl.TrainAll()}))
        ),
        (TWO, Strict(0.1), r"`from_config\(get_config\(\)\)` raises"),
    ],
    ids=["groups", "gradual", "phases", "cannot be made"],
)
def test_a_clone_that_would_lose_something_or_cannot_be_made_is_refused(policy, optimizer, text):
    trainer = tl.Trainer(network(), policy, loss="mse", optimizer=optimizer)
    with refused(trainer.model, tl.PolicyError, text):
        trainer.fit([(X, Y)], epochs=2, verbose=0)


def test_an_optimizer_that_is_built_elsewhere_is_cloned():
    optimizer = Adam(0.1)
    for _ in range(2):
        trainer = fit(network(), tl.Freeze("base"), steps=2, optimizer=optimizer)
        assert_alike(trainer, by_keras(TAIL, 2))
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "x", None, True])
def test_rates_and_multipliers_are_finite_and_not_negative(value):
    received = f"must be a finite number, 0 or more. Received: {value!r}"
    with pytest.raises(ValueError, match=received):
        tl.Groups({"h": "head"}, multipliers={"h": value})
    trainer = tl.Trainer(network(), tl.Groups({"h": "head"}), loss="mse", optimizer="sgd")
    with pytest.raises(ValueError, match=f"`learning_rates` {received}"):
        trainer.learning_rates["h"] = value

    class Multiplies(tl.VariablePolicy):
        def group(self, variable):
            return "all"

        def multiplier(self, variable):
            return value

    with pytest.raises(tl.PolicyError, match=r"`Multiplies.multiplier` must return a finite number, 0 or more"):
        fit(network(), Multiplies())


def test_a_float64_model_in_micro_batches_is_averaged_in_float64():
    results, batch = [], (X.astype("float64"), Y.astype("float64"))
    keras.config.set_floatx("float64")
    try:
        for pieces in (1, 3):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((4,), dtype="float64"), layers.Dense(3, dtype="float64")])
            results.append(fit(model, data=[batch] * 5, optimizer=SGD(0.1), microbatches=pieces))
    finally:
        keras.config.set_floatx("float32")
    assert_close(*results, atol=1e-14)


def test_a_rate_that_the_user_assigns_to_the_optimizer_holds_for_all_of_its_variables():
    optimizer = SGD(0.1)
    trainer = tl.Trainer(network(), LATER, loss="mse", optimizer=optimizer)
    optimizer.learning_rate = 0.05
    trainer.fit([(X, Y)], epochs=2, verbose=0)
    assert dict(trainer.learning_rates) == pytest.approx({"default": 0.05})
    trainer.learning_rates["default"] = 0.02
    trainer.fit([(X, Y)], verbose=0)
    optimizer.learning_rate = 0.0
    assert moved(trainer.model, lambda: trainer.fit([(X, Y)], verbose=0)) == set()
    assert dict(trainer.learning_rates) == {"default": 0.0}


def test_rates_that_the_trainer_sets_are_not_taken_for_the_users():
    groups = tl.Groups({"m": "mid", "h": "head"}, multipliers={"m": 0.5})
    policy = tl.Cycle([tl.TrainAll(), groups], every=1, unit="epoch")
    trainer = fit(network(), policy, steps=1, epochs=5, optimizer=SGD(0.1))
    assert dict(trainer.learning_rates) == pytest.approx({"m": 0.05, "h": 0.1})


@pytest.mark.parametrize("policy", [TWO, LATER], ids=repr)
def test_what_is_excluded_from_weight_decay_is_so_in_clones_too(policy):
    optimizer = keras.optimizers.AdamW(0.0001, weight_decay=100.0)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    trainer = tl.Trainer(network(), policy, loss="mse", optimizer=optimizer)
    before = [layer.kernel.numpy() for layer in trainer.model.layers]
    trainer.fit([(X, Y)] * 3, epochs=2, verbose=0)
    assert_close([layer.kernel.numpy() for layer in trainer.model.layers], before, atol=2e-3)
