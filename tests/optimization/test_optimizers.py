import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.policies.resolve import resolve
from tests.support import models
from tests.support.compare import assert_close, assert_same
from tests.support.fitting import X, Y, fit, mlp


def ones(selection):
    return [(tf.ones(variable.shape), variable) for variable in selection.trained]


@pytest.fixture
def tree():
    return Tree.of(models.functional())


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),  # of the 64x3 kernel of the head: slots of 4 bytes a number
    [("sgd", 0), ("lion", 4 * 192), ("adam", 2 * 4 * 192), ("adafactor", 4 * 192 + 4 * 64 + 4 * 3)],
)
def test_each_variable_is_charged_for_its_own_state(optimizer, state_bytes, tree):
    optimizers = Optimizers(optimizer)
    optimizers.prepare(resolve(tl.Freeze("base"), tree))
    by_path = {variable.path: optimizers.state_bytes(variable) for variable in tree.variables}
    assert by_path["head/kernel"] == state_bytes
    assert by_path["base/conv/kernel"] == 0


NAMES = ["sgd", "adam", "adamw", "adafactor", "lion", "nadam", "ftrl", "rmsprop", "adamax", "lamb"]


@pytest.mark.parametrize("name", [*NAMES, *(["muon"] if hasattr(keras.optimizers, "Muon") else [])])
def test_every_optimizer_of_keras_can_be_cloned_and_no_state_is_left_out(name, tree):
    optimizers = Optimizers(name)
    optimizers.prepare(resolve(tl.Groups({"h": "head", "b": "base"}), tree))
    assert len(optimizers.cohorts) == 2
    for cohort in optimizers.cohorts:
        counted = {id(slot) for slots in cohort.slots.values() for slot in slots}
        assert {slot.name.removesuffix("_1") for slot in cohort.optimizer.variables if id(slot) not in counted} <= {
            "iteration", "learning_rate", "variable",  # the last is Nadam's momentum schedule
        }  # fmt: skip


def test_one_optimizer_for_each_group(tree):
    selection = resolve(tl.Groups({"h": "head", "b": "base"}), tree)
    optimizers = Optimizers({"h": keras.optimizers.SGD(1.0), "b": keras.optimizers.SGD(0.5)})
    optimizers.prepare(selection)
    before = {variable: variable.tf_variable.numpy() for variable in selection.trained}
    optimizers.apply(selection, ones(selection))
    for variable, group in selection.group_of.items():
        moved = before[variable] - variable.tf_variable.numpy()
        np.testing.assert_allclose(moved, 1.0 if group == "h" else 0.5, rtol=1e-6)


def test_who_joins_later_starts_its_own_count_and_who_stays_keeps_its_state(tree):
    optimizers = Optimizers(keras.optimizers.Adam(0.1))
    head, everything = resolve(tl.Freeze("base"), tree), resolve(tl.TrainAll(), tree)
    optimizers.prepare(head)
    for _ in range(3):
        optimizers.apply(head, ones(head))
    slots = {number: [slot.numpy() for slot in s] for number, s in optimizers.cohorts[0].slots.items()}
    optimizers.prepare(everything)
    for number, of_variable in optimizers.cohorts[0].slots.items():
        assert_same(list(of_variable), slots[number])
    before = tree.variables[0].tf_variable.numpy()
    optimizers.apply(everything, ones(everything))
    np.testing.assert_allclose(before - tree.variables[0].tf_variable.numpy(), 0.1, rtol=1e-4)
    assert [int(cohort.optimizer.iterations) for cohort in optimizers.cohorts] == [4, 1]
    optimizers.prepare(head)
    assert len(optimizers.cohorts) == 2


def test_the_optimizers_must_be_for_the_groups(tree):
    optimizers = Optimizers({"head": "adam", "neck": "adam"})
    text = r"The groups are \['backbone', 'head'\], the optimizers are for \['head', 'neck'\]"
    with pytest.raises(tl.PolicyError, match=text):
        optimizers.prepare(resolve(tl.Groups({"head": "head", "backbone": "base"}), tree))
    assert not optimizers.cohorts


class Lookahead(keras.optimizers.SGD):
    """Reads its step count after the update has moved it."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for variable in trainable_variables:
            variable.assign(keras.ops.where(self.iterations % 3 == 0, variable * 0.5, variable))


class Twice(keras.optimizers.Adam):
    """Makes two updates in one."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        super().apply(grads, trainable_variables)


@pytest.mark.parametrize("optimizer", [Lookahead(0.1), Twice(0.01)], ids=["counts after", "twice"])
@pytest.mark.parametrize("eagerly", [False, True])
def test_the_step_count_is_read_anew_once_it_has_moved(optimizer, eagerly):
    x, y = np.concatenate([X] * 5), np.concatenate([Y] * 5)
    mine, theirs = mlp("hidden", "head"), mlp("hidden", "head")
    theirs.compile(type(optimizer).from_config(optimizer.get_config()), "mse", run_eagerly=eagerly)
    theirs.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    tl.Trainer(mine, loss="mse", optimizer=optimizer, run_eagerly=eagerly).fit((x, y), batch_size=4, shuffle=False)
    assert_close(mine, theirs, atol=1e-6)


def test_the_step_count_is_read_once_an_update():
    """What Adam computes of it, two powers, stands in the graph once and not for each of four variables."""
    reads = []

    class Noting(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            reads.append(self.iterations.value.value().ref())
            super().update_step(gradient, variable, learning_rate)

    fit(mlp("hidden", "head"), steps=1, optimizer=Noting())
    assert len(reads) == 4
    assert len(set(reads)) == 1
