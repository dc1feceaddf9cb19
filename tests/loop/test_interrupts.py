"""Ctrl-C, in a process of its own, and what a run is after it."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tapeloop.loop.interrupts import deferred_interrupt
from tests.support.fitting import X, Y, fit, mlp
from tests.support.inspect import calls_of_the_loop

SCRIPT = """
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import keras, numpy as np, tapeloop as tl

model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
x, y = np.ones((16, 8), "float32"), np.ones((16, 1), "float32")
sent = []

def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

def batches():
    for _ in range(3000):
        yield x, y
    if len(passes) == 2:
        threading.Timer(1.5, interrupt).start()
    passes.append(1)
    while len(passes) == 3:
        time.sleep(0.25)
        yield x, y

class Data:
    def __iter__(self):
        return batches()

passes = [1]
optimizer = keras.optimizers.SGD()
trainer = tl.Trainer(model, loss="mse", optimizer=optimizer)
try:
    trainer.fit(Data(), epochs=5, verbose=0)
except KeyboardInterrupt:
    print("seconds", time.monotonic() - sent[0])
    print("counts", trainer.step, int(optimizer.iterations))
    print("epochs", trainer.history.epoch, len(trainer.history.history["loss"]))
trainer.fit([(x, y)], verbose=0)
print("goes on", trainer.step)
"""


@pytest.mark.slow
def test_ctrl_c_while_data_is_slow_after_it_was_fast_ends_at_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert float(said["seconds"]) < 2.0
    step, iterations = map(int, said["counts"].split())
    assert step == iterations > 6000
    assert said["epochs"] == "[1] 1"


def test_a_call_ends_by_time_when_steps_turn_slow():
    class Slow:
        """A hundred quick batches, then some that take a tenth of a second."""

        def __iter__(self):
            for number in range(112):
                if number >= 100:
                    time.sleep(0.1)
                yield X, Y

    trainer = fit(mlp("head"), steps=3000, optimizer="sgd")  # hundreds a call
    calls = calls_of_the_loop(trainer, Slow())
    assert sum(batches for batches, _ in calls) == 112
    assert len(calls) >= 4
    assert max(seconds for _, seconds in calls) < 1.0


@contextlib.contextmanager
def handler(of_interrupts):
    before = signal.signal(signal.SIGINT, of_interrupts)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_what_it_must_not_cut():
    done = []

    def once():
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("first")

    def twice():
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    with handler(signal.default_int_handler):
        for interrupted in (once, twice):
            with pytest.raises(KeyboardInterrupt):
                interrupted()
            assert done == ["first"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_waits_too_and_threads_are_left_alone():
    seen = []
    with handler(lambda number, frame: seen.append(number)):
        with deferred_interrupt():
            with deferred_interrupt():
                signal.raise_signal(signal.SIGINT)
            assert seen == []  # the outermost of several decides
        assert seen == [signal.SIGINT]
        thread = threading.Thread(target=lambda: deferred_interrupt().__enter__() and seen.append("thread"))
        thread.start()
        thread.join()
        assert seen[-1] == "thread"


def test_a_handler_of_the_users_own_that_raises_cuts_nothing():
    done = []

    def stop(number, frame):
        raise KeyboardInterrupt

    def bookkeeping():
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("bookkeeping")

    with handler(stop), pytest.raises(KeyboardInterrupt):
        bookkeeping()
    assert done == ["bookkeeping"]
