import keras
import numpy as np
import pytest

import tapeloop as tl
from tapeloop.model.tree import Tree
from tests.support import models

SGD, ADAM = keras.optimizers.SGD, keras.optimizers.Adam


def lines(trainer):
    """The lines of the repr of a trainer, by name; the first under ''."""
    first, *rest = repr(trainer).removesuffix(">").splitlines()
    return {"": first, **{line[:12].strip(" :"): line[12:].strip() for line in rest}}


def blocks(policy=None, model=None, **options):
    return tl.Trainer(model or models.blocks(2), policy, loss="mse", **options)


DATA = np.ones((8, 3)), np.ones((8, 1))


def test_a_trainer_says_what_it_trains_in_a_few_lines():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(3, name="stem"), keras.layers.Dense(1, name="head")], name="net"
    )
    trainer = blocks(tl.Freeze("stem"), model, optimizer=SGD(0.5))
    assert repr(trainer) == (
        "<Trainer of Sequential 'net', 16 parameters\n"
        "  policy:    Freeze(glob('stem'))\n"
        "  trains:    4 parameters (25.0%), by group: default 4\n"
        "  optimizer: SGD(0.5)\n"
        "  trained:   0 steps, 0 epochs>"
    )
    trainer.fit(DATA, batch_size=4, verbose=0)
    assert lines(trainer)["trained"] == "2 steps, 1 epoch"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": {"a": SGD(0.5), "b": "adam"}}, "SGD(0.5) for `a`, Adam(0.0001) for `b`"),
        ({"optimizer": SGD(0.5)}, "SGD(0.5) for `a`, SGD(0.05) for `b`"),
        ({"optimizer": SGD(keras.optimizers.schedules.CosineDecay(0.1, 10))}, "SGD(schedule)"),
        ({"optimizer": {"a": SGD(0.5)}}, "SGD(0.5) for `a`, none for `b`"),
    ],
)
def test_optimizers_are_named_with_the_rates_of_groups(options, said):
    trainer = blocks(tl.Groups({"a": "head", "b": "stem"}, multipliers={"b": 0.1}), **options)
    assert lines(trainer)["trains"] == "16 parameters (40.0%), by group: b 12, a 4"
    assert sorted(lines(trainer)["optimizer"].split(", ")) == sorted(said.split(", "))


def test_a_rate_that_was_set_is_said():
    trainer = blocks(tl.Groups({"a": "head"}), optimizer="adam")
    trainer.learning_rates["a"] = 0.25
    assert lines(trainer)["optimizer"] == "Adam(0.25)"


def test_many_groups_are_counted():
    said = lines(blocks(tl.LayerwiseDecay(0.8, of=keras.layers.Dense), models.blocks(12)))
    assert said["trains"].endswith("block5 12 and 8 more")


class Alternating(tl.VariablePolicy):
    """Answers otherwise each time that it is asked."""

    def __init__(self):
        self.asked = 0

    def at(self, progress):
        self.asked += 1
        return tl.TrainOnly("head" if self.asked % 2 else "stem")


@pytest.mark.parametrize("around", [lambda policy: policy, lambda policy: tl.Phases({0: policy})])
def test_a_policy_that_keeps_state_is_not_asked(around):
    own = Alternating()
    assert lines(blocks(around(own)))["trains"] == "not known before the policy is asked, by the next step"
    assert own.asked == 0


def test_what_a_policy_has_answered_is_said_and_asked_no_more():
    own = Alternating()
    trainer = blocks(own)
    trainer.fit(DATA, verbose=0)
    assert lines(trainer)["trains"] == "4 parameters (10.0%), by group: default 4"
    assert own.asked == 1
    trainer.fit(DATA, verbose=0)
    assert lines(trainer)["trains"] == "12 parameters (30.0%), by group: default 12"
    assert own.asked == 2


