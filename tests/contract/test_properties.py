"""The freeze contract as laws, on models and policies that Hypothesis draws."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import resolve
from tests.support import recipes
from tests.support.fitting import X, Y, fit, moved
from tests.support.inspect import optimizer_state_bytes
from tests.support.params import params

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


def quieted(twin, selection):
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


def step_by_hand(recipe, selection, optimizer):
    """The loss of one step on a model of the same recipe, without tapeloop, and the variables that it moved."""
    twin = recipes.make(recipe)
    quieted(twin, selection)
    by_path = {variable.path: variable.variable for variable in Tree.of(twin).variables}
    trained = [by_path[variable.path] for variable in selection.trained]
    with tf.GradientTape() as tape:
        error = tf.reduce_mean((twin(X, training=True) - Y) ** 2)
        loss = tf.add_n([error, *(v.regularizer(v) for v in trained if v.regularizer)])
    optimizer.apply(tape.gradient(loss, trained), trained)
    return float(loss), trained


@recipes.thorough()
@given(st.one_of(recipes.recipes(recipes.UNQUIET), recipes.recipes(recipes.UNQUIET), recipes.recipes()), st.data())
def test_what_is_frozen_is_bit_identical_and_what_trains_moves_as_by_hand(recipe, data):
    keras.utils.set_random_seed(0)
    model = recipes.make(recipe)
    mine, its = (keras.optimizers.SGD(0.1, momentum=0.5, weight_decay=0.1) for _ in range(2))
    trainer = tl.Trainer(model, drawn_policy(data, model), loss="mse", optimizer=mine)
    selection = trainer.selection
    places = [*selection.trained, *selection.frozen, *selection.non_trainable]
    assert len(places) == len(set(places)) == len(selection.tree.variables)
    idle = {s for s in selection.inference if not set(selection.trained) & set(selection.tree.variables_in[s])}
    still = [*selection.frozen, *(v for v in selection.non_trainable if idle & set(v.submodels))]
    before = {v: v.tf_variable.numpy() for v in selection.tree.variables}
    if not set(recipes.UNQUIET) & set(recipes.leaves(recipe)):
        loss, trained = step_by_hand(recipe, selection, its)
        history = trainer.fit([(X, Y)], verbose=0).history
        np.testing.assert_allclose(history["loss"], [loss], rtol=1e-4)
        for variable, theirs in zip(selection.trained, trained):
            np.testing.assert_allclose(variable.tf_variable.numpy(), theirs.value.numpy(), rtol=1e-3, atol=1e-5)
    trainer.fit([(X, Y)] * 3, verbose=0)
    for variable in still:
        assert variable.tf_variable.numpy().tobytes() == before[variable].tobytes(), variable.path
        assert optimizer_state_bytes(trainer, variable) == 0
    for variable in selection.trained:
        assert (variable.tf_variable.numpy() != before[variable]).any(), variable.path
    assert trainer.trace_count == 1


@recipes.thorough()
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


APPLICATIONS = {
    name: make
    for name, make in vars(keras.applications).items()
    if isinstance(make, type(lambda: None)) and name[0].isupper()
}
SAMPLE = {"MobileNetV3Small", "MobileNetV2"}
LEAST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71, "NASNetLarge": 96, "NASNetMobile": 96}


@pytest.mark.parametrize("name", params(sorted(APPLICATIONS), set(APPLICATIONS) - set(SAMPLE)))
def test_every_architecture_of_keras_keeps_the_contract(name):
    size = LEAST.get(name, 64)
    backbone = APPLICATIONS[name](include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg")
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(backbone(inputs)))
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype("float32")
    options = {"data": [(images, np.ones((2, 2), "float32"))], "optimizer": keras.optimizers.AdamW(0.1)}
    assert moved(model, lambda: fit(model, tl.Freeze("backbone"), **options)) == {"head/kernel", "head/bias"}
