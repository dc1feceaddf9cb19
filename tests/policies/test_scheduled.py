import keras
import numpy as np
import pytest

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import chain, resolve
from tests.support.fitting import refused
from tests.support.models import blocks

ALL = tl.TrainAll()
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


def stages(model, epoch, decay=0.5):
    """The names and multipliers of the groups at an epoch, and the layers in each."""
    policy = tl.GradualUnfreeze(["head", "block1", "block*"], every=2, decay=decay)
    selection = resolve(chain(policy, tl.Progress(epoch=epoch))[-1], Tree.of(model))
    layers = {g: sorted({v.path.split("/")[0] for v in group}) for g, group in selection.groups.items()}
    return {group: (selection.multipliers[group], layers[group]) for group in sorted(layers)}


def test_stages_with_a_decay_are_groups_each_slower_than_the_one_before():
    model = blocks(3)
    head, top, rest = (1.0, ["head"]), (0.5, ["block1"]), (0.25, ["block0", "block2"])
    assert stages(model, 0) == {"stage0": head}
    assert stages(model, 2) == {"stage0": head, "stage1": top}
    # What a stage before has chosen, such as `block1`, stays there.
    assert stages(model, 4) == stages(model, 99) == {"stage0": head, "stage1": top, "stage2": rest}
    draw = chain(tl.GradualUnfreeze(["head", "block*"], decay=0.25), tl.Progress(epoch=1))[-1]
    rules = {v.path: rule for v, rule in resolve(draw, Tree.of(model)).rules.items()}
    assert rules["block0/kernel"] == "GradualUnfreeze: glob('block*') x0.25"
    assert rules["stem/kernel"] == "GradualUnfreeze: all else"


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


def draws(policy, tree, count=40):
    """What trains in each of some draws, by the layers' names."""
    drawn = [chain(policy, tl.Progress(step))[-1] for step in range(count)]
    return [{v.path.split("/")[0] for v in resolve(draw, tree).trained} for draw in drawn]


def test_what_trains_always_is_beside_every_draw_and_not_drawn_from():
    tree = Tree.of(blocks())
    found = draws(tl.RandomSubset(2, of=keras.layers.Dense, every=1, always=["head", "block3"]), tree)
    # Six layers, of which four are left to draw two from.
    assert all(len(trained) == 4 and {"head", "block3"} < trained for trained in found)
    assert len(set(map(frozenset, found))) == 6
    # A layer that is drawn from in part is drawn: of each the kernel is left.
    biases = resolve(chain(tl.RandomSubset(1, of="block*", every=1, always="**/bias"), tl.Progress())[-1], tree)
    assert [v.name for v in biases.trained].count("bias") == 6
    assert [v.name for v in biases.trained].count("kernel") == 1
    # Without it, and with what is not drawn from anyway, the draws are the same ones.
    plain = draws(tl.RandomSubset(2, of="block*", every=1), tree)
    beside = draws(tl.RandomSubset(2, of="block*", every=1, always="head"), tree)
    assert [trained | {"head"} for trained in plain] == beside


def test_a_draw_says_by_which_rule_a_variable_trains():
    draw = chain(tl.RandomSubset(1, of="block*", every=5, always="head"), tl.Progress(10))[-1]
    assert repr(draw) == "RandomSubset draw 2 (always glob('head'))"
    rules = {v.path: rule for v, rule in resolve(draw, Tree.of(blocks())).rules.items()}
    assert rules["head/kernel"] == "RandomSubset: always glob('head')"
    assert rules["stem/kernel"] == "RandomSubset draw 2"


def test_a_subset_that_cannot_be_drawn_is_found_before_its_phase_begins():
    trainer = tl.Trainer(
        blocks(), tl.Phases({0: ALL, 7: tl.RandomSubset(1, of="block*", every=1, always="haed")}), loss="mse"
    )
    with refused(trainer, tl.PolicyError, r"glob\('haed'\) in RandomSubset .* matches no variable.* are `head`"):
        trainer.fit([(np.ones((8, 3), "float32"), np.ones((8, 1), "float32"))], verbose=0)


def test_layerwise_decay_moves_each_depth_by_its_rate():
    model = blocks(2)
    before = {v.path: v.tf_variable.numpy() for v in Tree.of(model).variables}
    x = np.ones((8, 3), "float32")
    trainer = tl.Trainer(model, tl.LayerwiseDecay(0.5, of="block*"), loss="mse", optimizer=keras.optimizers.Adam(0.1))
    rates = {"below": 0.0125, "block0": 0.025, "block1": 0.05, "above": 0.1}
    assert dict(trainer.learning_rates) == pytest.approx(rates)
    trainer.fit([(x, 10 * np.ones((8, 1), "float32"))], verbose=0)
    for variable in Tree.of(model).variables:
        moved = np.abs(variable.tf_variable.numpy() - before[variable.path]).max()
        layer = variable.path.split("/")[0]
        assert moved == pytest.approx(rates[{"stem": "below", "head": "above"}.get(layer, layer)], rel=1e-3)


def test_policies_are_values_that_read_as_written():
    for make, said in [
        (lambda: tl.Phases({0: A}), "Phases({0: TrainOnly(glob('a'))})"),
        (lambda: tl.Phases({0: A}, unit="step"), "Phases({0: TrainOnly(glob('a'))}, unit='step')"),
        (lambda: tl.GradualUnfreeze(["a"]), "GradualUnfreeze([glob('a')], every=1)"),
        (lambda: tl.GradualUnfreeze(["a"], every=50, decay=1, unit="step"),
         "GradualUnfreeze([glob('a')], every=50, decay=1.0, unit='step')"),
        (lambda: tl.Cycle([A], every=3), "Cycle([TrainOnly(glob('a'))], every=3)"),
        (lambda: tl.RandomSubset(1, of="b*", every=2), "RandomSubset(1, of='b*', every=2, seed=0)"),
        (lambda: tl.RandomSubset(1, of="b*", every=2, always=["a", keras.layers.Dense], seed=3),
         "RandomSubset(1, of='b*', every=2, always=[glob('a'), of_type(Dense)], seed=3)"),
        (lambda: tl.LayerwiseDecay(0.5, of=keras.layers.Dense), "LayerwiseDecay(0.5, of=Dense)"),
    ]:  # fmt: skip
        assert repr(make()) == said
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make().get_state() == {}


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
