from dataclasses import dataclass

import keras
import pytest

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.base import is_declarative
from tapeloop.policies.resolve import chain, resolve
from tests.support import models
from tests.support.models import blocks


@pytest.fixture(scope="module")
def tree():
    return Tree.of(models.functional())


def groups(policy, tree):
    return {name: [v.path for v in variables] for name, variables in resolve(policy, tree).groups.items()}


ALL = tl.TrainAll()
HEAD = ["head/kernel", "head/bias"]
BASE = ["base/conv/kernel", "base/conv/bias", "base/bn/gamma", "base/bn/beta"]


@dataclass(frozen=True)
class Kernels(tl.VariablePolicy):
    def group(self, variable):
        return f"rank{len(variable.shape)}" if variable.name == "kernel" else None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (tl.TrainAll(), {"default": BASE + HEAD}),
        (tl.Freeze("base"), {"default": HEAD}),
        (tl.Freeze("base/conv", "head"), {"default": BASE[2:]}),
        (tl.TrainOnly("head"), {"default": HEAD}),
        (tl.TrainOnly("**/bias", tl.named("beta")), {"default": ["base/conv/bias", "base/bn/beta", "head/bias"]}),
        (tl.Groups({"h": "head", "b": "base"}), {"b": BASE, "h": HEAD}),
        (tl.Groups({"h": "head"}), {"h": HEAD}),
        (Kernels(), {"rank4": BASE[:1], "rank2": HEAD[:1]}),
    ],
)
def test_what_trains_and_every_variable_stands_in_exactly_one_place(policy, expected, tree):
    selection = resolve(policy, tree)
    assert groups(policy, tree) == expected
    places = [*selection.trained, *selection.frozen, *selection.non_trainable]
    assert sorted(v.path for v in places) == sorted(v.path for v in tree.variables)


def inference(policy, model):
    return [submodel.path for submodel in resolve(policy, Tree.of(model)).inference]


BASE_LAYERS = ["base", "base/conv", "base/bn", "base/drop", "base/flat"]


@pytest.mark.parametrize(
    ("policy", "make", "expected"),
    [
        (tl.TrainAll(), models.functional, []),
        (tl.Freeze("base"), models.functional, BASE_LAYERS),
        (tl.Freeze("base"), lambda: models.built(models.Subclassed()), BASE_LAYERS),
        (tl.Freeze("base/conv"), models.functional, ["base/conv"]),  # Dropout follows the base, which trains in part
    ],
)
def test_a_submodel_of_which_nothing_trains_runs_in_inference_mode_with_all_in_it(policy, make, expected):
    assert inference(policy, make()) == expected


def test_a_batch_normalization_without_scale_and_offset_follows_what_is_around_it():
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((2,)), layers.BatchNormalization(center=False, scale=False, name="bn"), layers.Dense(1, name="d")]
    )
    assert inference(tl.TrainAll(), model) == []
    nested = keras.Sequential([keras.Input((2,)), model, layers.Dense(1, name="head")])
    assert inference(tl.Freeze(model), nested) == [model.name, f"{model.name}/bn", f"{model.name}/d"]


def test_what_keras_holds_non_trainable_is_never_asked_about_and_runs_in_inference_mode():
    model = models.functional()
    model.get_layer("base").trainable = False
    selection = resolve(tl.TrainAll(), Tree.of(model))
    assert groups(tl.TrainAll(), Tree.of(model)) == {"default": HEAD}
    assert "base/bn" in inference(tl.TrainAll(), model)
    rules = {variable.path: rule for variable, rule in selection.rules.items()}
    assert rules["base/conv/kernel"] == "Keras: base.trainable=False"
    assert rules["base/drop/seed_generator/state"] == "Keras: seed state"
    assert rules["head/kernel"] == "TrainAll"


def test_a_policy_can_choose_the_mode_itself():
    class FrozenStatistics(tl.VariablePolicy):
        def group(self, variable):
            return "all"

        def inference(self, submodel, trained):
            return isinstance(submodel.object, keras.layers.BatchNormalization)

    assert inference(FrozenStatistics(), models.functional()) == ["base/bn"]


def test_a_layer_shared_by_a_frozen_and_a_trained_submodel_follows_both():
    drop = keras.layers.Dropout(0.5)
    model = {
        "frozen": keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), drop]),
        "trained": keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), drop]),
    }
    assert "frozen/dropout" not in inference(tl.Freeze("frozen"), model)


