"""What is tried, in which order, and what is picked: functions of what was found."""

import keras
import pytest

import tapeloop as tl
from tapeloop.tuning import candidates
from tapeloop.tuning.candidates import OPTIONS, facts_of
from tests.support import tuned
from tests.support.tuned import facts

Row = tl.TuningRow
NOW, XLA, FOLD, ONE, HALF, REMAT = (
    {},
    {"jit_compile": True},
    {"fold_frozen": False},
    {"steps_per_call": 1},
    {"frozen_dtype": "bfloat16"},
    {"remat": "blocks/*"},
)


@pytest.mark.parametrize(
    ("found", "for_speed", "shown"),
    [
        ({}, [XLA], [ONE]),
        ({"is_frozen": True, "folds": True, "can_lower": True}, [XLA, FOLD], [ONE, HALF]),
        ({"is_frozen": True}, [XLA, {"fold_frozen": True}], [ONE]),
        ({"uses_xla": True, "on_gpu": True}, [{"jit_compile": False}], [ONE]),
        ({"steps_per_call": 4, "blocks": "blocks/*"}, [XLA, {"steps_per_call": "auto"}], [REMAT]),
        ({"frozen_dtype": "bfloat16"}, [XLA, {"frozen_dtype": None}], [ONE]),
        ({"remats": True, "blocks": "blocks/*"}, [XLA], [ONE, {"remat": None}]),
    ],
)
def test_what_is_in_force_is_not_tried_again(found, for_speed, shown):
    assert candidates.candidates(facts(**found), OPTIONS, lower_precision=False) == (for_speed, shown)


def test_only_what_was_asked_for_is_tried_and_lower_precision_for_speed_if_it_may_be_picked():
    found = facts(is_frozen=True, can_lower=True, blocks="blocks/*")
    asked = ("frozen_dtype", "jit_compile")
    assert candidates.candidates(found, asked, lower_precision=True) == ([XLA, HALF], [])
    assert candidates.candidates(found, asked, lower_precision=False) == ([XLA], [HALF])


PICKED = {
    "the faster": ([Row(NOW, 10.0), Row(XLA, 7.0)], XLA),
    "none that gains too little": ([Row(NOW, 10.0), Row(XLA, 9.8)], {}),
    "none that is slower": ([Row(NOW, 10.0), Row(XLA, 14.0)], {}),
    "none that computes something else": ([Row(NOW, 10.0), Row(XLA, 7.0, differs=True)], {}),
    "none that was stopped": ([Row(NOW, 10.0), Row(XLA, failure="stopped after 9 s")], {}),
    "none that ran out of memory": ([Row(NOW, 10.0), Row(XLA, failure="out of memory")], {}),
    "none of lower precision": ([Row(NOW, 10.0), Row(HALF, 5.0)], {}),
    "none of one step a call": ([Row(NOW, 10.0), Row(ONE, 9.0)], {}),
    "none that saves memory for time": ([Row(NOW, 10.0), Row(REMAT, 5.0)], {}),
    "both together": ([Row(NOW, 10.0), Row(XLA, 7.0), Row(FOLD, 9.0), Row(XLA | FOLD, 6.0)], XLA | FOLD),
    "one, if both together are slower": ([Row(NOW, 10.0), Row(XLA, 7.0), Row(FOLD, 9.0), Row(XLA | FOLD, 7.5)], XLA),
    "what fits, if the trainer does not": ([Row(NOW, failure="out of memory"), Row(XLA, 7.0), Row(REMAT, 5.0)], XLA),
    "what saves memory, if nothing else fits": ([Row(NOW, failure="out of memory"), Row(REMAT, 15.0)], REMAT),
    "nothing, if nothing was measured": ([Row(NOW, failure="out of memory"), Row(XLA, failure="ValueError: no")], {}),
}


@pytest.mark.parametrize("name", PICKED)
def test_it_picks(name):
    rows, expected = PICKED[name]
    assert candidates.picked(rows, lower_precision=False) == expected


def test_lower_precision_is_picked_only_if_it_may_be():
    rows = [Row(NOW, 10.0), Row(XLA, 7.0), Row(HALF, 5.0)]
    assert candidates.picked(rows, lower_precision=True) == HALF
    assert candidates.joined(rows, lower_precision=True) == XLA | HALF
    assert candidates.joined(rows, lower_precision=False) is None


@pytest.mark.parametrize(
    ("losses", "options", "draws", "differs"),
    [
        ((1.0, 0.5), XLA, False, False),
        ((1.0009, 0.5), XLA, False, False),
        ((1.002, 0.5), XLA, False, True),
        ((1.0, 0.504), XLA, False, False),  # rounding grows with each update
        ((1.0, 0.51), XLA, False, True),
        ((1.05, 0.46), HALF, False, False),
        ((1.15, 0.5), HALF, False, True),
        ((1.1, 0.45), XLA, True, False),
        ((1.3, 0.5), XLA, True, True),
        ((float("nan"), 0.5), XLA, False, True),
        ((), XLA, False, False),
    ],
)
def test_losses_that_differ_by_more_than_rounding_are_noticed(losses, options, draws, differs):
    assert candidates.differs(losses, (1.0, 0.5), options, draws) is differs


def facts_about(trainer):
    return facts_of(trainer._contents.loop, trainer.selection)


def test_the_facts_of_a_trainer():
    assert facts_about(tl.Trainer(tuned.mlp(), loss="mse", fold_frozen=True)) == facts()
    found = facts_about(tl.Trainer(tuned.mlp(keras.layers.Dropout(0.5)), tl.Freeze("base"), jit_compile=True))
    assert found == facts(uses_xla=True, folds=True, is_frozen=True, can_lower=True, draws=True)
    found = facts_about(tl.Trainer(tuned.mlp(), tl.Freeze("base"), frozen_dtype="bfloat16", remat="base"))
    assert (found.frozen_dtype, found.remats) == ("bfloat16", True)


def test_blocks_are_layers_of_one_class_that_hold_layers():
    x = inputs = keras.Input((5, 8))
    for number in range(3):
        x = keras.layers.MultiHeadAttention(2, 4, name=f"attention_{number}")(x, x)
        x = keras.layers.Dense(8)(x)
    model = keras.Model(inputs, x)
    assert facts_about(tl.Trainer(model, loss="mse")).blocks == "attention_*"
    model.get_layer("attention_1").name = "middle"
    assert facts_about(tl.Trainer(model, loss="mse")).blocks == ("attention_0", "middle", "attention_2")
