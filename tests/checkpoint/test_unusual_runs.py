"""Runs that are out of the common, and go on all the same."""

import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import resolve
from tests.support import runs

layers = keras.layers


class Projected(tl.Trainer):
    """Projects the targets by a layer that is built in its first call, and keeps a variable of any shape."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.projector = layers.Dense(3, name="projector")
        self.last = tf.Variable(np.zeros((1, 1), "float32"), shape=tf.TensorShape(None), trainable=False)

    def compute_loss(self, batch, training):
        self.last.assign(batch[1])
        targets = keras.ops.stop_gradient(self.projector(batch[1]))
        return keras.ops.mean((self.forward(batch[0], training=training) - targets) ** 2)


class Inner(tl.VariablePolicy):
    """A policy of the user's that does not say how it is written."""

    def group(self, variable):
        return "all"


class Outer(Inner):
    """One that holds another, and shows it as Python shows objects."""

    def __init__(self):
        self.inner = Inner()

    def __repr__(self):
        return f"Outer({object.__repr__(self.inner)})"


def stopped_and_resumed(run, folder, *, stop=7):
    """The digests of a run that was stopped in its second epoch and went on, and of one that nothing has stopped."""
    with runs.interrupted_at(stop):
        run.fit(2, folder)
    return runs.digest(run.fit(2, folder)), runs.digest(run.fit(2))


def test_metrics_go_on_in_the_middle_of_an_epoch_also_if_steps_run_eagerly(tmp_path):
    run = runs.Run(runs.made(metrics=["mae"], run_eagerly=True))
    resumed, expected = stopped_and_resumed(run, tmp_path)
    assert resumed["history"] == expected["history"]
    assert resumed == expected


def test_metrics_of_a_step_that_cannot_be_traced_cover_the_rest_of_the_epoch_and_that_is_said(tmp_path, caplog):
    class Printed(tl.Trainer):
        def compute_loss(self, batch, training):
            assert batch[0].numpy().any()  # what no trace allows
            return super().compute_loss(batch, training)

    run = runs.Run(runs.made(kind=Printed, metrics=["mae"], run_eagerly=True))
    resumed, expected = stopped_and_resumed(run, tmp_path)
    assert {name for name in resumed if resumed[name] != expected[name]} == {"history"}
    assert (
        "The step cannot be traced (AttributeError: 'SymbolicTensor' object has no attribute 'numpy'): its"
        in caplog.text
    )
    assert "its metrics cover the rest of this epoch alone." in caplog.text


def test_layers_and_variables_of_the_trainer_go_on_that_are_made_in_the_first_step(tmp_path):
    resumed, expected = stopped_and_resumed(runs.Run(runs.made(kind=Projected, loss=None)), tmp_path)
    assert "attribute/projector/kernel" in resumed
    assert resumed == expected


def test_a_policy_within_a_policy_is_the_same_in_the_next_process(tmp_path, caplog):
    resumed, expected = stopped_and_resumed(runs.Run(runs.made(Outer)), tmp_path)
    assert resumed == expected
    assert "The policy is" not in caplog.text


def test_what_trained_in_former_phases_is_read_when_somebody_looks(tmp_path, monkeypatch):
    run = runs.RUNS["random"]
    phases = run.fit(3).history.phases
    run.fit(3).save(tmp_path / "run")
    resolved = []
    monkeypatch.setattr(
        "tapeloop.checkpoint.contents.resolve", lambda *args, **options: resolved.append(1) or resolve(*args, **options)
    )
    trainer = run.trainer()
    trainer.load(tmp_path / "run")
    trainer.save(tmp_path / "again")
    assert resolved == []
    assert [phase.selection.describe() for phase in trainer.history.phases] == [p.selection.describe() for p in phases]
    assert len(resolved) == len({phase.recorded for phase in phases}) > 1


@pytest.mark.slow
def test_two_trainers_in_turn_each_save_themselves(tmp_path):
    one, other = runs.RUNS["plain"], runs.RUNS["groups"]
    for epochs in (1, 2):
        trainers = one.fit(epochs, tmp_path / "one"), other.fit(epochs, tmp_path / "other")
    assert runs.digest(trainers[0]) == runs.uninterrupted("plain", 2)
    assert runs.digest(trainers[1]) == runs.uninterrupted("groups", 2)


def test_ragged_arrays_go_on_at_their_place(tmp_path):
    ragged = tf.RaggedTensor.from_row_lengths(np.arange(50, dtype="float32"), np.arange(20) % 4 + 1)

    def network():
        given = keras.Input((4,))
        return keras.Model(given, layers.Dense(3, name="head")(given))

    class Padded(tl.Trainer):
        def forward(self, inputs, training=False):
            return super().forward(inputs.to_tensor(shape=(None, 4)), training=training)

    run = runs.Run(runs.made(kind=Padded, network=network), lambda: (ragged, runs.Y))
    resumed, expected = stopped_and_resumed(run, tmp_path)
    assert resumed == expected


def test_a_checkpoint_is_saved_again_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    trainer = runs.RUNS["plain"].trainer()
    for _ in range(3):
        runs.RUNS["plain"].trainer().save(tmp_path / "run")
    trainer.load(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["disk", "run", "run"]


def test_a_log_that_is_not_a_number_is_never_the_best(tmp_path):
    checkpoints = tl.Checkpoints(tmp_path, keep_best="loss", every_epochs=None)
    run = runs.Run(runs.made(nonfinite="ignore"), lambda: (runs.X, np.full_like(runs.Y, np.nan)))
    run.fit(2, checkpoints)
    assert checkpoints.best is None
    assert Tree.of(run.trainer().model).variables  # the run went on to its end


class Ends(keras.callbacks.Callback):
    """Ends the program by Ctrl-C after so many of its batches."""

    def __init__(self, after):
        super().__init__()
        self.after, self.seen, self.begun = after, 0, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.begun += 1

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("after", [5, 6])  # in the middle of the second epoch, and at its end
def test_the_hook_of_an_epoch_that_goes_on_counts_once(after, tmp_path):
    def program(directory, after=None):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="head")])
        trainer = tl.Trainer(model, loss="mse", optimizer=keras.optimizers.SGD(0.1), seed=0)
        halves = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        ends = Ends(after)
        x, y = np.ones((12, 4), "float32"), np.ones((12, 2), "float32")
        options = {"batch_size": 4, "callbacks": [halves, ends], "checkpoint": directory, "verbose": 0}
        history = trainer.fit(x, y, epochs=3, **options).history
        return history, ends.begun

    expected = program(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        program(tmp_path / "other", after)
    assert program(tmp_path / "other") == expected
