"""A fit that saves itself: when, and what a program finds that is run again."""

import os
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

import tapeloop as tl
from tapeloop.checkpoint.session import CheckpointSession
from tapeloop.checkpoint.store import CheckpointStore
from tests.support import runs
from tests.support.params import params

layers = keras.layers
PLAIN = runs.RUNS["plain"]


def steps_saved(folder):
    return [int(path.name.split("-")[2]) for path in sorted(folder.glob("0*-step-*"))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5, 10]),
        pytest.param({"every_epochs": 2}, [10], marks=pytest.mark.slow),
        ({"every_steps": 4, "every_epochs": None}, [4, 8, 10]),
        ({"every_steps": 5}, [5, 5, 10, 10]),  # within the epoch, and at its end
        ({"every_minutes": 1e-9, "every_epochs": None}, None),
        pytest.param({"every_epochs": None}, [10], marks=pytest.mark.slow),  # at the end in any case
    ],
)
def test_a_run_is_saved_when_the_user_says(tmp_path, options, expected):
    PLAIN.fit(2, tl.Checkpoints(tmp_path, keep=20, **options))
    found = steps_saved(tmp_path)
    assert found == expected if expected is not None else len(found) > 1


def test_a_run_that_is_over_trains_nothing_and_one_with_more_epochs_goes_on(tmp_path, caplog):
    trainer = PLAIN.fit(2, tmp_path)
    caplog.clear()
    again = PLAIN.fit(2, tmp_path)
    assert f"Resuming from {tmp_path / '000002-step-10'}: step 10, after 2 epochs. All 2 epochs of the" in caplog.text
    assert again.trace_count == 0
    assert runs.digest(again) == runs.digest(trainer)
    assert runs.digest(PLAIN.fit(3, tmp_path)) == runs.uninterrupted("plain", 3)


def test_a_second_fit_of_one_program_trains_its_own_epochs_and_so_it_does_when_run_again(tmp_path):
    def program(stop):
        trainer = PLAIN.trainer()
        with runs.interrupted_at(stop):
            trainer.fit((runs.X, runs.Y), batch_size=4, epochs=1, verbose=0, checkpoint=tmp_path)
            trainer.fit((runs.Y @ np.ones((3, 4)), runs.Y), batch_size=5, epochs=2, verbose=0, checkpoint=tmp_path)
        return trainer

    uninterrupted = PLAIN.trainer()
    uninterrupted.fit((runs.X, runs.Y), batch_size=4, epochs=1, verbose=0)
    uninterrupted.fit((runs.Y @ np.ones((3, 4)), runs.Y), batch_size=5, epochs=2, verbose=0)
    for stop in (3, 7, 10):
        program(stop)
    assert runs.digest(program(100)) == runs.digest(uninterrupted)


def test_an_epoch_at_whose_end_the_user_stops_may_be_the_best(tmp_path, monkeypatch):
    def stop(session, value):
        raise KeyboardInterrupt

    checkpoints = tl.Checkpoints(tmp_path, keep_best="loss")
    monkeypatch.setattr(CheckpointSession, "_is_best", stop)
    with pytest.raises(KeyboardInterrupt):
        PLAIN.fit(2, checkpoints)
    assert checkpoints.best == tmp_path / "000001-step-5"


@pytest.mark.parametrize("stop", params([7, 10], [10]))
def test_another_policy_goes_on_with_the_rest_of_the_epoch(tmp_path, stop, caplog):
    run = runs.Run(runs.made())
    with runs.interrupted_at(stop):
        run.fit(3, tmp_path)
    trainer = runs.Run(runs.made(lambda: tl.Freeze("base"))).fit(3, tmp_path)
    assert "The policy is Freeze(glob('base')), and was TrainAll() in the checkpoint." in caplog.text
    assert (trainer.step, trainer.epoch) == (15, 3)
    assert [phase.step for phase in trainer.history.phases] == [0, stop]


@pytest.mark.slow
def test_a_policy_that_is_set_between_two_fits_is_that_of_the_second(tmp_path):
    def program(stop):
        trainer = PLAIN.trainer()
        with runs.interrupted_at(stop):
            given = {"batch_size": 4, "verbose": 0, "checkpoint": tmp_path / str(stop == 100)}
            trainer.policy = tl.Freeze("base")
            trainer.fit((runs.X, runs.Y), **given)
            trainer.policy = tl.TrainAll()
            trainer.fit((runs.X, runs.Y), epochs=2, **given)
        return trainer

    uninterrupted = runs.digest(program(100))
    for stop in (3, 7):
        program(stop)
    resumed = PLAIN.trainer()
    given = {"batch_size": 4, "verbose": 0, "checkpoint": tmp_path / "False"}
    resumed.policy = tl.Freeze("base")
    resumed.fit((runs.X, runs.Y), **given)
    resumed.policy = tl.TrainAll()
    resumed.fit((runs.X, runs.Y), epochs=2, **given)
    assert runs.digest(resumed) == uninterrupted


