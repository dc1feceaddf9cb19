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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"  # or the CPU's allocator keeps no statistics

import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import Arm, forward, tapeloop
from benchmarks.workloads import classifier, images

ARMS = ("forward", "full", "tapeloop")
ROUNDS = 5


def make_arm(arm: str, size: int, batch: int, steps: int) -> Arm:
    """Return a function that goes through an epoch of so many steps of `arm`."""
    data, model = images(batch * steps, size), classifier("MobileNetV2", size)
    if arm == "forward":
        return forward(model, data, batch)
    policy = tl.TrainAll() if arm == "full" else tl.Freeze("backbone")
    return tapeloop(model, policy, data, batch, metrics=None, progress="none")


def measure_times(size: int, batch: int, steps: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each arm, over epochs that take turns."""
    arms = {arm: make_arm(arm, size, batch, steps) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_number in range(ROUNDS + 1):
        for arm, run in arms.items():
            began = time.perf_counter()
            run()
            if round_number:
                times[arm].append((time.perf_counter() - began) / steps)
    return {arm: 1e3 * statistics.median(seconds) for arm, seconds in times.items()}


def measure_peak(arm: str, size: int, batch: int, steps: int) -> float:
    """Return the peak MiB of this process's steps of one arm, its weights and data included."""
    tf.config.threading.set_inter_op_parallelism_threads(1)
    run = make_arm(arm, size, batch, steps)
    run()
    tf.config.experimental.reset_memory_stats("CPU:0")
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
