import keras
import numpy as np
import pytest

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import chain, resolve
from tests.support.blocks import blocks

A, B, C = tl.TrainOnly("a"), tl.TrainOnly("b"), tl.TrainOnly("c")


def over(policy, moments, unit="epoch"):
    """What holds at each of these epochs or steps."""
    return [chain(policy, tl.Progress(**{unit: moment}))[-1] for moment in moments]


def test_phases_hold_from_their_epoch_on():
    assert over(tl.Phases({3: B, 0: A, 5: C}), range(7)) == [A, A, A, B, B, C, C]
    assert tl.Phases({0: A, 3: B}).every is None


def test_phases_by_step_are_asked_where_one_may_begin():
    policy = tl.Phases({0: A, 60: B, 100: C}, unit="step")
    assert policy.every == 20
    assert over(policy, [0, 59, 60, 99, 100], "step") == [A, A, B, B, C]


def test_gradual_unfreezing_adds_a_stage_at_a_time():
    policy = tl.GradualUnfreeze(["a", "b", "c"], every=2)
    stages = [tl.TrainOnly("a"), tl.TrainOnly("a", "b"), tl.TrainOnly("a", "b", "c")]
    assert over(policy, range(7)) == [stages[min(epoch // 2, 2)] for epoch in range(7)]
    assert policy.every is None
    assert tl.GradualUnfreeze(["a", "b"], every=50, unit="step").every == 50


def test_a_cycle_goes_around():
    assert over(tl.Cycle([A, B, C], every=2), range(8), "step") == [A, A, B, B, C, C, A, A]
    assert tl.Cycle([A, B], every=100).every == 100
    assert tl.Cycle([A, B], unit="epoch").every is None


def test_policies_nest():
    policy = tl.Phases({0: A, 2: tl.Cycle([B, C], every=10)})
    assert [inner.every for inner in chain(policy, tl.Progress(20, 2))] == [None, 10, None]
    moments = [(0, 0), (10, 1), (20, 2), (30, 2)]
    assert [chain(policy, tl.Progress(step, epoch))[-1] for step, epoch in moments] == [A, A, B, C]


def test_a_random_subset_follows_from_seed_and_draw_alone():
    tree = Tree.of(blocks())

    def drawn(seed, step):
        policy = chain(tl.RandomSubset(2, of="block*", every=10, seed=seed), tl.Progress(step))[-1]
        return sorted({variable.path.split("/")[0] for variable in resolve(policy, tree).trained})

    assert all(len(drawn(0, step)) == 2 for step in range(0, 100, 10))
    assert drawn(0, 0) == drawn(0, 9)
    assert len({tuple(drawn(0, step)) for step in range(0, 200, 10)}) > 3
    assert [drawn(0, step) for step in range(0, 200, 10)] != [drawn(1, step) for step in range(0, 200, 10)]
    assert [drawn(3, step) for step in range(50)] == [drawn(3, step) for step in range(50)]


def test_layerwise_decay_by_hand():
    selection = resolve(tl.LayerwiseDecay(0.5, of="block*"), Tree.of(blocks(3)))
    expected = {"below": 1 / 16, "block0": 1 / 8, "block1": 1 / 4, "block2": 1 / 2, "above": 1}
    assert dict(selection.multipliers) == expected
    assert [v.path for v in selection.groups["below"]] == ["stem/kernel", "stem/bias"]
    assert [v.path for v in selection.groups["above"]] == ["head/kernel", "head/bias"]


def test_layerwise_decay_moves_each_depth_by_its_rate():
    model = blocks(2)
    before = {v.path: v.tf_variable.numpy() for v in Tree.of(model).variables}
    x = np.ones((8, 3), "float32")
    trainer = tl.Trainer(model, tl.LayerwiseDecay(0.5, of="block*"), loss="mse", optimizer=keras.optimizers.Adam(0.1))
    rates = {"below": 0.0125, "block0": 0.025, "block1": 0.05, "above": 0.1}
    assert dict(trainer.learning_rates) == pytest.approx(rates)
    trainer.fit([(x, 10 * np.ones((8, 1), "float32"))], progress="none")
    for variable in Tree.of(model).variables:
        moved = np.abs(variable.tf_variable.numpy() - before[variable.path]).max()
        layer = variable.path.split("/")[0]
        assert moved == pytest.approx(rates[{"stem": "below", "head": "above"}.get(layer, layer)], rel=1e-3)


def test_policies_are_values_that_read_as_written():
    for make, said in [
        (lambda: tl.Phases({0: A}), "Phases({0: TrainOnly(glob('a'))})"),
        (lambda: tl.Phases({0: A}, unit="step"), "Phases({0: TrainOnly(glob('a'))}, unit='step')"),
        (lambda: tl.GradualUnfreeze(["a"]), "GradualUnfreeze([glob('a')], every=1)"),
        (lambda: tl.Cycle([A], every=3), "Cycle([TrainOnly(glob('a'))], every=3)"),
        (lambda: tl.RandomSubset(1, of="b*", every=2), "RandomSubset(1, of='b*', every=2, seed=0)"),
        (lambda: tl.LayerwiseDecay(0.5, of=keras.layers.Dense), "LayerwiseDecay(0.5, of=Dense)"),
    ]:
        assert repr(make()) == said
        assert make() == make()
        assert hash(make()) == hash(make())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: tl.Phases({1: A}), tl.PolicyError,
         r"must say what trains from the start. The first phase is at epoch 1"),
        (lambda: tl.Phases({}), TypeError, r"`Phases` takes a mapping.*Received: \{\}"),
        (lambda: tl.Phases({0.5: A}), ValueError, r"`phases` must be a whole number, 0 or more. Received: 0.5"),
        (lambda: tl.Phases({0: "a"}), TypeError, r"`Phases` takes policies, such as .* Received: 'a'"),
        (lambda: tl.Phases({0: A}, unit="batch"), ValueError, r"`unit` must be 'epoch' or 'step'. Received: 'batch'"),
        (lambda: tl.Cycle([]), tl.PolicyError, r"`Cycle` needs one or more policies"),
        (lambda: tl.Cycle([A, None]), TypeError, r"`Cycle` takes policies.*Received: None"),
        (lambda: tl.Cycle([A], every=0), ValueError, r"`every` must be a whole number, 1 or more. Received: 0"),
        (lambda: tl.GradualUnfreeze([]), tl.PolicyError, r"needs one or more stages"),
        (lambda: tl.GradualUnfreeze("head"), TypeError, r"takes a list of filters. Received: 'head'"),
        (lambda: tl.RandomSubset(0, of="b", every=1), ValueError, r"`k` must be a whole number"),
        (lambda: tl.RandomSubset(1, of=3, every=1), TypeError, r"`of` must be a class of layers, or a path glob"),
        (lambda: tl.LayerwiseDecay(1.5, of="b"), ValueError, r"`rate` must be above 0 and at most 1. Received: 1.5"),
        (lambda: tl.Groups({"a": "a"}, multipliers={"b": 2.0}), tl.PolicyError, r"`multipliers` are for \['b'\]"),
    ],
)  # fmt: skip
def test_wrong_uses(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_what_cannot_be_drawn_or_counted():
    tree = Tree.of(blocks())
    with pytest.raises(tl.PolicyError, match=r"asked for 9 submodels of 'block\*', but the model has 4"):
        resolve(chain(tl.RandomSubset(9, of="block*", every=1), tl.Progress())[-1], tree)
    with pytest.raises(tl.PolicyError, match=r"found no submodel that holds variables"):
        resolve(tl.LayerwiseDecay(0.5, of="stage*"), tree)


def test_an_at_must_return_a_policy_that_settles():
    class Nothing(tl.VariablePolicy):
        def at(self, progress):
            return None

    class Restless(tl.VariablePolicy):
        def at(self, progress):
            return Restless()

    with pytest.raises(tl.PolicyError, match=r"`Nothing.at` must return a policy.*Received: None at step 7, epoch 0"):
        chain(Nothing(), tl.Progress(7))
    with pytest.raises(tl.PolicyError, match=r"does not settle"):
        chain(Restless(), tl.Progress())


def test_a_multiplier_is_one_number_for_a_group():
    class Uneven(tl.VariablePolicy):
        def group(self, variable):
            return "all"

        def multiplier(self, variable):
            return 1.0 if variable.name == "bias" else 2.0

    with pytest.raises(tl.PolicyError, match=r"`Uneven.multiplier` must return one number for each group"):
        resolve(Uneven(), Tree.of(blocks()))