def test_a_model_that_is_built_in_its_first_step_goes_on_within_an_epoch(tmp_path):
    def network():
        return keras.Sequential(
            [layers.Dense(6, name="base"), layers.Dropout(0.3, name="d"), layers.Dense(3, name="h")]
        )

    run = runs.Run(runs.made(network=network))
    for stop in (2, 8, 10):
        with runs.interrupted_at(stop):
            run.fit(3, tmp_path)
    assert runs.digest(run.fit(3, tmp_path)) == runs.digest(run.fit(3))


def test_what_a_program_does_between_two_fits_is_not_done_twice(tmp_path):
    def program(folder, stop=100):
        trainer = PLAIN.trainer()
        with runs.interrupted_at(stop):
            given = {"batch_size": 4, "verbose": 0, "checkpoint": folder}
            trainer.fit((runs.X, runs.Y), **given)
            trainer.learning_rates["default"] = trainer.learning_rates["default"] / 2
            kernel = trainer.model.get_layer("head").kernel
            kernel.assign(kernel + 1)
            trainer.fit((runs.X, runs.Y), epochs=2, **given)
        return runs.digest(trainer)

    for stop in (3, 7, 11):
        program(tmp_path / "stopped", stop)
    assert program(tmp_path / "stopped") == program(tmp_path / "whole")