def test_a_schedule_says_what_trains_next():
    trainer = blocks(tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainAll()}))
    assert lines(trainer)["trains"].startswith("4 parameters")
    trainer.state.epoch = 1
    assert lines(trainer)["trains"].startswith("40 parameters")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_inside_a_step_it_says_what_trains_and_reads_nothing(run_eagerly):
    seen = []

    def loss(targets, outputs):
        seen.append(lines(trainer))
        return keras.losses.mean_squared_error(targets, outputs)

    policy = tl.Phases({0: tl.TrainOnly("head")})
    trainer = tl.Trainer(models.blocks(1), policy, loss=loss, optimizer=SGD(0.5), run_eagerly=run_eagerly)
    trainer.fit(DATA, verbose=0)
    assert seen[0]["trains"].startswith("4 parameters")
    assert (seen[0]["optimizer"], seen[0]["trained"]) == ("SGD(0.5)", "0 steps, 0 epochs")


def test_a_model_that_is_not_built_says_so():
    said = lines(tl.Trainer(models.Subclassed(), tl.Freeze("base"), loss="mse"))
    assert said["trains"] == "not known before the model is built, by its first call"
    assert said[""] == "<Trainer of Subclassed 'subclassed', 60 parameters"


def test_a_policy_that_cannot_be_resolved_says_why():
    said = lines(blocks(tl.Freeze("heda")))["trains"]
    assert said.startswith(
        "nothing, since glob('heda') in Freeze(glob('heda')) matches no variable of the model. The nea"
    )
    assert said.endswith("...")


class Broken(tl.VariablePolicy):
    def at(self, progress):
        raise OSError("no disk")

    def __hash__(self):
        return 1

    def __repr__(self):
        raise KeyError("name")


def test_what_cannot_be_told_does_not_keep_the_rest_from_being_told():
    said = lines(blocks(Broken(), optimizer=SGD(0.5)))
    assert said["policy"] == "cannot be told: KeyError: 'name'"
    assert said["trains"] == "cannot be told: OSError: no disk"
    assert said["optimizer"] == "SGD(0.5)"


class Half(tl.Trainer):
    def __init__(self, seen):
        seen.append(repr(self))


def test_a_trainer_that_is_half_made_says_so():
    seen = []
    Half(seen)
    assert seen == ["<Half, not initialised>"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.Module, "Module, 254 parameters"),
        (lambda: {"one": models.blocks(1), "two": models.blocks(1)}, "2 models: one, two, 56 parameters"),
    ],
)
def test_models_of_all_kinds_are_named(model, name):
    assert lines(tl.Trainer(model(), loss="mse"))[""] == f"<Trainer of {name}"


def test_it_is_read_anew_only_if_the_model_or_the_policy_has_changed(monkeypatch):
    trainer = blocks(tl.Freeze("stem"), models.blocks(40))
    first = lines(trainer)["trains"]
    with monkeypatch.context() as within:
        within.setattr(Tree, "of", None)  # nobody goes through the model
        assert lines(trainer)["trains"] == first
        assert trainer.selection is trainer.selection
    trainer.model.get_layer("head").trainable = False
    assert lines(trainer)["trains"] != first
    trainer.model.get_layer("head").trainable = True
    trainer.policy = tl.Freeze("block*")
    assert lines(trainer)["trains"] == "16 parameters (3.2%), by group: default 16"


def test_a_table_makes_no_state_and_shows_what_will_be():
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
    data = np.ones((8, 4)), np.ones((8, 2))
    trainer = tl.Trainer(keras.models.clone_model(model), loss="mse", optimizer="adam")
    before = str(trainer.explain())
    assert trainer.state.variables == []
    trainer.fit(*data, verbose=0)
    assert str(trainer.explain()) == before
    other = tl.Trainer(model, loss="mse", optimizer="adam")
    other.explain()
    other.policy = tl.Freeze("base")
    other.fit(*data, verbose=0)
    slots = [variable.path for cohort in other.state.optimizers.cohorts for variable in cohort.slots]
    assert slots == ["head/kernel", "head/bias"]  # what has never trained has no state
