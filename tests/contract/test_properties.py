"""The freeze contract as laws, on models and policies that Hypothesis draws."""

import contextlib
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import resolve
from tests.support import models, recipes

EXAMPLES = int(os.environ.get("TAPELOOP_EXAMPLES", "40"))
THOROUGH = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
X = np.random.default_rng(0).normal(size=(8, recipes.WIDTH)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 1)).astype("float32")
FORWARD = [("sequential", ["dense", "bn", "dropout"]), ("insistent", ["spectral", "recurrent", "attention"]), "augment"]


def drawn_policy(data, model):
    """A policy that leaves something to train: by frozen paths, by trained ones, or by names."""
    tree = Tree.of(model)
    owners = [s.path for s in tree.submodels[1:] if any(v.trainable for v in tree.variables_in[s])]
    chosen = data.draw(st.lists(st.sampled_from(owners), min_size=1, max_size=3, unique=True), label="paths")
    policy = data.draw(st.sampled_from([tl.Freeze, tl.TrainOnly]), label="kind")(*chosen)
    left = [v for v in tree.variables if v.trainable and policy.group(v)]
    assume(left)
    return policy


@THOROUGH
@given(recipes.recipes(), st.data())
def test_what_is_frozen_is_bit_identical_and_what_trains_is_all_that_trains(recipe, data):
    keras.utils.set_random_seed(0)
    model = recipes.make(recipe)
    policy = drawn_policy(data, model)
    trainer = tl.Trainer(model, policy, loss="mse", optimizer=keras.optimizers.AdamW(0.1, weight_decay=0.1))
    selection = trainer.selection
    places = [*selection.trained, *selection.frozen, *selection.non_trainable]
    assert len(places) == len(set(places)) == len(selection.tree.variables)
    idle = {s for s in selection.inference if not set(selection.trained) & set(selection.tree.variables_in[s])}
    still = [*selection.frozen, *(v for v in selection.non_trainable if idle & set(v.submodels))]
    before = {v: v.tf_variable.numpy() for v in selection.tree.variables}
    trainer.fit([(X, Y)] * 3, progress="none")
    for variable in still:
        assert variable.tf_variable.numpy().tobytes() == before[variable].tobytes(), variable.path
        assert trainer._updates.optimizers.state_bytes(variable) == 0
    for variable in selection.trained:
        assert (variable.tf_variable.numpy() != before[variable]).any(), variable.path
    assert trainer.trace_count == 1


def quieted(model, twin, selection):
    """Put a twin's frozen parts in inference mode by what plain Keras has for it, without tapeloop."""
    pairs = zip(selection.tree.layers, Tree.of(twin).layers)
    inference = set(selection.inference)
    for mine, theirs in pairs:
        if mine in inference:
            for name in ("rate", "stddev", "_dropout", "dropout", "recurrent_dropout"):
                if isinstance(getattr(theirs.object, name, None), float):
                    with contextlib.suppress(AttributeError):  # a recurrent layer's is its cell's
                        setattr(theirs.object, name, 0.0)
            if isinstance(theirs.object, keras.layers.BatchNormalization):
                theirs.object.trainable = False
    for mine, theirs in zip(selection.tree.variables, Tree.of(twin).variables):
        theirs.tf_variable.assign(mine.tf_variable)


@THOROUGH
@given(recipes.recipes(), st.data())
def test_what_trains_equals_a_step_written_by_hand(recipe, data):
    assume("spectral" not in str(recipe))  # plain Keras has no way to hold its vectors still
    assume("augment" not in str(recipe))  # nor to switch an augmentation off
    keras.utils.set_random_seed(0)
    model, twin = recipes.make(recipe), recipes.make(recipe)
    policy = drawn_policy(data, model)
    selection = resolve(policy, Tree.of(model))
    quieted(model, twin, selection)
    by_path = {variable.path: variable.variable for variable in Tree.of(twin).variables}
    trained = [by_path[variable.path] for variable in selection.trained]
    optimizer = keras.optimizers.SGD(0.1)
    with tf.GradientTape() as tape:
        error = tf.reduce_mean((twin(X, training=True) - Y) ** 2)
        loss = tf.add_n([error, *(v.regularizer(v) for v in trained if v.regularizer)])
    optimizer.apply(tape.gradient(loss, trained), trained)
    history = tl.Trainer(model, policy, loss="mse", optimizer=keras.optimizers.SGD(0.1)).fit([(X, Y)], progress="none")
    np.testing.assert_allclose(history.history["loss"], [float(loss)], rtol=1e-4)
    for variable, theirs in zip(selection.trained, trained):
        np.testing.assert_allclose(variable.tf_variable.numpy(), theirs.value.numpy(), rtol=1e-3, atol=1e-5)


@THOROUGH
@given(recipes.recipes(), st.data())
@example(FORWARD, None)
def test_two_spellings_of_one_policy_are_one_selection(recipe, data):
    model = recipes.make(recipe)
    policy = drawn_policy(data, model) if data else tl.Freeze("block0")
    tree = Tree.of(model)
    one = resolve(policy, tree)
    names = {v.path for v in one.trained}
    other = resolve(tl.TrainOnly(tl.matching(lambda v: v.path in names)), Tree.of(model))
    assert one == other
    assert hash(one) == hash(other)


def test_two_spellings_make_one_trace():
    trainer = models.trainer_of(policy=tl.Freeze("base"))
    trainer.fit(models.images(8), progress="none")
    trainer.policy = tl.TrainOnly(tl.of_type(keras.layers.Dense))
    trainer.fit(models.images(8), progress="none")
    assert trainer.trace_count == 1


APPLICATIONS = {
    name: make
    for name, make in vars(keras.applications).items()
    if isinstance(make, type(lambda: None)) and name[0].isupper()
}
SAMPLE = {"MobileNetV3Small", "MobileNetV2"}
LEAST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71, "NASNetLarge": 96, "NASNetMobile": 96}


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in sorted(APPLICATIONS)]
)
def test_every_architecture_of_keras_keeps_the_contract(name):
    size = LEAST.get(name, 64)
    backbone = APPLICATIONS[name](include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg")
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(backbone(inputs)))
    before = models.values(model)
    trainer = tl.Trainer(model, tl.Freeze("backbone"), loss="mse", optimizer=keras.optimizers.AdamW(0.1))
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype("float32")
    trainer.fit([(images, np.ones((2, 2), "float32"))], progress="none")
    after = models.values(model)
    assert {path for path in before if before[path] != after[path]} == {"head/kernel", "head/bias"}
