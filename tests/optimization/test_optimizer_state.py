"""Optimizer state belongs to variables: through new names of groups, splits, joins, and what an optimizer decides."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.policies.resolve import resolve
from tests.support import inspect, models

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")


def mlp(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="base"), layers.Dense(4, name="mid"), layers.Dense(3, name="head")]
    )


def plain(names, steps, rates=None, optimizer=keras.optimizers.Adam):
    """Weights after training some layers by one Keras optimizer for each group of them."""
    model = mlp()
    groups = [[v for name in group for v in model.get_layer(name).trainable_variables] for group in names]
    optimizers = [optimizer(rate) for rate in rates or [0.1] * len(names)]
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X) - Y) ** 2)
        everything = [variable for group in groups for variable in group]
        gradients = iter(tape.gradient(loss, everything))
        for each, group in zip(optimizers, groups):
            each.apply([next(gradients) for _ in group], group)
    return model.get_weights()


def assert_same(model, weights):
    for mine, theirs in zip(model.get_weights(), weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


TAIL = ["mid", "head"]
SECOND = {
    "renamed": (tl.Groups({"tail": TAIL}), 1),
    "split": (tl.Groups({"m": "mid", "h": "head"}), 1),
    "split, with multipliers of 1": (tl.Groups({"m": "mid", "h": "head"}, multipliers={"m": 1, "h": 1.0}), 1),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, keras.optimizers.Nadam, keras.optimizers.Lion])
def test_state_survives_another_name_of_the_group(second, optimizer):
    policy, _ = SECOND[second]
    model = mlp()
    phases = tl.Phases({0: tl.Freeze("base"), 2: policy, 4: tl.Freeze("base")})
    trainer = tl.Trainer(model, phases, loss="mse", optimizer=optimizer(0.1))
    trainer.fit([(X, Y)], epochs=6, progress="none")
    assert_same(model, plain([TAIL], 6, optimizer=optimizer))
    assert trainer.trace_count == 2  # the phase that returns costs no trace
    assert inspect.iterations(trainer) == [6]


def test_the_first_step_of_layerwise_decay_after_freeze_is_not_the_first_of_an_optimizer():
    model = mlp()
    phases = tl.Phases({0: tl.TrainAll(), 1: tl.LayerwiseDecay(1.0, of=layers.Dense)})
    tl.Trainer(model, phases, loss="mse", optimizer=keras.optimizers.Adam(0.1)).fit(
        [(X, Y)] * 3, epochs=2, progress="none"
    )
    assert_same(model, plain([["base", *TAIL]], 6))


def test_the_groups_of_one_cohort_have_rates_of_their_own():
    model = mlp()
    trainer = tl.Trainer(model, tl.TrainAll(), loss="mse", optimizer=keras.optimizers.SGD(0.1))
    trainer.fit([(X, Y)], progress="none")
    trainer.policy = tl.Groups({"slow": "base", "fast": "**"} | {"fast": TAIL}, multipliers={"slow": 0.0})
    before = model.get_weights()
    trainer.fit([(X, Y)], progress="none")
    for old, new, moves in zip(before, model.get_weights(), [False, False, True, True, True, True]):
        assert bool((old != new).any()) == moves
    assert dict(trainer.learning_rates) == pytest.approx({"slow": 0.0, "fast": 0.1})
    trainer.learning_rates["fast"] = 0.0
    before = model.get_weights()
    trainer.fit([(X, Y)], progress="none")
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert trainer.trace_count == 2


def test_two_updates_of_one_cohort_each_have_their_own_count():
    class InTurn(tl.Trainer):
        def train_step(self, batch):
            for group in ("m", "h"):
                with self.tape(group) as tape:
                    loss = self.compute_loss(batch, training=True)
                self.update(tape, loss)
            return {"loss": loss}

    trainer = InTurn(mlp(), tl.Freeze("base"), loss="mse", optimizer=keras.optimizers.Adam(0.1))
    with pytest.raises(tl.PolicyError, match="`tape` was asked for the groups"):
        trainer.fit([(X, Y)], progress="none")
    trainer.policy = tl.Groups({"m": "mid", "h": "head"})
    trainer.fit([(X, Y)] * 3, progress="none")
    trainer.policy = tl.Freeze("base")
    with pytest.raises(tl.PolicyError, match="`tape` was asked for the groups"):
        trainer.fit([(X, Y)], progress="none")
    assert inspect.iterations(trainer) == [3]


def test_a_variable_that_goes_to_another_optimizer_of_its_kind_takes_its_state_along():
    model = mlp()
    phases = tl.Phases({0: tl.Groups({"a": TAIL}), 1: tl.Groups({"b": TAIL}), 2: tl.Groups({"a": TAIL})})
    optimizer = {"a": keras.optimizers.Adam(0.1), "b": keras.optimizers.Adam(0.1)}
    trainer = tl.Trainer(model, phases, loss="mse", optimizer=optimizer)
    trainer.fit([(X, Y)] * 2, epochs=3, progress="none")
    assert_same(model, plain([TAIL], 6))
    assert inspect.iterations(trainer) == [6, 4]


def test_to_an_optimizer_of_another_kind_it_goes_without():
    phases = tl.Phases({0: tl.Groups({"a": TAIL}), 1: tl.Groups({"b": TAIL})})
    trainer = tl.Trainer(mlp(), phases, loss="mse", optimizer={"a": "adam", "b": "sgd"})
    trainer.fit([(X, Y)] * 2, epochs=2, progress="none")
    assert inspect.iterations(trainer) == [2, 2]


# What an optimizer decides over all of its variables


@pytest.mark.parametrize(
    "policy",
    [
        tl.Groups({"m": "mid", "h": "head"}),
        tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainOnly("head", "mid")}),
        tl.Phases({0: tl.Freeze("base"), 1: tl.Groups({"m": "mid", "h": "head"})}),
    ],
    ids=["groups", "cohorts", "one cohort in two groups"],
)
def test_a_global_norm_is_that_of_all_variables(policy):
    model = mlp()
    sgd = keras.optimizers.SGD(1.0, global_clipnorm=0.01)
    trainer = tl.Trainer(model, policy, loss="mse", optimizer=sgd)
    trainer.fit([(X, Y)], epochs=2, progress="none")
    before = model.get_weights()
    trainer.fit([(X, Y)], progress="none")
    moved = [old - new for old, new in zip(before, model.get_weights())]
    norm = float(np.sqrt(sum((each**2).sum() for each in moved)))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert sgd.global_clipnorm == 0.01


def test_one_cohort_clips_to_the_bit_as_keras_does():
    model = mlp()
    make = lambda rate: keras.optimizers.Adam(rate, global_clipnorm=0.01)  # noqa: E731
    tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer=make(0.1)).fit([(X, Y)] * 3, progress="none")
    assert_same(model, plain([TAIL], 3, optimizer=make))


def test_accumulation_is_refused_and_its_stead_named():
    text = r"must not accumulate gradients.*4 times the `batch_size`, and `microbatches=4`"
    with pytest.raises(TypeError, match=text):
        tl.Trainer(mlp(), loss="mse", optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))


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


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.1}, {"ema": 0.5}, {"microbatches": 2}, {"clip_norm": {"default": 0.1}}], ids=str
)
def test_what_overwrites_its_variable_is_not_clipped_averaged_or_spread_over_pieces(options):
    model = keras.Sequential([keras.Input((4,)), Overwritten()])
    trainer = tl.Trainer(model, loss="mse", optimizer=keras.optimizers.SGD(0.1), **options)
    trainer.fit([(X, Y)], progress="none")
    scale = model.layers[0].scale
    np.testing.assert_allclose(scale, 100.0 * np.abs(X).max(), rtol=1e-6)
    (info,) = [v for v in trainer.selection.trained if v.variable is scale]
    assert info.path not in inspect.averages(trainer)
    if "ema" in options:
        with trainer.ema_weights():
            np.testing.assert_allclose(scale, 100.0 * np.abs(X).max(), rtol=1e-6)


def test_a_loss_scale_does_not_divide_it():
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((4,)), Overwritten(dtype="float32"), layers.Dense(3)])
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    trainer = tl.Trainer(model, loss="mse", optimizer=keras.optimizers.SGD(0.001))
    trainer.fit([(X, Y)] * 12, progress="none")  # the first few overflow, and halve it
    assert trainer.loss_scale > 1
    assert trainer.step > 0
    np.testing.assert_allclose(model.layers[0].scale, 100.0 * np.abs(X).max(), rtol=1e-3)


# The optimizer that the user passed


class Boosted(keras.optimizers.SGD):
    """Its config does not list what its constructor takes."""

    def __init__(self, learning_rate=0.1, boost=2.0, **options):
        super().__init__(learning_rate, **options)
        self.boost = boost

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate * self.boost)


def test_the_passed_optimizer_is_used_as_it_is_where_one_cohort_suffices():
    model, optimizer = mlp(), Boosted(0.1, boost=5.0)
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer=optimizer)
    trainer.fit([(X, Y)], progress="none")
    assert inspect.optimizers(trainer)[0] is optimizer
    assert_same(model, plain([TAIL], 1, rates=[0.5], optimizer=keras.optimizers.SGD))
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize(
    "policy",
    [
        tl.Groups({"m": "mid", "h": "head"}),
        tl.GradualUnfreeze(["head", "mid"]),
        tl.Phases({0: tl.TrainOnly("head"), 5: tl.TrainAll()}),
    ],
    ids=["groups", "gradual", "phases"],
)
def test_a_clone_that_would_lose_something_is_refused_by_name(policy):
    model = mlp()
    before = model.get_weights()
    trainer = tl.Trainer(model, policy, loss="mse", optimizer=Boosted(0.1, boost=5.0))
    text = r"A second Boosted is needed.*`boost` would be 2.0 and not 5.0. Have its `get_config` list `boost`"
    with pytest.raises(tl.PolicyError, match=text):
        trainer.fit([(X, Y)], epochs=2, progress="none")
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_a_clone_that_is_the_same_is_made():
    class Listed(Boosted):
        def get_config(self):
            return {**super().get_config(), "boost": self.boost}

    model = mlp()
    trainer = tl.Trainer(model, tl.Groups({"m": "mid", "h": "head"}), loss="mse", optimizer=Listed(0.1, boost=5.0))
    trainer.fit([(X, Y)], progress="none")
    assert_same(model, plain([TAIL], 1, rates=[0.5], optimizer=keras.optimizers.SGD))


def test_one_that_cannot_be_made_again_is_refused():
    class Strict(keras.optimizers.SGD):
        def __init__(self, needed, **options):
            super().__init__(needed, **options)

    trainer = tl.Trainer(mlp(), tl.Groups({"m": "mid", "h": "head"}), loss="mse", optimizer=Strict(0.1))
    with pytest.raises(tl.PolicyError, match=r"`from_config\(get_config\(\)\)` raises"):
        trainer.fit([(X, Y)], progress="none")


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "adamw", "adafactor", "lion", "nadam", "ftrl", "rmsprop", "adamax", "lamb"]
)
def test_every_optimizer_of_keras_can_be_cloned(name):
    tree = Tree.of(models.functional())
    optimizers = Optimizers(name)
    optimizers.prepare(resolve(tl.Groups({"h": "head", "b": "base"}), tree))
    assert len(optimizers.cohorts) == 2


def test_an_optimizer_that_is_built_elsewhere_is_cloned():
    optimizer = keras.optimizers.Adam(0.1)
    one, other = mlp(), mlp()
    trainers = [tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer=optimizer) for model in (one, other)]
    for trainer in trainers:
        trainer.fit([(X, Y)] * 2, progress="none")
    assert_same(one, plain([TAIL], 2))
    assert_same(other, plain([TAIL], 2))
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "x", None, True])
def test_rates_and_multipliers_are_finite_and_not_negative(value):
    received = f"must be a finite number, 0 or more. Received: {value!r}"
    with pytest.raises(ValueError, match=received):
        tl.Groups({"h": "head"}, multipliers={"h": value})
    trainer = tl.Trainer(mlp(), tl.Groups({"h": "head"}), loss="mse", optimizer="sgd")
    with pytest.raises(ValueError, match=f"`learning_rates` {received}"):
        trainer.learning_rates["h"] = value

    class Multiplies(tl.VariablePolicy):
        def group(self, variable):
            return "all"

        def multiplier(self, variable):
            return value

    with pytest.raises(tl.PolicyError, match=r"`Multiplies.multiplier` must return a finite number, 0 or more"):
        tl.Trainer(mlp(), Multiplies(), loss="mse").fit([(X, Y)], progress="none")


@pytest.mark.parametrize("rate", [-1.0, float("nan")])
def test_an_optimizers_own_rate_is_checked_too(rate):
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number, 0 or more"):
        tl.Trainer(mlp(), loss="mse", optimizer=keras.optimizers.SGD(rate))


def test_a_misspelt_optimizer_is_named_with_what_is_nearest():
    with pytest.raises(TypeError, match=r"`optimizer` is 'adm', and Keras has none of that name. Did you mean 'adam'"):
        tl.Trainer(mlp(), loss="mse", optimizer="adm")


def test_a_float64_model_in_micro_batches_is_averaged_in_float64():
    results = []
    for pieces in (1, 3):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,), dtype="float64"), layers.Dense(3, dtype="float64")])
        x, y = X.astype("float64"), Y.astype("float64")
        keras.config.set_floatx("float64")
        try:
            trainer = tl.Trainer(model, loss="mse", optimizer=keras.optimizers.SGD(0.1), microbatches=pieces)
            trainer.fit([(x, y)] * 5, progress="none")
        finally:
            keras.config.set_floatx("float32")
        results.append(model.get_weights()[0])
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-14)


def test_a_rate_that_the_user_assigns_to_the_optimizer_holds_for_all_of_its_variables():
    optimizer = keras.optimizers.SGD(0.1)
    trainer = tl.Trainer(mlp(), tl.GradualUnfreeze(["head", "mid"]), loss="mse", optimizer=optimizer)
    optimizer.learning_rate = 0.05
    trainer.fit([(X, Y)], epochs=2, progress="none")
    assert dict(trainer.learning_rates) == pytest.approx({"default": 0.05})
    trainer.learning_rates["default"] = 0.02
    trainer.fit([(X, Y)], progress="none")
    optimizer.learning_rate = 0.0
    before = trainer.model.get_weights()
    trainer.fit([(X, Y)], progress="none")
    for old, new in zip(before, trainer.model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert dict(trainer.learning_rates) == {"default": 0.0}


def test_rates_that_the_trainer_sets_are_not_taken_for_the_users():
    model = mlp()
    optimizer = keras.optimizers.SGD(0.1)
    groups = tl.Groups({"m": "mid", "h": "head"}, multipliers={"m": 0.5})
    policy = tl.Cycle([tl.TrainAll(), groups], every=1, unit="epoch")
    trainer = tl.Trainer(model, policy, loss="mse", optimizer=optimizer)
    trainer.fit([(X, Y)], epochs=5, progress="none")
    assert dict(trainer.learning_rates) == pytest.approx({"m": 0.05, "h": 0.1})


@pytest.mark.parametrize(
    "policy", [tl.Groups({"m": "mid", "h": "head"}), tl.GradualUnfreeze(["head", "mid"])], ids=repr
)
def test_what_is_excluded_from_weight_decay_is_so_in_clones_too(policy):
    optimizer = keras.optimizers.AdamW(0.0001, weight_decay=100.0)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    model = mlp()
    before = [layer.kernel.numpy() for layer in model.layers]
    tl.Trainer(model, policy, loss="mse", optimizer=optimizer).fit([(X, Y)] * 3, epochs=2, progress="none")
    for layer, old in zip(model.layers, before):
        np.testing.assert_allclose(layer.kernel, old, atol=2e-3)
