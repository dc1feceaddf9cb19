"""State that a frozen and a trained part share: frozen only where all the places that hold it are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.step.freezing import immutable_variables
from tests.support import recipes
from tests.support.fitting import CountingModule, X, Y, fit, history_of, moved
from tests.support.params import params

layers = keras.layers
SGD = keras.optimizers.SGD
POOL = {
    "drop": lambda: layers.Dropout(0.5, seed=3),
    "noise": lambda: layers.GaussianNoise(0.5, seed=4),
    "bare_bn": lambda: layers.BatchNormalization(scale=False, center=False, momentum=0.5),
    "penalty": lambda: layers.ActivityRegularization(l2=0.1),
}


def chain_model(*parts):
    """Layers one after the other, any of which may come twice, and a head."""
    inputs = x = keras.Input((4,))
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def model_of(plan):
    """Chains of a Dense layer and weightless layers of one pool."""
    keras.utils.set_random_seed(0)
    pool = {name: make() for name, make in POOL.items()}
    children = [[layers.Dense(4, activation="tanh"), *(pool[name] for name in names)] for names, _ in plan]
    return chain_model(*(recipes.Chain(parts, False, f"block{number}") for number, parts in enumerate(children)))


def by_hand(plan, steps):
    """Train a twin with every call spelled out: frozen blocks in inference mode, without their penalties."""
    twin, optimizer, losses = model_of(plan), SGD(0.1), []
    blocks = [(twin.get_layer(f"block{number}"), freezes) for number, (_, freezes) in enumerate(plan)]
    trained = [v for block, freezes in blocks if not freezes for v in block.steps[0].trainable_variables]
    trained += twin.get_layer("head").trainable_variables
    for _ in range(steps):
        with tf.GradientTape() as tape:
            x, penalties = tf.constant(X), []
            for block, freezes in blocks:
                for layer in block.steps:
                    x = layer(x, training=not freezes) if recipes.takes_training(layer) else layer(x)
                    if isinstance(layer, layers.ActivityRegularization) and not freezes:
                        penalties += layer.losses  # which Keras divides by the batch size, from 3.14 on
            loss = tf.add_n([tf.reduce_mean((twin.get_layer("head")(x) - Y) ** 2), *penalties])
        optimizer.apply(tape.gradient(loss, trained), trained)
        losses.append(float(loss))
    return twin, losses


plans = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(POOL)), max_size=3), st.booleans()), min_size=1, max_size=3
).filter(lambda plan: any(freezes for _, freezes in plan))


@recipes.thorough(share=0.5)
@given(plans)
def test_layers_shared_at_random_train_as_in_a_loop_by_hand(plan):
    policy = tl.Freeze(*(f"block{number}" for number, (_, freezes) in enumerate(plan) if freezes))
    trainer = fit(model_of(plan), policy, optimizer=SGD(0.1))
    twin, losses = by_hand(plan, 3)
    np.testing.assert_allclose(trainer.history.history["loss"], np.mean(losses), rtol=1e-4)
    for mine, theirs in zip(trainer.selection.tree.variables, tl.Trainer(twin).selection.tree.variables):
        np.testing.assert_allclose(mine.tf_variable, theirs.tf_variable, rtol=1e-3, atol=1e-5, err_msg=mine.path)


def shared(layer):
    """A layer inside a frozen base and again in front of a trained head."""
    return chain_model(keras.Sequential([keras.Input((4,)), layers.Dense(4), layer], name="base"), layer)


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_dropout_in_a_frozen_base_and_a_trained_head_draws_anew_in_the_head(eagerly):
    drop = layers.Dropout(0.5, seed=3)
    before = drop.seed_generator.state.numpy()
    fit(shared(drop), tl.Freeze("base"), run_eagerly=eagerly)
    assert (drop.seed_generator.state.numpy() - before).tolist() == [0, 3]  # once a step: in the head alone


def test_a_seed_that_two_submodels_share_goes_on_while_they_train_in_turn():
    drop = layers.Dropout(0.5, seed=3)
    blocks = [keras.Sequential([keras.Input((4,)), layers.Dense(4), drop], name=name) for name in "ab"]
    before = drop.seed_generator.state.numpy()
    fit(chain_model(*blocks), tl.Cycle([tl.Freeze("a"), tl.Freeze("b")], every=1), steps=4)
    assert (drop.seed_generator.state.numpy() - before).tolist() == [0, 4]


def test_shared_statistics_without_weights_move_in_the_trained_part():
    bn = layers.BatchNormalization(scale=False, center=False, momentum=0.5)
    trainer = tl.Trainer(shared(bn), tl.Freeze("base"), loss="mse", optimizer=SGD(0.0))
    assert "moving_mean" not in {v.name for v in immutable_variables(trainer.selection)}
    losses = trainer.fit([(X, Y)], epochs=40, verbose=0).history["loss"]
    assert trainer.evaluate([(X, Y)], verbose=0)["loss"] == pytest.approx(losses[-1], rel=0.05)


def test_a_penalty_counts_where_its_layer_is_called_in_a_trained_part_alone():
    penalty = layers.ActivityRegularization(l2=1.0)
    model = shared(penalty)
    error = tf.reduce_mean((model(X) - Y) ** 2)
    penalty(model.get_layer("base")(X))
    expected = float(error + penalty.losses[0])
    assert history_of(model, tl.Freeze("base"), optimizer=SGD(0.0))["loss"] == [pytest.approx(expected, rel=1e-5)]


class Holds(layers.Layer):
    """A Keras layer that holds a module, which Keras does not track."""

    def __init__(self, name):
        super().__init__(name=name)
        self.module, self.dense = CountingModule(), layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(self.module(x))


@pytest.mark.parametrize(
    "how", params([{}, {"run_eagerly": True}, {"microbatches": 2}], [{"microbatches": 2}]), ids=str
)
def test_a_module_inside_a_keras_layer_is_part_of_the_tree_and_frozen_with_it(how):
    model = chain_model(Holds("holds"))
    trainer = tl.Trainer(model, tl.Freeze("holds"), loss="mse", **how)
    assert {v.path for v in trainer.selection.frozen} >= {"holds/module/scale"}
    two_steps = lambda: trainer.fit([(X, Y)] * 2, verbose=0)  # noqa: E731
    assert moved(model, two_steps, "holds") == set()  # a warning of untracked variables would be an error
    trainer.policy = tl.TrainAll()
    names = {"module/scale", "module/calls", "dense/kernel", "dense/bias"}
    assert moved(model, two_steps, "holds") == {f"holds/{name}" for name in names}


def test_a_flag_that_is_off_holds_for_a_module_inside_too():
    model = chain_model(Holds("holds"))
    model.get_layer("holds").trainable = False
    selection = tl.Trainer(model, loss="mse").selection
    assert [v.path for v in selection.trained] == ["head/kernel", "head/bias"]
    with pytest.raises(tl.PolicyError, match=r"Keras holds non-trainable.*Set `trainable = True` on their layers"):
        _ = tl.Trainer(model, tl.TrainOnly("holds"), loss="mse").selection


class Counts(layers.Layer):
    """Counts its calls, in any mode."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)
