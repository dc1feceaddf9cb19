"""What micro-batches and rematerialization save: peak memory of a full-backprop step above what persists.

    python -m benchmarks.microbatches [--size 96] [--batch 64] [--counts 1 2 4 8] [--threads 0]

A ResNet50 in full backprop, Adam, one process for each arm. What persists is the weights and the optimizer's state; the
peak is what TensorFlow's own allocator reports, with its default threads: the order in which ops happen to run moves it
by some hundredths. The residual blocks are nested models, so that `remat="block*"` can name them.
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

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.workloads import cross_entropy, images

layers = keras.layers
BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))  # filters and count, stage by stage (He et al., 2015, table 1)


def residual(shape: tuple[int, ...], filters: int, stride: int, name: str) -> keras.Model:
    """Return a bottleneck block as a model."""
    inputs = keras.Input(shape)
    x = inputs
    for number, (width, kernel, step) in enumerate(((filters, 1, stride), (filters, 3, 1), (4 * filters, 1, 1))):
        x = layers.Conv2D(width, kernel, strides=step, padding="same")(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x) if number < 2 else x
    shortcut = inputs
    if stride > 1 or shape[-1] != 4 * filters:
        shortcut = layers.BatchNormalization()(layers.Conv2D(4 * filters, 1, strides=stride)(inputs))
    return keras.Model(inputs, layers.ReLU()(x + shortcut), name=name)


def make_model(size: int) -> keras.Model:
    """Return a ResNet50 whose blocks are nested models."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(64, 7, strides=2, padding="same")(inputs)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    for stage, (filters, count) in enumerate(BLOCKS):
        for number in range(count):
            stride = 2 if number == 0 and stage > 0 else 1
            x = residual(x.shape[1:], filters, stride, f"block{stage}_{number}")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(x)))


def measure(arm: str, size: int, batch: int, steps: int, threads: int) -> dict[str, float]:
    """Return the MiB that persist, the peak MiB above them, and the median seconds of a step of one arm."""
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    data, model = images(batch, size), make_model(size)
    options = {"remat": "block*"} if arm == "remat" else {"microbatches": int(arm)}
    trainer = tl.Trainer(model, loss=cross_entropy(), optimizer="adam", **options)
    trainer.fit(data, batch_size=batch, verbose=0)
    slots = 2 * 4 * sum(variable.size for variable in trainer.selection.trained)  # Adam's moments, in float32
    persistent = slots + sum(variable.value.numpy().nbytes for variable in model.variables)
    tf.config.experimental.reset_memory_stats("CPU:0")
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        trainer.fit(data, batch_size=batch, verbose=0)
        seconds.append(time.perf_counter() - began)
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    mib = 2**20
    return {"persistent": persistent / mib, "peak": (peak - persistent) / mib, "seconds": statistics.median(seconds)}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=0, help="inter-op threads; 0 leaves it to TensorFlow")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args.size, args.batch, args.steps, args.threads)))
        return
    print(f"ResNet50 {args.size}x{args.size}, batch {args.batch}, full backprop, TensorFlow {tf.__version__}")
    print(f"{'arm':<16}{'persistent MiB':>15}{'peak above MiB':>16}{'/ first':>9}{'step s':>8}{'/ first':>9}")
    first = None
    for arm in [*map(str, args.counts), "remat"]:
        command = [sys.executable, "-m", "benchmarks.microbatches", "--arm", arm]
        for option in ("size", "batch", "steps", "threads"):
            command += [f"--{option}", str(getattr(args, option))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        first = first or row
        name = arm if arm == "remat" else f"microbatches={arm}"
        print(
            f"{name:<16}{row['persistent']:>15.1f}{row['peak']:>16.1f}{row['peak'] / first['peak']:>9.2f}"
            f"{row['seconds']:>8.2f}{row['seconds'] / first['seconds']:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
