import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.policies.resolve import resolve
from tests.support import models


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


NAMES = ["adam", "adamw", "adafactor", "lion", "nadam", "ftrl", "rmsprop", "adamax"]


@pytest.mark.parametrize("name", [*NAMES, *(["muon"] if hasattr(keras.optimizers, "Muon") else [])])
def test_no_state_is_left_out(name, tree):
    optimizers = Optimizers(name)
    optimizers.prepare(resolve(tl.TrainAll(), tree))
    (cohort,) = optimizers.cohorts
    counted = {id(slot) for slots in cohort.slots.values() for slot in slots}
    assert {slot.name for slot in cohort.optimizer.variables if id(slot) not in counted} <= {
        "iteration", "learning_rate", "variable",  # the last is Nadam's momentum schedule
    }  # fmt: skip


def test_the_first_cohort_has_the_very_optimizer_and_the_next_a_clone(tree):
    template = keras.optimizers.SGD(0.5, momentum=0.25)
    optimizers = Optimizers(template)
    optimizers.prepare(resolve(tl.Groups({"h": "head", "b": "base"}), tree))
    first, second = (cohort.optimizer for cohort in optimizers.cohorts)
    assert first is template
    assert second is not template
    assert (float(second.learning_rate), second.momentum) == (0.5, 0.25)


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
    slots = [slot.numpy() for slots in optimizers.cohorts[0].slots.values() for slot in slots]
    optimizers.prepare(everything)
    assert [slot.numpy().tolist() for s in optimizers.cohorts[0].slots.values() for slot in s] == [
        slot.tolist() for slot in slots
    ]
    before = tree.variables[0].tf_variable.numpy()
    optimizers.apply(everything, ones(everything))
    np.testing.assert_allclose(before - tree.variables[0].tf_variable.numpy(), 0.1, rtol=1e-4)
    assert [int(cohort.optimizer.iterations) for cohort in optimizers.cohorts] == [4, 1]
    optimizers.prepare(head)
    assert len(optimizers.cohorts) == 2


def test_the_optimizers_must_be_for_the_groups(tree):
    optimizers = Optimizers({"head": "adam", "neck": "adam"})
    with pytest.raises(
        tl.PolicyError, match=r"The groups are \['backbone', 'head'\], the optimizers are for \['head', 'neck'\]"
    ):
        optimizers.prepare(resolve(tl.Groups({"head": "head", "backbone": "base"}), tree))
    assert not optimizers.cohorts


@pytest.mark.parametrize("optimizer", [3, None, {"head": 3}, keras.optimizers.Adam])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(TypeError, match=r"`optimizer` must be a Keras optimizer, its name, or a mapping"):
        Optimizers(optimizer)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "must not scale the loss"),
        (keras.optimizers.SGD(0.1, loss_scale_factor=2.0), "must not scale the loss"),
        (keras.optimizers.SGD(0.1, use_ema=True), "must not have `use_ema=True`"),
        (keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "must not accumulate gradients"),
    ],
)
def test_what_would_act_behind_the_groups_back_is_refused(optimizer, text):
    with pytest.raises(TypeError, match=text):
        Optimizers(optimizer)


def test_weight_decay_touches_nothing_frozen(tree):
    optimizers = Optimizers(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    selection = resolve(tl.Freeze("base"), tree)
    optimizers.prepare(selection)
    before = {variable.path: variable.tf_variable.numpy().tobytes() for variable in selection.frozen}
    optimizers.apply(selection, ones(selection))
    assert {variable.path: variable.tf_variable.numpy().tobytes() for variable in selection.frozen} == before


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


@pytest.mark.parametrize(
    "optimizer",
    [Lookahead(0.1), Twice(0.01)],
    ids=["counts after", "twice"],
)
@pytest.mark.parametrize("eagerly", [False, True])
def test_the_step_count_is_read_anew_once_it_has_moved(optimizer, eagerly):
    x, y = np.random.default_rng(0).normal(size=(40, 3)).astype("float32"), np.ones((40, 1), "float32")
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        models.append(keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)]))
    tl.Trainer(models[0], loss="mse", optimizer=optimizer, run_eagerly=eagerly).fit((x, y), batch_size=4, shuffle=False)
    models[1].compile(type(optimizer).from_config(optimizer.get_config()), "mse", run_eagerly=eagerly)
    models[1].fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for ours, theirs in zip(models[0].get_weights(), models[1].get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_step_count_is_read_once_an_update():
    """What Adam computes of it, two powers, stands in the graph once and not for each of four variables."""
    reads = []
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])

    class Noting(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            reads.append(self.iterations.value.value().ref())
            super().update_step(gradient, variable, learning_rate)

    tl.Trainer(model, loss="mse", optimizer=Noting()).fit((np.ones((4, 3)), np.ones((4, 1))))
    assert len(reads) == 4
    assert len(set(reads)) == 1