def test_shared_state_does_not_move_in_the_calls_of_the_frozen_part(how):
    counts = Counts()
    trainer = fit(shared(counts), tl.Freeze("base"), **how)
    assert float(counts.calls) == 3.0  # once a step: in the head, and not in the base as well
    trainer.policy = tl.TrainAll()
    trainer.fit([(X, Y)] * 3, verbose=0)
    assert float(counts.calls) == 3.0 + 6.0


class Scales(tf.Module):
    """A module that insists on training mode for the Dropout in it."""

    def __init__(self, drop):
        super().__init__()
        self.kernel, self.drop = tf.Variable(2 * tf.eye(4)), drop

    def __call__(self, x):
        return self.drop(x @ self.kernel, training=True)


class SharesDrop(keras.Model):
    """A Dropout of its own, which is called in a module alone."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = layers.Dropout(0.5, seed=1), layers.Dense(3)
        self.base = Scales(self.drop)

    def call(self, x):
        return self.head(self.base(x))


def test_a_dropout_that_is_shared_is_off_in_the_calls_of_a_frozen_module():
    keras.utils.set_random_seed(0)
    model = SharesDrop()
    model(X)
    expected = np.mean((model.head(2 * X) - Y) ** 2)
    assert history_of(model, tl.Freeze("base"))["loss"] == [pytest.approx(expected, rel=1e-5)]
