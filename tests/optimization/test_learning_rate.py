"""Learning rates by group: numbers, schedules and multipliers, read and set."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop._backend.patching import noting_assignments
from tapeloop.model.tree import raw
from tapeloop.optimization.learning_rate import Rate
from tests.support import models
from tests.support.models import trainer_of


def test_learning_rates_are_read_and_set_before_and_after_a_fit_without_a_trace():
    policy = tl.Groups({"h": "head", "b": "base"}, multipliers={"b": 0.1})
    trainer = trainer_of(policy=policy, optimizer=keras.optimizers.SGD(0.5))
    assert dict(trainer.learning_rates) == pytest.approx({"b": 0.05, "h": 0.5})
    trainer.learning_rates["b"] = 0.25
    trainer.fit([models.images(8)], verbose=0)
    trainer.learning_rates["h"] = 0.0
    trainer.fit([models.images(8)], verbose=0)
    assert dict(trainer.learning_rates) == {"b": 0.25, "h": 0.0}
    assert trainer.trace_count == 1
    assert repr(trainer.learning_rates).startswith("{'b': 0.25")
    assert len(trainer.learning_rates) == 2
    with pytest.raises(tl.PolicyError, match=r"There is no group 'x': the groups are \['b', 'h'\]"):
        trainer.learning_rates["x"] = 1.0


def test_schedules_count_from_the_step_at_which_a_cohort_began():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [1.0, 0.5])
    both = tl.Groups({"h": "head", "b": "base"}, multipliers={"b": 0.5})
    policy = tl.Phases({0: tl.Groups({"h": "head"}), 1: both})
    trainer = trainer_of(policy=policy, optimizer=keras.optimizers.SGD(schedule))
    trainer.fit([models.images(8)] * 5, verbose=0)
    assert trainer.learning_rates["h"] == 0.5
    trainer.fit([models.images(8)] * 1, verbose=0)
    assert dict(trainer.learning_rates) == {"b": 0.5, "h": 0.5}
    with pytest.raises(TypeError, match=r"of the group 'h' follows a schedule, and cannot be set to 1.0"):
        trainer.learning_rates["h"] = 1.0


@pytest.mark.parametrize("rate", [1.0, keras.optimizers.schedules.ExponentialDecay(1.0, 1, 1.0)])
def test_learning_rates_are_those_of_the_phase_that_is_due(rate):
    slow, slower = (tl.Groups({"h": "head"}, multipliers={"h": factor}) for factor in (0.5, 0.25))
    trainer = trainer_of(policy=tl.Phases({0: slow, 1: slower}), optimizer=keras.optimizers.SGD(rate))
    assert trainer.learning_rates["h"] == 0.5
    trainer.fit([models.images(8)], verbose=0)
    assert trainer.learning_rates["h"] == 0.25
    trainer.policy = slow
    assert trainer.learning_rates["h"] == 0.5


def test_a_rate_is_set_unless_it_is_that_number_already():
    optimizer = keras.optimizers.SGD(0.1)
    rate, kept = Rate(optimizer, lambda: 0.1), raw(optimizer.learning_rate)
    assigned = []
    with noting_assignments([kept], lambda variable: assigned.append(float(variable))):
        for setting in (0.1, 0.2, 0.2, 1, 1.0, tf.constant(1.0)):
            rate.assign(setting)
            assert float(kept) == np.float32(setting)
    assert assigned == [np.float32(0.1), np.float32(0.2), 1.0]  # what it was; a tensor may be one of a graph
