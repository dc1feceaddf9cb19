"""How policies name what they mean: layers, slices, classes, lists, names with brackets."""

import copy

import keras
import pytest

import tapeloop as tl
from tests.support import models

layers = keras.layers


def backbone():
    inputs = keras.Input((6, 6, 1))
    base = keras.Sequential([inputs, *models.base_layers(), layers.Dense(4)])
    base.name = "base"
    return base, keras.Model(inputs, layers.Dense(1, name="head")(base(inputs)))


def trained(model, policy):
    return {v.path for v in tl.Trainer(model, policy, loss="mse").selection.trained}


def test_slices_of_layers_may_hold_layers_without_weights():
    base, model = backbone()
    for policy in (
        tl.Freeze(*base.layers[:4]),
        tl.Freeze(base.layers[:4]),
        tl.Freeze([base.layers[0], "base/bn", base.layers[2]]),
    ):
        assert {v.path for v in tl.Trainer(model, policy, loss="mse").selection.frozen} == {
            "base/conv/kernel", "base/conv/bias", "base/bn/gamma", "base/bn/beta",
        }  # fmt: skip
    functional = keras.Model(base.inputs, base.outputs)
    assert tl.Trainer(functional, tl.Freeze(*functional.layers[:3]), loss="mse").selection.frozen  # an input among them


def test_lists_and_classes_serve_everywhere():
    _, model = backbone()
    for policy, other in (
        (tl.TrainOnly(layers.Dense), tl.TrainOnly(tl.of_type(layers.Dense))),
        (tl.Groups({"all": [layers.Dense, "base/conv"]}), tl.TrainOnly("base/conv", layers.Dense)),
        (tl.GradualUnfreeze([["head", "base/conv"], "base"]), tl.TrainOnly("head", "base/conv")),
        (tl.TrainOnly(tl.glob("head") | ["base/conv"]), tl.TrainOnly("head", "base/conv")),
    ):
        assert trained(model, policy) == trained(model, other)


def test_layers_without_weights_alone_are_no_answer():
    base, model = backbone()
    with pytest.raises(tl.PolicyError, match="names only layers without"):
        trained(model, tl.Freeze(base.get_layer("flat")))


def test_what_keras_flag_froze_may_be_frozen_again():
    base, model = backbone()
    base.trainable = False
    assert trained(model, tl.Freeze("base")) == {"head/kernel", "head/bias"}


def test_a_name_with_brackets_matches_itself():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="block[0]"), layers.Dense(1, name="block0")])
    brackets = {"block[0]/kernel", "block[0]/bias"}
    assert trained(model, tl.TrainOnly("block[0]")) == brackets | {"block0/kernel", "block0/bias"}
    assert trained(model, tl.TrainOnly("block[[]0]")) == brackets


def test_a_deep_copy_of_a_policy_names_the_same_layers():
    base, model = backbone()
    policy = tl.Phases({0: tl.Freeze(base, tl.under(base) & "**/kernel"), 1: tl.TrainAll()})
    copied = copy.deepcopy(policy)
    assert copied == policy
    assert tl.Trainer(model, copied, loss="mse").selection == tl.Trainer(model, policy, loss="mse").selection
