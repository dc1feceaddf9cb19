"""Policies that change, on whole fits: traces, cohorts, learning rates, logs, flags."""

import gc
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import inspect, models
from tests.support.blocks import blocks
from tests.support.models import trainer_of

HEAD, ALL = tl.Freeze("base"), tl.TrainAll()


def test_a_phase_change_inside_a_fit_costs_one_trace_and_a_return_none():
    trainer = trainer_of(policy=tl.Phases({0: HEAD, 2: ALL, 3: HEAD}))
    model = trainer.model
    history = trainer.fit(models.images(16), batch_size=8, epochs=2, progress="none")
    assert trainer.trace_count == 1
    before = models.values(model, "base")
    history = trainer.fit(models.images(16), batch_size=8, epochs=1, progress="none")
    assert trainer.trace_count == 2
    assert models.values(model, "base") != before
    before = models.values(model, "base")
    history = trainer.fit(models.images(16), batch_size=8, epochs=2, progress="none")
    assert trainer.trace_count == 2
    assert models.values(model, "base") == before
    assert [(phase.step, phase.epoch) for phase in history.phases] == [(6, 3)]


def test_phases_are_in_the_history():
    trainer = trainer_of(policy=tl.Cycle([HEAD, ALL], every=3))
    history = trainer.fit(models.images(16), batch_size=2, epochs=1, progress="none")
    assert [(phase.step, phase.epoch, phase.policy) for phase in history.phases] == [
        (0, 0, HEAD),
        (3, 0, ALL),
        (6, 0, HEAD),
    ]
    assert history.phases[0].selection == history.phases[2].selection


def test_a_thousand_alternations_make_two_traces_and_keep_memory_flat():
    x = np.ones((2, 3), "float32")
    trainer = tl.Trainer(
        blocks(1), tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("block0")]), loss="mse", optimizer="adam"
    )
    trainer.fit([(x, x[:, :1])] * 100, progress="none")
    gc.collect()
    kept = len(gc.get_objects())
    trainer.fit([(x, x[:, :1])] * 900, progress="none")
    gc.collect()
    assert trainer.step == 1000
    assert trainer.trace_count == 2
    assert len(gc.get_objects()) - kept < 9000  # the history keeps a phase for each alternation, and nothing else grows


def test_who_joins_after_a_thousand_steps_first_moves_by_the_learning_rate():
    model = models.functional()
    trainer = trainer_of(model, tl.Phases({0: HEAD, 1000: ALL}, unit="step"), optimizer=keras.optimizers.Adam(0.01))
    data = tf.data.Dataset.from_tensors(models.images(8)).repeat(1000)
    trainer.fit(data, progress="none")
    before = model.get_layer("base").get_weights()[0]
    trainer.fit(data.take(1), progress="none")
    assert np.abs(model.get_layer("base").get_weights()[0] - before).max() <= 1.001 * 0.01


def test_momentum_of_what_stays_is_carried_over_bit_by_bit():
    one, two = (models.functional() for _ in range(2))
    for model in (one, two):
        model.get_layer("base").get_layer("drop").rate = 0.0
    two.set_weights(one.get_weights())
    data = [models.images(8)] * 5
    changing = trainer_of(one, tl.Phases({0: HEAD, 1: tl.TrainOnly("head", "base/bn")}), optimizer="adam")
    changing.fit(data, progress="none")
    state = [slot.numpy() for slot in inspect.slots(changing)]
    inspect.start_phase(changing)
    for slot, kept in zip(inspect.slots(changing), state):
        np.testing.assert_array_equal(slot.numpy(), kept)
    assert len(inspect.cohorts(changing)) == 2
    assert not any(inspect.optimizer_state_bytes(changing, v) for v in changing.selection.frozen)


@dataclass(frozen=True)
class UnfreezeWhenLow(tl.VariablePolicy):
    """Unfreezes once the logs say so; `seen` is what `at` was asked with."""

    seen: list = None

    def at(self, progress):
        self.seen.append((progress.step, progress.epoch, dict(progress.logs)))
        return ALL if progress.logs.get("val_loss", np.inf) < np.inf else HEAD

    def __hash__(self):
        return id(self)


def test_a_policy_sees_the_last_logs_and_is_asked_at_every_epochs_start():
    seen = []
    trainer = trainer_of(policy=UnfreezeWhenLow(seen))
    history = trainer.fit(models.images(8), epochs=2, validation_data=models.images(8), progress="none")
    starts = [(step, epoch, sorted(logs)) for step, epoch, logs in seen]
    assert starts[0] == (0, 0, [])
    assert (1, 1, ["loss", "val_loss"]) in starts
    assert [phase.policy for phase in history.phases] == [HEAD, ALL]


