"""A fit that is tried out: every phase traced on one batch, and nothing moved."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop._backend.traced_graph import peak_bytes
from tests.support import models
from tests.support.fitting import X, Y, mlp

STAGES = ["c", "b", "a"]


def test_each_phase_is_reported_and_nothing_moves():
    trainer = tl.Trainer(mlp("a", "b", "c"), tl.GradualUnfreeze(STAGES), loss="mse", metrics=["mae"])
    before = models.values(trainer.model)
    found = trainer.fit(X, Y, batch_size=4, epochs=3, dry_run=True)
    assert [len(phase.selection.trained) for phase in found.phases] == [2, 4, 6]
    assert [phase.traces for phase in found.phases] == [1, 1, 1]
    assert [phase.gradient_bytes for phase in found.phases] == [60, 140, 220]
    assert [phase.state_bytes for phase in found.phases] == [120, 280, 440]  # two moments of Adam
    assert {phase.weight_bytes for phase in found.phases} == {220}
    held = [phase.step_bytes for phase in found.phases]
    assert 0 < held[0] < held[1] < held[2]
    assert models.values(trainer.model) == before
    assert (trainer.step, trainer.epoch, trainer.trace_count, trainer.history.phases) == (0, 0, 0, [])
    assert trainer.state.variables == []
    assert not trainer.state.optimizers.cohorts


def test_the_state_that_is_foretold_is_the_state_that_comes():
    for optimizer in (
        "sgd",
        "adam",
        "adafactor",
        keras.optimizers.SGD(momentum=0.9),
        keras.optimizers.Adam(amsgrad=True),
    ):
        trainer = tl.Trainer(mlp("a", "b"), tl.TrainOnly("b"), loss="mse", optimizer=optimizer)
        (phase,) = trainer.fit(X, Y, dry_run=True).phases
        trainer.fit(X, Y, verbose=0)
        held = sum(map(trainer.state.optimizers.state_bytes, trainer.selection.trained))
        assert phase.state_bytes == held


def test_what_gets_no_gradient_is_named_phase_by_phase():
    class Cut(tl.Trainer):
        def forward(self, inputs, training):
            inner = keras.ops.stop_gradient(self.model.get_layer("a")(inputs))
            return self.model.get_layer("b")(inner)

    trainer = Cut(mlp("a", "b"), tl.Cycle([tl.TrainOnly("b"), tl.TrainOnly("a"), tl.TrainOnly("b")]), loss="mse")
    found = trainer.fit(X, Y, epochs=2, dry_run=True)
    assert [phase.disconnected is None for phase in found.phases] == [True, False, True]
    assert [phase.traces for phase in found.phases] == [1, 1, 0]
    assert "`a/kernel`, `a/bias`: on the way to the loss is a `stop_gradient`" in repr(found)
    assert "8 in a batch" in repr(found)
    assert trainer.fit(X, Y, verbose=0).epoch == [1]


def test_a_model_that_is_not_built_and_a_dataset_are_taken():
    model = keras.Sequential([keras.layers.Dense(4, name="a"), keras.layers.Dense(3, name="b")])
    (phase,) = tl.Trainer(model, loss="mse").fit([(X, Y)], dry_run=True).phases
    assert phase.weight_bytes == 140


def test_an_iterator_is_not_drawn_from():
    data = iter([(X, Y)])
    with pytest.raises(tl.DataError, match="`dry_run` would take a batch from an iterator"):
        tl.Trainer(mlp("a"), loss="mse").fit(data, dry_run=True)
    assert len(list(data)) == 1


def test_a_step_holds_what_is_still_to_be_taken():
    @tf.function(autograph=False)
    def compute(x, y):
        hidden = tf.nn.relu(tf.matmul(x, y))  # 4 KiB, in place
        wide = tf.concat([hidden, hidden], 1)  # 8 KiB, and `hidden` is taken later
        narrow = tf.reshape(tf.reduce_sum(wide, 1, keepdims=True), [32])  # 128 bytes, and `wide` goes
        return tf.matmul(hidden, hidden) + narrow  # 4 KiB more

    function = compute.get_concrete_function(*[tf.TensorSpec([32, 32])] * 2)
    assert peak_bytes(function) == 4096 + 8192 + 128


def test_activations_grow_with_the_batch_and_the_depth_that_trains():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu", name=f"d{n}") for n in range(8)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    x = np.zeros((1024, 64), "float32")

    def held(policy, batch_size):
        (phase,) = tl.Trainer(model, policy, loss="mse").fit(x, x, batch_size=batch_size, dry_run=True).phases
        return phase.step_bytes

    assert held(tl.TrainAll(), 1024) == pytest.approx(2 * held(tl.TrainAll(), 512), rel=0.1)
    assert held(tl.TrainOnly("d7"), 1024) < 0.6 * held(tl.TrainAll(), 1024)


def test_a_policy_that_counts_is_as_if_nobody_had_asked_it():
    class Counts(tl.VariablePolicy):
        def __init__(self):
            self.asked = 0

        def at(self, progress):
            self.asked += 1
            return tl.TrainOnly("b")

    trainer = tl.Trainer(mlp("a", "b"), Counts(), loss="mse")
    assert len(trainer.fit(X, Y, dry_run=True).phases) == 1
    assert trainer.policy.asked == 0
    trainer.fit(X, Y, verbose=0)
    assert trainer.policy.asked == 1
