"""What saving a run costs: time beside a run that is not saved, bytes on the disk, and what going on takes.

    python -m benchmarks.checkpoints [--rounds 3] [--steps 100]

A run of a ResNet50, all of it trained by Adam, is saved every 50 steps, in turns with one that is not saved; the figure
is the median of the ratios of the rounds, and holds the wait for the last checkpoint at the end. The bytes are those of
a checkpoint of the head alone after the first, beside one of all weights. Going on is the time from a built trainer to
the first step, from checkpoints early and late in a run.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import cross_entropy
from benchmarks.cache import drawn
from benchmarks.loop import Row, report
from benchmarks.workloads import classifier, mlp

BATCH, EVERY = 16, 50


def resnet(policy: tl.VariablePolicy) -> tl.Trainer:
    """Return a trainer of a ResNet50."""
    return tl.Trainer(classifier("ResNet50"), policy, loss=cross_entropy(), optimizer=keras.optimizers.Adam(1e-4))


def measure_time(rounds: int, steps: int) -> None:
    """Compare a run that saves itself with one that does not."""
    data = tuple(part[: BATCH * steps] for part in drawn(0))
    trainers = {saved: resnet(tl.TrainAll()) for saved in (True, False)}
    times: dict[str, list[float]] = {"saved": [], "not saved": []}
    for number in range(rounds + 1):
        for saved, trainer in trainers.items():
            folder = tempfile.mkdtemp()
            checkpoint = tl.Checkpoints(folder, every_steps=EVERY, every_epochs=None) if saved else None
            some = data if number else tuple(part[: 2 * BATCH] for part in data)  # the first round only traces
            began = time.perf_counter()
            trainer.fit(some, batch_size=BATCH, verbose=0, checkpoint=checkpoint)
            if number:
                times["saved" if saved else "not saved"].append((time.perf_counter() - began) / steps)
            shutil.rmtree(folder)
    what = f"ResNet50 96x96, full, Adam, saved every {EVERY} steps / not saved"
    report(times, [Row(what, "saved", "not saved", 1.05)])


def measure_bytes() -> None:
    """Compare the checkpoints of a head with those of all weights."""
    data, sizes = tuple(part[: 2 * BATCH] for part in drawn(0)), {}
    for name, policy in (("all", tl.TrainAll()), ("head", tl.Freeze("backbone"))):
        folder = pathlib.Path(tempfile.mkdtemp())
        checkpoints = tl.Checkpoints(folder, every_epochs=1)
        resnet(policy).fit(data, batch_size=BATCH, epochs=2, verbose=0, checkpoint=checkpoints)
        assert checkpoints.newest is not None
        sizes[name] = sum(path.stat().st_size for path in checkpoints.newest.iterdir())
        shutil.rmtree(folder)
    share = sizes["head"] / sizes["all"]
    what = "ResNet50, MB of a later checkpoint, head / all"
    print(f"{what:<66}{sizes['head'] / 1e6:>9.2f}{sizes['all'] / 1e6:>9.1f}{share:>7.4f}   0.01")


def measure_resume(rounds: int) -> None:
    """Compare going on early and late in a run, with as many steps left in the epoch."""
    left, runs, traces = 99, {}, set()
    for steps in (100, 3900):
        x = np.random.default_rng(0).normal(size=(64 * (steps + left), 64)).astype("float32")
        runs[steps] = (x, np.zeros(len(x), "int64")), tempfile.mkdtemp()
        checkpoints = tl.Checkpoints(runs[steps][1], every_steps=steps, every_epochs=None)
        _mlp_trainer().fit(runs[steps][0], batch_size=64, verbose=0, checkpoint=checkpoints)
    times: dict[str, list[float]] = {"100": [], "3900": []}
    for _ in range(rounds):
        for steps, (data, folder) in runs.items():
            trainer = _mlp_trainer()
            began = time.perf_counter()
            trainer.load(f"{folder}/000001-step-{steps}")
            assert trainer.step == steps
            trainer.fit(data, batch_size=64, verbose=0)
            assert trainer.step == steps + left
            times[str(steps)].append(time.perf_counter() - began)
            traces.add(trainer.trace_count)
    for _, folder in runs.values():
        shutil.rmtree(folder)
    assert traces == {1}
    report(times, [Row(f"MLP, going on and {left} steps, after 3900 steps / after 100", "3900", "100", 1.2)])


def _mlp_trainer() -> Any:
    return tl.Trainer(mlp(), loss=cross_entropy(), optimizer=keras.optimizers.Adam(1e-3))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, {args.rounds} rounds")
    print(f"{'this / that':<66}{'ms':>9}{'ms':>9}{'ratio':>7}{'most':>7}")
    measure_bytes()
    measure_resume(3 * args.rounds)
    measure_time(args.rounds, args.steps)


if __name__ == "__main__":
    main()