def test_a_policy_with_state_of_its_own_is_asked_anew_each_time():
    class Moody(tl.VariablePolicy):
        every = 2
        asked = 0

        def at(self, progress):
            self.asked += 1
            return self

        def group(self, variable):
            return "all" if variable.path.startswith("head") or self.asked > 1 else None

    model = models.functional()
    trainer = trainer_of(model, Moody())
    history = trainer.fit([models.images(8)] * 4, progress="none")
    assert [phase.step for phase in history.phases] == [0, 2]


def test_lora_before_and_after_the_trainer_is_made():
    for early in (True, False):
        model = blocks(1)
        dense = model.get_layer("block0")
        if early:
            dense.enable_lora(2)
        trainer = tl.Trainer(model, tl.TrainOnly("block0/lora*" if early else "block0"), loss="mse", optimizer="sgd")
        dense.enable_lora(2) if not early else None
        trainer.policy = tl.TrainOnly("block0/lora_kernel_*")
        kernel = dense._kernel.numpy()
        x = np.ones((4, 3), "float32")
        trainer.fit([(x, 9 * x[:, :1])] * 3, progress="none")
        np.testing.assert_array_equal(dense._kernel.numpy(), kernel)
        selection = trainer.selection
        assert {v.name for v in selection.trained} == {"lora_kernel_a", "lora_kernel_b"}
        assert [selection.rules[v] for v in selection.non_trainable] == ["Keras: non-trainable"]


def test_a_flag_toggled_between_epochs_takes_effect_at_the_next():
    model = models.functional()

    class Toggling(tl.VariablePolicy):
        def at(self, progress):
            if progress.epoch == 1:
                model.get_layer("base").trainable = False
            return ALL

    trainer = trainer_of(model, Toggling())
    history = trainer.fit(models.images(8), epochs=2, progress="none")
    assert [len(phase.selection.trained) for phase in history.phases] == [6, 2]


def test_variables_that_the_model_does_not_track_are_named_in_a_warning():
    class Hides(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.raw = tf.Variable([1.0], name="hidden_scale")
            self.dense = keras.layers.Dense(1)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x * self.raw)

    model = keras.Sequential([keras.Input((3,)), Hides()])
    x = np.ones((4, 3), "float32")
    with pytest.warns(UserWarning, match=r"uses 1 variables that the model does not track, such as `hidden_scale:0`"):
        tl.Trainer(model, loss="mse").fit([(x, x[:, :1])], progress="none")


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
    before = models.values(trainer.model)
    with pytest.raises(tl.PolicyError, match=text):
        trainer.fit(models.images(8), epochs=9, progress="none")
    assert models.values(trainer.model) == before
    assert trainer.step == 0


def test_groups_that_come_later_may_have_their_optimizers_from_the_start():
    policy = tl.Phases({0: tl.Groups({"h": "head"}), 1: tl.Groups({"h": "head", "b": "base"})})
    trainer = trainer_of(policy=policy, optimizer={"h": "sgd", "b": "adam"})
    trainer.fit(models.images(8), epochs=2, progress="none")
    assert [cohort.template for cohort in inspect.cohorts(trainer)] == ["h", "b"]


def test_a_layer_in_a_plain_object_is_named_too():
    class Box:
        def __init__(self):
            self.layer = keras.layers.Dense(3)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.box, self.head = Box(), keras.layers.Dense(1)

        def call(self, x):
            return self.head(self.box.layer(x))

    net = Net()
    net(np.ones((2, 3), "float32"))
    with pytest.warns(UserWarning, match=r"uses 2 variables that the model does not track"):
        tl.Trainer(net, loss="mse").fit([(np.ones((4, 3), "float32"), np.ones((4, 1), "float32"))], progress="none")


def test_a_policy_that_cannot_be_hashed_serves_too():
    @dataclass
    class Plain(tl.VariablePolicy):
        name: str

        def group(self, variable):
            return self.name

    trainer = trainer_of(policy=Plain("all"))
    trainer.fit([models.images(8)] * 2, epochs=2, progress="none")
    assert trainer.trace_count == 1


@dataclass(frozen=True)
class WithList(tl.VariablePolicy):
    names: list

    def group(self, variable):
        return "g" if variable.path.split("/")[0] in self.names else None


def test_a_frozen_policy_with_a_list_in_it_serves_too():
    trainer = trainer_of(policy=tl.Phases({0: WithList(["head"]), 1: WithList(["base"])}))
    assert [len(phase.selection.trained) for phase in trainer.fit([models.images(8)], epochs=2).phases] == [2, 4]


def test_a_policy_that_first_returns_itself_may_have_optimizers_for_later():
    class Later(tl.VariablePolicy):
        def at(self, progress):
            return self if progress.epoch < 1 else tl.Groups({"g": "head", "h": "base"})

        def group(self, variable):
            return "g" if variable.path.startswith("head") else None

    trainer = trainer_of(policy=Later(), optimizer={"g": "sgd", "h": "adam"})
    assert len(trainer.fit([models.images(8)], epochs=2, progress="none").phases) == 2
