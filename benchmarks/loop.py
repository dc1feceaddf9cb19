"""What the loop around a step costs, beside Keras' `fit` and loops written by hand.

    python -m benchmarks.loop [--rounds 5] [--only mlp mobilenet resnet efficientnet full adapters first memory]

Each row divides the time of a step under tapeloop by that of another loop over the same data, with the same
optimizer, loss and metrics. The arms of a row take turns in one process, after a warm-up; the figure is the median of
the ratios of the rounds. The time to the first step is that of a process each, from a built model on, and so is peak
memory. PyTorch takes its turns in a process of its own, and has its row where it is installed.
See `benchmarks/arms.py` for what a loop by hand is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import Arm, by_hand, forward, keras_fit, tapeloop
from benchmarks.cases import Case, Group
from benchmarks.workloads import classifier, encoder, images, mlp


@dataclass(frozen=True)
class Row:
    """A ratio of two arms, and the most that it should be: infinite where it is the floor of another row."""

    what: str
    arm: str
    base: str
    most: float


def compare(arms: dict[str, Arm], rows: list[Row], rounds: int, steps: int) -> None:
    """Run the arms in turns and print the rows."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 2):
        for arm, run in arms.items():
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                run()
            if number > 1:
                times[arm].append((time.perf_counter() - began) / steps)
    report(times, rows)


def report(times: dict[str, list[float]], rows: list[Row]) -> None:
    """Print the rows."""
    for row in rows:
        ratio = statistics.median(one / other for one, other in zip(times[row.arm], times[row.base]))
        one, other = (1e3 * statistics.median(times[arm]) for arm in (row.arm, row.base))
        most = f"{row.most:>7.3g}" if math.isfinite(row.most) else ""
        print(f"{row.what:<66}{one:>9.2f}{other:>9.2f}{ratio:>7.3g}{most}", flush=True)


def measure_mlp(rounds: int) -> None:
    """Measure a model so small that the loop is most of its cost."""
    batch, steps = 64, 1000
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(batch * steps, 64)).astype("float32"), generator.integers(0, 10, batch * steps)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True)
    hand, other, floor, bare = (mlp() for _ in range(4))
    several = [keras.metrics.SparseCategoricalAccuracy(), keras.metrics.SparseTopKCategoricalAccuracy(3)]
    arms = {
        "tapeloop": tapeloop(mlp(), tl.TrainAll(), (x, y), batch),
        "tapeloop dataset": tapeloop(mlp(), tl.TrainAll(), dataset, batch),
        "keras": keras_fit(mlp(), (x, y), batch),
        "keras 16": keras_fit(mlp(), (x, y), batch, steps_per_execution=16),
        "keras 16 dataset": keras_fit(mlp(), (dataset,), None, steps_per_execution=16),
        "hand": by_hand(hand, hand.trainable_variables, (x, y), batch),
        "hand dataset": by_hand(other, other.trainable_variables, dataset, batch),
        "hand metrics": by_hand(floor, floor.trainable_variables, (x, y), batch, metrics=3),
        "hand bare": by_hand(bare, bare.trainable_variables, (x, y), batch, metrics=0),
        "metrics": tapeloop(
            mlp(), tl.TrainAll(), (x, y), batch, metrics=[*several, keras.metrics.SparseCategoricalCrossentropy()]
        ),
        "bare": tapeloop(mlp(), tl.TrainAll(), (x, y), batch, metrics=None, verbose=0),
    }
    rows = [
        Row("MLP, batch 64 / Keras `fit`", "tapeloop", "keras", 0.25),
        Row("the same / Keras `fit`, `steps_per_execution=16`", "tapeloop", "keras 16", 0.70),
        Row("the same / by hand, from arrays", "tapeloop", "hand", 1.05),
        Row("the same, from a dataset / by hand, from a dataset", "tapeloop dataset", "hand dataset", 1.05),
        Row(
            "the same / Keras `fit`, `steps_per_execution=16`, from a dataset",
            "tapeloop dataset",
            "keras 16 dataset",
            math.inf,
        ),
        Row("the same, progress and 3 metrics / without both", "metrics", "bare", 1.05),
        Row("by hand, from arrays / Keras `fit`", "hand", "keras", math.inf),
        Row("by hand, 3 metrics / by hand, none", "hand metrics", "hand bare", math.inf),
    ]
    compare(arms, rows, rounds, steps)


def measure_head(application: str, rounds: int, folded: float) -> None:
    """Measure a frozen architecture under a trained head, as it is and folded."""
    batch, steps = 16, 50
    data = images(batch * steps)
    arms = {
        "plain": tapeloop(classifier(application), tl.Freeze("backbone"), data, batch, fold_frozen=False),
        "folded": tapeloop(classifier(application), tl.Freeze("backbone"), data, batch, fold_frozen=True),
        "forward": forward(classifier(application), data, batch),
    }
    rows = [
        Row(f"{application} 96x96, batch 16, head only / forward pass alone", "plain", "forward", 1.05),
        Row("the same, folded", "folded", "forward", folded),
    ]
    compare(arms, rows, rounds, steps)
    if application == "ResNet50" and importlib.util.find_spec("torch"):
        torch = in_pytorch(Group("resnet50", "head", batch, 96, steps=steps))
        row = Row("the same, folded / PyTorch", "folded", "torch", 1.0)
        compare({"folded": arms["folded"], "torch": torch}, [row], rounds, steps)


