"""Policies that change, on whole fits: traces, cohorts, learning rates, logs, flags."""

import functools
import gc
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import inspect, models
from tests.support.fitting import X, Y, fit, mlp, moved, refused
from tests.support.models import trainer_of

HEAD, ALL = tl.Freeze("base"), tl.TrainAll()


def test_a_phase_change_inside_a_fit_costs_one_trace_and_a_return_none():
    trainer = trainer_of(policy=tl.Phases({0: HEAD, 2: ALL, 3: HEAD}))
    for epochs, traces, base_moves in ((2, 1, False), (1, 2, True), (2, 2, False)):
        fit = functools.partial(trainer.fit, models.images(16), batch_size=8, epochs=epochs, verbose=0)
        assert bool(moved(trainer.model, fit, "base")) == base_moves
        assert trainer.trace_count == traces
    phases = trainer.history.phases
    assert [(phase.step, phase.epoch, phase.policy) for phase in phases] == [(0, 0, HEAD), (4, 2, ALL), (6, 3, HEAD)]
    assert phases[0].selection == phases[2].selection


def test_a_thousand_alternations_make_two_traces_and_keep_memory_flat():
    trainer = fit(mlp("base", "head"), tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base")]), steps=100)
    gc.collect()
    kept = len(gc.get_objects())
    trainer.fit([(X, Y)] * 900, verbose=0)
    gc.collect()
    assert trainer.step == 1000
    assert trainer.trace_count == 2
    assert len(gc.get_objects()) - kept < 9000  # the history keeps a phase for each alternation, and nothing else grows


def test_lora_before_and_after_the_trainer_is_made():
    for early in (True, False):
        model = models.blocks(1)
        dense = model.get_layer("block0")
        if early:
            dense.enable_lora(2)
        trainer = tl.Trainer(model, tl.TrainOnly("block0/lora*" if early else "block0"), loss="mse", optimizer="sgd")
        if not early:
            dense.enable_lora(2)
        trainer.policy = tl.TrainOnly("block0/lora_kernel_*")
        x = np.ones((4, 3), "float32")
        found = moved(trainer.model, lambda: trainer.fit([(x, 9 * x[:, :1])] * 3, verbose=0))  # noqa: B023
        selection = trainer.selection
        assert found == {v.path for v in selection.trained}
        assert {v.name for v in selection.trained} == {"lora_kernel_a", "lora_kernel_b"}
        assert [selection.rules[v] for v in selection.non_trainable] == ["Keras: non-trainable"]


class Box:
    def __init__(self, content):
        self.content = content


class Hides(keras.layers.Layer):
    """Multiplies by a variable of TensorFlow, or has a layer in a plain object; neither does Keras track."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.dense = hidden, keras.layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(self.hidden.content(x) if isinstance(self.hidden, Box) else x * self.hidden)


@pytest.mark.parametrize(
    ("hidden", "count", "name"),
    [
        (lambda: tf.Variable([1.0], name="hidden_scale"), 1, "hidden_scale"),
        (lambda: Box(keras.layers.Dense(4)), 2, "hides/bias"),
    ],
)
def test_variables_that_the_model_does_not_track_are_named_in_a_warning(hidden, count, name):
    model = keras.Sequential([Hides(hidden())])
    model(X)
    with pytest.warns(UserWarning, match=rf"uses {count} variables that the model does not track, such as `.*{name}"):
        fit(model)


@pytest.mark.parametrize(
    ("policy", "options", "text"),
    [
        (tl.Cycle([HEAD, tl.Freeze("**")], every=100), {}, r"Freeze\(glob\('\*\*'\)\) leaves nothing to train"),
        (tl.Phases({0: HEAD, 5: tl.Cycle([ALL, tl.TrainOnly("haed")])}), {}, r"glob\('haed'\) .* matches no variable"),
        (tl.GradualUnfreeze(["head", "bsae"]), {}, r"glob\('bsae'\) .* matches no variable"),
        (
            tl.Phases({0: tl.Groups({"h": "head"}), 1: tl.Groups({"h": "head", "b": "base"})}),
            {"optimizer": {"h": "sgd"}},
            r"The groups are \['b', 'h'\], the optimizers are for \['h'\]",
        ),
    ],
)
def test_a_phase_that_cannot_hold_is_found_before_anything_has_moved(policy, options, text):
    trainer = trainer_of(policy=policy, **options)
    with refused(trainer, tl.PolicyError, text):
        trainer.fit(models.images(8), epochs=9, verbose=0)


def test_groups_that_come_later_may_have_their_optimizers_from_the_start():
    policy = tl.Phases({0: tl.Groups({"h": "head"}), 1: tl.Groups({"h": "head", "b": "base"})})
    trainer = trainer_of(policy=policy, optimizer={"h": "sgd", "b": "adam"})
    trainer.fit(models.images(8), epochs=2, verbose=0)
    assert [cohort.groups for cohort in inspect.cohorts(trainer)] == [("h",), ("b",)]


class ByName(tl.VariablePolicy):
    def group(self, variable):
        return "g" if variable.path.split("/")[0] in self.names else None


@dataclass
class Unfrozen(ByName):
    """Has no hash at all."""

    names: list


@dataclass(frozen=True)
class Frozen(ByName):
    """Has a hash that comes to grief at its list."""

    names: list


@pytest.mark.parametrize("kind", [Unfrozen, Frozen])
def test_a_policy_that_cannot_be_hashed_serves_too(kind):
    trainer = trainer_of(policy=tl.Phases({0: kind(["head"]), 1: kind(["base"])}))
    phases = trainer.fit([models.images(8)] * 2, epochs=2, verbose=0).phases
    assert [len(phase.selection.trained) for phase in phases] == [2, 4]
    assert trainer.trace_count == 2


def test_a_filter_of_the_users_is_asked_anew_and_a_flag_that_is_set_within_an_epoch_counts_from_the_next():
    frozen = {"base"}
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="base"), keras.layers.Dense(2, name="head")]
    )
    trainer = tl.Trainer(model, tl.Freeze(tl.matching(lambda v: v.path.split("/")[0] in frozen)), loss="mse")
    assert len(trainer.selection.trained) == 2
    frozen.add("nothing")
    frozen.remove("base")
    frozen.add("head")
    assert [v.path for v in trainer.selection.trained] == ["base/kernel", "base/bias"]

    lifted = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: (setattr(model.get_layer("base"), "trainable", False), trainer.selection)
    )
    trainer.policy = tl.Cycle([tl.TrainAll(), tl.TrainOnly("head")], every=1)
    trainer.fit([(np.ones((2, 4)), np.ones((2, 2)))] * 4, callbacks=[lifted], epochs=2, verbose=0)
    # In the second epoch both select the head: nothing new begins.
    assert [len(phase.selection.trained) for phase in trainer.history.phases] == [4, 2, 4, 2]
    assert len(trainer.selection.trained) == 2