def test_logs_of_an_earlier_phase_of_the_epoch_go_on(tmp_path):
    class Named(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            trains_head = "head/kernel" in [variable.path for variable in self.selection.trained]
            return {**logs, "of head" if trains_head else "of base": logs["loss"]}

    policy = lambda: tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base")], every=2)  # noqa: E731
    run = runs.Run(runs.made(policy, Named))
    with runs.interrupted_at(3):
        run.fit(1, tmp_path)
    assert runs.digest(run.fit(1, tmp_path)) == runs.digest(run.fit(1))


def test_a_history_holds_the_whole_fit_after_it_was_stopped(tmp_path):
    with runs.interrupted_at(7):
        PLAIN.fit(3, tmp_path)
    trainer = PLAIN.trainer()
    given = {"batch_size": 4, "verbose": 0, "validation_data": (runs.X[:8], runs.Y[:8])}
    history = trainer.fit((runs.X, runs.Y), epochs=3, checkpoint=tmp_path, **given)
    expected = PLAIN.trainer().fit((runs.X, runs.Y), epochs=3, **given)
    assert (history.epoch, history.step, history.history) == (expected.epoch, expected.step, expected.history)
    assert [phase.step for phase in history.phases] == [phase.step for phase in expected.phases]


@pytest.mark.parametrize("stop", params([7, 12], [7]))
def test_the_history_of_a_second_fit_says_what_trained_from_its_start(tmp_path, stop):
    def program(folder, stop=100):
        trainer, given = PLAIN.trainer(), {"batch_size": 4, "verbose": 0, "checkpoint": folder}
        with runs.interrupted_at(stop):
            trainer.fit((runs.X, runs.Y), **given)
            return trainer.fit((runs.X, runs.Y), epochs=2, **given)

    program(tmp_path / "stopped", stop)
    resumed, expected = program(tmp_path / "stopped"), program(tmp_path / "whole")
    assert (resumed.epoch, resumed.step) == (expected.epoch, expected.step)
    phases = [[(phase.step, phase.epoch) for phase in history.phases] for history in (resumed, expected)]
    assert phases[0] == phases[1] == [(5, 1)]


def test_a_run_goes_on_by_hand_too(tmp_path):
    with runs.interrupted_at(7):
        PLAIN.fit(3, tmp_path)
    trainer = PLAIN.trainer()
    trainer.load(tmp_path)
    assert (trainer.step, trainer.epoch) == (7, 1)
    trainer.fit(PLAIN.data(), epochs=2, batch_size=4, verbose=0, validation_data=(runs.X[:8], runs.Y[:8]))
    assert runs.digest(trainer) == runs.uninterrupted("plain", 3)


@pytest.mark.slow
def test_a_trainer_goes_back_to_an_earlier_phase_and_on_again(tmp_path):
    gradual = runs.RUNS["gradual"]
    trainer = gradual.fit(3, tl.Checkpoints(tmp_path, keep=9))
    trainer.load(tmp_path / "000001-step-5")
    assert (trainer.epoch, len(trainer.state.optimizers.cohorts)) == (1, 1)
    trainer.fit(gradual.data(), epochs=2, batch_size=4, verbose=0, validation_data=(runs.X[:8], runs.Y[:8]))
    assert runs.digest(trainer) == runs.uninterrupted("gradual", 3)


def test_resuming_costs_one_trace_and_no_batch_again(tmp_path):
    class Told(runs.Batches):
        asked = []

        def __getitem__(self, number):
            self.asked.append(number)
            return super().__getitem__(number)

    run = runs.Run(PLAIN.trainer, Told, {"shuffle": False})
    with runs.interrupted_at(13):
        run.fit(3, tmp_path)
    Told.asked.clear()
    assert run.fit(3, tmp_path).trace_count == 1
    # Batches are made ahead; those before the place are not.
    assert Told.asked == [3, 4]


SCRIPT = """
import sys, threading, time, os, signal
import tensorflow as tf
import tapeloop as tl
from tests.support import runs

run, where, folder = runs.RUNS["cached" if sys.argv[1] == "features" else "plain"], sys.argv[1], sys.argv[2]

class Slow:
    # Data that takes long where the signal shall come: the second time that it is gone through.
    passes = 0

    def __iter__(self):
        self.passes += 1
        for number in range(50):
            if self.passes == 2:
                print("slow", flush=True)
                time.sleep(1)
            yield runs.X[:4], runs.Y[:4]

trainer = run.trainer()
slow = {"validation_data": Slow()} if where == "validation" else {}
data = Slow() if where == "features" else (runs.X, runs.Y)
trainer.fit(data, epochs=2, batch_size=4, verbose=0, checkpoint=folder, **{**run.options, **slow})
"""


@pytest.mark.parametrize(
    ("ending", "where"),
    [
        (signal.SIGTERM, "validation"),
        pytest.param(signal.SIGINT, "features", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "features", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "validation", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_an_evaluation_and_the_making_of_features(tmp_path, where, ending):
    command = [sys.executable, "-c", SCRIPT, where, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "slow\n", process.stderr.read()
        began = time.monotonic()
        os.kill(process.pid, ending)
        said = process.communicate(timeout=60)[1]
        took = time.monotonic() - began
    assert process.returncode == (128 + ending if ending == signal.SIGTERM else -ending), said
    assert took < 25  # of the 50 s that the data takes
    steps = 10 if where == "validation" else 0
    assert f"Stopped by {'SIGTERM' if ending == signal.SIGTERM else 'Ctrl-C'} after step {steps}." in said
    assert steps_saved(tmp_path)[-1] == steps
    if where == "validation":
        resumed, expected = runs.digest(PLAIN.fit(2, tmp_path)), runs.uninterrupted("plain", 2)
        assert {name for name in resumed if resumed[name] != expected[name]} == {"history"}  # of other validation data


def test_a_second_signal_leaves_at_once_and_loses_no_checkpoint(tmp_path, monkeypatch):
    write, may_end = CheckpointStore.write, threading.Event()

    def slow(store, record, tensors, **options):
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)
            may_end.wait(60)
            raise OSError("too late")
        return write(store, record, tensors, **options)

    monkeypatch.setattr(CheckpointStore, "write", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        began = time.monotonic()
        with runs.interrupted_at(7):
            PLAIN.fit(2, tmp_path)
        assert time.monotonic() - began < 50
    finally:
        may_end.set()
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert steps_saved(tmp_path) == [5]
    assert runs.digest(PLAIN.fit(2, tmp_path)) == runs.uninterrupted("plain", 2)


def test_steps_on_single_batches_are_saved_and_go_on(tmp_path):
    def trained(trainer, batches):
        for start in batches:
            trainer.train_on_batch(runs.X[start : start + 4], runs.Y[start : start + 4])
        return trainer

    trained(PLAIN.trainer(), range(3)).save(tmp_path / "run")
    trainer = PLAIN.trainer()
    trainer.train_on_batch(runs.X[:4], runs.Y[:4])  # what was traced before goes on with what is loaded
    trainer.load(tmp_path / "run")
    assert runs.digest(trained(trainer, range(3, 6))) == runs.digest(trained(PLAIN.trainer(), range(6)))