def in_pytorch(group: Group) -> Arm:
    """Return an arm in PyTorch, which runs in a process of its own."""
    from benchmarks import peers

    pipe, other = multiprocessing.Pipe()
    case = Case(group, "torch")
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=peers.serve, args=(other, case, "", False), daemon=True).start()
    said = pipe.recv()
    if "error" in said:
        raise RuntimeError(said["error"])

    def run(steps: int | None = None) -> float:
        pipe.send(("round", group.steps if steps is None else steps))
        return float(pipe.recv()["loss"])

    return run


def measure_full(rounds: int) -> None:
    """Measure full backprop."""
    batch, steps = 16, 8
    data, model = images(batch * steps), classifier("ResNet50")
    arms = {
        "tapeloop": tapeloop(classifier("ResNet50"), tl.TrainAll(), data, batch),
        "hand": by_hand(model, model.trainable_variables, data, batch),
    }
    compare(arms, [Row("ResNet50, full backprop / by hand", "tapeloop", "hand", 1.02)], rounds, steps)


def measure_adapters(rounds: int) -> None:
    """Measure a frozen middle: what trains lies before and behind it."""
    batch, steps = 16, 20
    generator = np.random.default_rng(0)
    data = generator.integers(0, 1000, (batch * steps, 64)), generator.integers(0, 10, batch * steps)
    model = encoder()
    trained = [v for layer in model.layers if layer.name.startswith(("adapter", "head")) for v in layer.variables]
    arms = {
        "tapeloop": tapeloop(encoder(), tl.TrainOnly("adapter*", "head"), data, batch),
        "hand": by_hand(model, trained, data, batch),
    }
    compare(arms, [Row("encoder, adapters in a frozen body / by hand", "tapeloop", "hand", 1.02)], rounds, steps)


def peak(application: str, folds: bool) -> float:
    """Return the MB by which training a head raises the peak of this process's memory."""
    data, model = images(16 * 50), classifier(application)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = tapeloop(model, tl.Freeze("backbone"), data, 16, fold_frozen=folds, verbose=0)
    for _ in range(2):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_memory(rounds: int) -> None:
    """Measure by how much folding raises the peak, beside what the frozen weights take."""
    print(f"{'MB of memory, head only':<48}{'plain':>9}{'folded':>9}{'more':>9}{'weights':>9}")
    for application in ("MobileNetV2", "ResNet50", "EfficientNetV2B0"):
        plain, folded = (
            statistics.median(in_process("--peak-of", application, str(folds)) for _ in range(rounds))
            for folds in ("", "folded")
        )
        frozen = classifier(application).get_layer("backbone").count_params() * 4 / 2**20
        print(f"{application:<48}{plain:>9.0f}{folded:>9.0f}{folded - plain:>9.0f}{frozen:>9.0f}", flush=True)


def in_process(*arguments: str) -> float:
    """Return the number that this module prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loop", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def first_step(arm: str) -> float:
    """Return the seconds from a built model to the end of its first step."""
    data, model = images(16), classifier("MobileNetV2")
    began = time.perf_counter()
    if arm == "tapeloop":
        run = tapeloop(model, tl.Freeze("backbone"), data, 16, verbose=2)
    else:
        model.get_layer("backbone").trainable = False
        run = keras_fit(model, data, 16)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run()
    return time.perf_counter() - began


def measure_first(rounds: int) -> None:
    """Measure how long the first step takes, a process for each."""
    times: dict[str, list[float]] = {"tapeloop": [], "keras": []}
    for _ in range(rounds):
        for arm, seconds in times.items():
            seconds.append(in_process("--first-step-of", arm))
    report(times, [Row("MobileNetV2, head only, first step / Keras `fit`, frozen by flag", "tapeloop", "keras", 0.8)])


MEASURES: dict[str, Callable[[int], None]] = {
    "mlp": measure_mlp,
    "mobilenet": lambda rounds: measure_head("MobileNetV2", rounds, 0.75),
    "resnet": lambda rounds: measure_head("ResNet50", rounds, 0.80),
    "efficientnet": lambda rounds: measure_head("EfficientNetV2B0", rounds, 0.80),
    "full": measure_full,
    "adapters": measure_adapters,
    "first": measure_first,
    "memory": measure_memory,
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--first-step-of", choices=("tapeloop", "keras"), help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak(args.peak_of[0], bool(args.peak_of[1])))
        return
    if args.first_step_of:
        print(first_step(args.first_step_of))
        return
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, {args.rounds} rounds")
    print(f"{'a step of this / a step of that':<66}{'ms':>9}{'ms':>9}{'ratio':>7}{'most':>7}")
    for name in args.only:
        MEASURES[name](args.rounds)


if __name__ == "__main__":
    main()