def test_selections_are_equal_when_the_same_trains_however_it_was_said(tree):
    model = models.functional()
    first = resolve(tl.Freeze("base"), Tree.of(model))
    second = resolve(tl.TrainOnly(tl.of_type(keras.layers.Dense)), Tree.of(model))
    assert first == second
    assert hash(first) == hash(second)
    assert first != resolve(tl.TrainAll(), Tree.of(model))
    assert first != resolve(tl.Groups({"other": "head"}), Tree.of(model))
    assert first != resolve(tl.Freeze("base"), tree)
    assert first != "base"


def test_a_selection_says_how_much_trains(tree):
    assert resolve(tl.Freeze("base"), tree).describe() == (
        "default: 2 variables, 195 parameters; frozen: 4 variables, 48 parameters; "
        "non-trainable: 3 variables, 10 parameters"
    )
    assert repr(resolve(tl.Freeze("base"), tree)).startswith("<Selection: default: 2 variables")


def test_policies_are_values_that_read_as_written():
    assert tl.Freeze("a", tl.named("b")) == tl.Freeze("a", tl.named("b"))
    assert len({tl.Freeze("a"), tl.Freeze("a"), tl.TrainOnly("a")}) == 2
    assert repr(tl.Freeze("a")) == "Freeze(glob('a'))"
    assert repr(tl.TrainOnly("a")) == "TrainOnly(glob('a'))"
    assert repr(tl.Groups({"h": "a"})) == "Groups({'h': glob('a')})"
    assert repr(tl.TrainAll()) == "TrainAll()"


class Says(tl.VariablePolicy):
    def __init__(self, answer):
        self.answer = answer

    def group(self, variable):
        return self.answer


class Uneven(tl.VariablePolicy):
    def group(self, variable):
        return "all"

    def multiplier(self, variable):
        return 1.0 if variable.name == "bias" else 2.0


@pytest.mark.parametrize(
    ("make", "policy", "text"),
    [
        (models.functional, lambda: tl.Freeze("backbone/**"),
         r"glob\('backbone/\*\*'\) in Freeze.* matches no variable of the model. The model has `base`, `head`"),
        (models.functional, lambda: tl.Freeze("bse/conv"), r"The nearest paths are `base/conv`"),
        (models.functional, lambda: tl.TrainOnly("**/kernle"), r"The nearest paths are .*`base/conv/kernel`"),
        (models.functional, lambda: tl.Freeze(keras.layers.Dense(1, name="other")), r"under\(<Dense other>\)"),
        (models.functional, lambda: tl.Freeze("**"),
         r"Freeze\(glob\('\*\*'\)\) leaves nothing to train: it freezes all 6 variables \(`base/conv/kernel`"),
        (models.functional, lambda: Says(None), r"leaves nothing to train"),
        (models.functional, lambda: tl.Groups({"a": "base", "b": "**/bias"}),
         r"`base/conv/bias` is in 2 groups: .*narrow one of them"),
        (models.tied, lambda: tl.Groups({"a": "embed", "b": "out"}),
         r"tied weight `embed/embeddings` = `out` is in 2 groups"),
        (models.functional, lambda: tl.TrainOnly("**/moving_mean"),
         r"matches only variables that Keras holds non-trainable: `base/bn/moving_mean`. Set `trainable = True`"),
        (models.functional, lambda: Says(3), r"`Says.group` must return the name of a group, or None.*Received: 3"),
        (models.functional, lambda: Says(""), r"Received: '' for the variable `base/conv/kernel`"),
        (lambda: keras.layers.Dropout(0.5), lambda: tl.TrainOnly("a"), r"matches no variable of the model"),
        (lambda: keras.layers.Flatten(), lambda: tl.TrainAll(), r"the model has no variables. Pass a model with"),
        (models.functional, lambda: tl.TrainOnly(~tl.glob("bsae")), r"glob\('bsae'\) in .* matches no variable of the"),
        (models.functional, lambda: tl.Freeze(tl.glob("base") | "haed"), r"glob\('haed'\) in .* matches no variable"),
        (models.functional, lambda: tl.Freeze(["base", "haed"]), r"glob\('haed'\) in .* matches no variable"),
        (blocks, lambda: chain(tl.RandomSubset(9, of="block*", every=1), tl.Progress())[-1],
         r"asked for 9 submodels of 'block\*', but the model has 4 that hold variables that can train. Ask for fewer"),
        (blocks, lambda: chain(tl.RandomSubset(2, of="block*", every=1, always="block[1-3]"), tl.Progress())[-1],
         r"asked for 2 submodels of 'block\*', but the model has 4 .* can train, 3 of them in `always`. Ask for fewer"),
        (blocks, lambda: chain(tl.RandomSubset(1, of="block*", every=1, always="haed"), tl.Progress())[-1],
         r"glob\('haed'\) in RandomSubset draw 0 \(always glob\('haed'\)\) matches no variable.*paths are `head`"),
        (blocks, lambda: tl.LayerwiseDecay(0.5, of="stage*"), r"found no submodel that holds variables"),
        (blocks, Uneven, r"`Uneven.multiplier` must return one number for each group"),
    ],
)  # fmt: skip
def test_what_cannot_be_resolved(make, policy, text):
    with pytest.raises(tl.PolicyError, match=text):
        resolve(policy(), Tree.of(make()))


