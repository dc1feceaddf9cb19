"""What callbacks cost a step: none, one that looks at epochs, one that looks at each batch; beside Keras' `fit`.

    python -m benchmarks.callbacks [--rounds 9] [--out FILE]

The arms take turns in one process, after a warm-up; the figures are medians over rounds of milliseconds a step, and of
the ratio to the arm without callbacks of the same round. The model is an MLP, whose steps are short: a callback takes
as many milliseconds of a longer step, and a smaller part of it.
"""

from __future__ import annotations

import argparse
import functools
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
from benchmarks.workloads import mlp

BATCH, STEPS = 64, 200


class Epochs(keras.callbacks.Callback):
    """Looks at epochs."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Look at the logs."""
        self.seen = logs


class Batches(keras.callbacks.Callback):
    """Looks at each batch."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Look at the logs."""
        self.seen = logs


KINDS = {"no callback": (), "looks at epochs": (Epochs,), "looks at batches": (Batches,)}


def arms() -> dict[str, Callable[[], object]]:
    """Return what trains an epoch, by name."""
    x, y = np.random.default_rng(0).normal(size=(BATCH * STEPS, 64)).astype("float32"), np.zeros(BATCH * STEPS, "int64")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = tl.Trainer(mlp(), loss=loss, optimizer="adam")
    model = mlp()
    model.compile("adam", loss)
    options = {"batch_size": BATCH, "verbose": 0}
    return {
        # A callback object for each arm: it is told which model it looks at.
        f"{who}, {name}": functools.partial(fit, x, y, callbacks=[kind() for kind in kinds], **options)
        for who, fit in (("tapeloop", trainer.fit), ("Keras", model.fit))
        for name, kinds in KINDS.items()
    }


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path)
    asked, measured, times = parser.parse_args(), arms(), {}
    for number in range(asked.rounds + 1):
        for name, arm in measured.items():
            began = time.perf_counter()
            arm()
            if number:
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - began) / STEPS)
    rows = {}
    for name, mine in times.items():
        plain = times[f"{name.split(',')[0]}, no callback"]
        ratio = statistics.median(one / other for one, other in zip(mine, plain))
        rows[name] = {"ms": statistics.median(mine), "ratio": ratio}
        print(f"{name:28} {rows[name]['ms']:7.3f} ms a step  {ratio:6.2f}")
    if asked.out is not None:
        machine = {"tensorflow": tf.__version__, "keras": keras.__version__, "cores": os.cpu_count()}
        content = {"command": "python -m benchmarks.callbacks", **machine, "rounds": asked.rounds, "rows": rows}
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
