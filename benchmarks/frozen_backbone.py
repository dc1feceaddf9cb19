"""A frozen MobileNetV2 under a trained head: what a step costs beside the forward pass alone and full backprop.

    python -m benchmarks.frozen_backbone [--size 96] [--batch 16] [--steps 30]

Step times are medians of interleaved steps in one process, so that drift hits every arm alike. Peak memory is what
TensorFlow's own allocator reports, weights included, one process for each arm. There the ops run one after the other
(`inter_op_parallelism_threads=1`): in parallel, the order in which they happen to run moves the peak of any arm by a
sixth from one process to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"  # or the CPU's allocator keeps no statistics

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

ARMS = ("forward", "full", "tapeloop")


def make_model(size: int) -> keras.Model:
    """Nest a MobileNetV2 with random weights under a ten-class head."""
    backbone = keras.applications.MobileNetV2((size, size, 3), include_top=False, weights=None, pooling="avg")
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(backbone(inputs)))


def make_arm(arm: str, size: int, batch: int) -> Callable[[], object]:
    """Return a function that runs one step of `arm`."""
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(batch, size, size, 3)), tf.float32)
    y = tf.constant(generator.integers(0, 10, batch))
    model = make_model(size)
    if arm == "forward":
        forward = tf.function(lambda: model(x, training=False))
        return forward
    policy = tl.TrainAll() if arm == "full" else tl.Freeze("backbone")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = tl.Trainer(model, policy, loss=loss, optimizer=keras.optimizers.Adam(1e-4))
    trainer.fit([(x, y)], progress="none")
    step = trainer._steps.train(trainer.selection)
    return lambda: step((x, y))


def measure_times(size: int, batch: int, steps: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each arm."""
    arms = {arm: make_arm(arm, size, batch) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_number in range(steps + 5):
        for arm, run in arms.items():
            began = time.perf_counter()
            run()
            if round_number >= 5:
                times[arm].append(time.perf_counter() - began)
    return {arm: 1e3 * statistics.median(seconds) for arm, seconds in times.items()}


def measure_peak(arm: str, size: int, batch: int, steps: int) -> float:
    """Return the peak MiB of this process's steps of one arm, its weights included."""
    tf.config.threading.set_inter_op_parallelism_threads(1)
    run = make_arm(arm, size, batch)
    for _ in range(3):
        run()
    tf.config.experimental.reset_memory_stats("CPU:0")
    for _ in range(steps):
        run()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] / 2**20


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peak-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(measure_peak(args.peak_of, args.size, args.batch, args.steps)))
        return
    sizes = ["--size", str(args.size), "--batch", str(args.batch)]
    peaks = {}
    for arm in ARMS:
        command = [sys.executable, "-m", "benchmarks.frozen_backbone", "--peak-of", arm, *sizes]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[arm] = json.loads(output.splitlines()[-1])
    times = measure_times(args.size, args.batch, args.steps)
    print(f"MobileNetV2 {args.size}x{args.size}, batch {args.batch}, {args.steps} steps, TensorFlow {tf.__version__}")
    print(f"{'arm':<10}{'step ms':>10}{'/ forward':>11}{'peak MiB':>10}{'/ forward':>11}")
    for arm in ARMS:
        print(
            f"{arm:<10}{times[arm]:>10.1f}{times[arm] / times['forward']:>11.2f}"
            f"{peaks[arm]:>10.1f}{peaks[arm] / peaks['forward']:>11.2f}"
        )


if __name__ == "__main__":
    main()