def test_a_model_that_keras_holds_non_trainable_as_a_whole():
    model = models.functional()
    model.trainable = False
    with pytest.raises(tl.PolicyError, match="Keras holds every variable of the model non-trainable"):
        resolve(tl.TrainAll(), Tree.of(model))


def test_a_policy_without_group_says_what_to_write(tree):
    class Empty(tl.VariablePolicy):
        pass

    with pytest.raises(
        NotImplementedError, match=r"Empty must write `group\(self, variable\)`, or `at\(self, progress\)`"
    ):
        resolve(Empty(), tree)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: tl.Freeze(), TypeError, r"`Freeze` takes one or more filters. Received none"),
        (lambda: tl.TrainOnly(), TypeError, r"`TrainOnly` takes one or more filters"),
        (lambda: tl.Groups("head"), TypeError, r"`Groups` takes a mapping.*Received: 'head'"),
        (lambda: tl.Groups({}), TypeError, r"`Groups` takes a mapping"),
        (lambda: tl.Groups({"a": "a"}, multipliers={"b": 2.0}), tl.PolicyError, r"`multipliers` are for \['b'\]"),
        (lambda: tl.Phases({1: ALL}), tl.PolicyError,
         r"must say what trains from the start. The first phase is at epoch 1"),
        (lambda: tl.Phases({}), TypeError, r"`Phases` takes a mapping.*Received: \{\}"),
        (lambda: tl.Cycle(ALL), TypeError, r"`Cycle` takes a list of policies. Received: TrainAll\(\)"),
        (lambda: tl.RandomSubset(1, of="b*", every=2, seed=None), ValueError, "`seed` must be a whole number"),
        (lambda: tl.Phases({0.5: ALL}), ValueError, r"`phases` must be a whole number, 0 or more. Received: 0.5"),
        (lambda: tl.Phases({0: "a"}), TypeError, r"`Phases` takes policies, such as .* Received: 'a'"),
        (lambda: tl.Phases({0: ALL}, unit="batch"), ValueError, r"`unit` must be 'epoch' or 'step'. Received: 'batch'"),
        (lambda: tl.Cycle([]), tl.PolicyError, r"`Cycle` needs one or more policies"),
        (lambda: tl.Cycle([ALL, None]), TypeError, r"`Cycle` takes policies.*Received: None"),
        (lambda: tl.Cycle([ALL], every=0), ValueError, r"`every` must be a whole number, 1 or more. Received: 0"),
        (lambda: tl.GradualUnfreeze([]), tl.PolicyError, r"needs one or more stages"),
        (lambda: tl.GradualUnfreeze("head"), TypeError, r"takes a list of filters. Received: 'head'"),
        (lambda: tl.GradualUnfreeze(["a"], decay=0), ValueError, r"`decay` must be above 0 and at most 1. Received: 0"),
        (lambda: tl.GradualUnfreeze(["a"], decay=True), ValueError, r"`decay` must be .* Received: True"),
        (lambda: tl.RandomSubset(0, of="b", every=1), ValueError, r"`k` must be a whole number"),
        (lambda: tl.RandomSubset(1, of=3, every=1), TypeError, r"`of` must be a class of layers, or a path glob"),
        (lambda: tl.RandomSubset(1, of="b", every=1, always=3), TypeError, r"A filter must be .* Received: 3"),
        (lambda: tl.LayerwiseDecay(1.5, of="b"), ValueError, r"`rate` must be above 0 and at most 1. Received: 1.5"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_policy_is_declarative_unless_a_function_or_a_class_of_the_users_decides():
    layer = keras.layers.Dense(1)
    rules = (tl.Freeze("a", keras.layers.Dense), tl.TrainOnly(tl.last(2, of="dense"), layer, ~tl.named("bias")))
    plain = [
        *rules,
        tl.Groups({"one": "a", "two": tl.first(1, of=keras.layers.Dense)}),
        tl.Phases({0: rules[0], 2: rules[1]}),
    ]
    assert all(map(is_declarative, plain))

    class Own(tl.TrainAll):
        pass

    assert not any(
        map(is_declarative, [tl.Freeze(tl.matching(lambda variable: True)), Own(), tl.Phases({0: rules[0], 1: Own()})])
    )
