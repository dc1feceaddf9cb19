"""What one step on one batch costs the host, beside Keras' `train_on_batch`: for online and reinforcement learning.

    python -m benchmarks.on_batch [--rounds 9] [--out FILE]

The arms take turns in one process, after a warm-up; the figure is the median of the rounds' ratios. Both arms give one
loss a batch; Keras freezes by its flag.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from benchmarks.workloads import classifier, images, mlp

Arm = Callable[[], object]


def of_tapeloop(model: keras.Model, policy: tl.VariablePolicy, x: np.ndarray, y: np.ndarray) -> Arm:
    """Return a step of a trainer."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = tl.Trainer(model, policy, loss=loss, optimizer=keras.optimizers.Adam())
    return lambda: trainer.train_on_batch(x, y)


def of_keras(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Arm:
    """Return a step of Keras."""
    model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda: model.train_on_batch(x, y, return_dict=True)


def seconds_of(arm: Arm, steps: int) -> float:
    """Return the seconds of a step, over so many."""
    began = time.perf_counter()
    for _ in range(steps):
        arm()
    return (time.perf_counter() - began) / steps


def compared(ours: Arm, theirs: Arm, rounds: int, steps: int) -> dict[str, float]:
    """Return the medians of both arms in milliseconds, and of their ratio."""
    times = []
    for number in range(rounds + 1):
        pair = seconds_of(ours, steps), seconds_of(theirs, steps)
        if number:
            times.append(pair)
    medians = [1e3 * statistics.median(each) for each in zip(*times)]
    ratio = statistics.median(one / other for one, other in times)
    return {"tapeloop_ms": medians[0], "keras_ms": medians[1], "ratio": ratio}


def cases(rounds: int) -> dict[str, dict[str, float]]:
    """Measure all cases."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64, 64)).astype("float32"), generator.integers(0, 10, 64)
    found = {"mlp, batch 64": compared(of_tapeloop(mlp(), tl.TrainAll(), x, y), of_keras(mlp(), x, y), rounds, 200)}
    x, y = images(16)
    frozen = classifier("MobileNetV2")
    frozen.get_layer("backbone").trainable = False
    head_only = of_tapeloop(classifier("MobileNetV2"), tl.Freeze("backbone"), x, y)
    found["mobilenetv2 96x96, head only, batch 16"] = compared(head_only, of_keras(frozen, x, y), rounds, 10)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="a file for the figures, as JSON")
    args = parser.parse_args()
    found = cases(args.rounds)
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, {args.rounds} rounds")
    print(f"{'a step on one batch':<42}{'tapeloop ms':>12}{'Keras ms':>10}{'ratio':>7}")
    for name, row in found.items():
        print(f"{name:<42}{row['tapeloop_ms']:>12.2f}{row['keras_ms']:>10.2f}{row['ratio']:>7.2f}")
    if args.out is not None:
        machine = {"tensorflow": tf.__version__, "keras": keras.__version__, "cores": os.cpu_count()}
        content = {"command": "python -m benchmarks.on_batch", **machine, "cases": found}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
