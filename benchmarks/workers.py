"""What a step costs on several workers, and what it sends: full backprop beside the head alone.

    python -m benchmarks.workers [--workers 1 2] [--workloads mobilenetv2] [--selections all head] [--out FILE]

Each worker is a process of this machine with one thread, and has a batch of its own: a step would take as long on
any number of workers, if nothing went over the wire and each had a core. A step is what a long round takes more than a
short one. Selections take turns; figures are medians over the rounds, of the slowest worker.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import tapeloop as tl
from benchmarks.cases import MIDDLE, Case
from benchmarks.results import commit, environment
from benchmarks.workloads import make

ROUNDS = 5


def main() -> None:
    """Measure on each number of workers, print a table, and add the figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workloads", nargs="+", default=["mobilenetv2"])
    parser.add_argument("--selections", nargs="+", default=["all", "head"])
    parser.add_argument("--out", type=pathlib.Path, help="where the figures go, as JSON")
    parser.add_argument("--as-worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_worker:
        measure(pathlib.Path(options.as_worker), options.workloads, options.selections)
        return
    rows = [row for count in options.workers for row in run(count, options.workloads, options.selections)]
    print(f"{'workload':<14} {'trains':<8} {'workers':>7} {'step ms':>9} {'/ one worker':>12} {'sent, bytes':>12}")
    alone = {(row["workload"], row["selection"]): row["step_ms"] for row in rows if row["workers"] == 1}
    for row in rows:
        ratio = row["step_ms"] / alone.get((row["workload"], row["selection"]), float("nan"))
        place = f"{row['workload']:<14} {row['selection']:<8} {row['workers']:>7}"
        print(f"{place} {row['step_ms']:>9.1f} {ratio:>12.2f} {row['bytes']:>12,}")
    if options.out is not None:
        said = [{**row, "commit": commit(), "environment": environment()} for row in rows]
        options.out.write_text(json.dumps(said, indent=1) + "\n")


def run(count: int, workloads: list[str], selections: list[str]) -> list[dict[str, Any]]:
    """Start so many workers, and return what the slowest of them has measured.

    Raises:
        subprocess.CalledProcessError: One of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = [
            "-m",
            "benchmarks.workers",
            "--as-worker",
            folder,
            "--workloads",
            *workloads,
            "--selections",
            *selections,
        ]
        launch = [sys.executable, "-m", "tapeloop", "launch", "--workers", str(count), *child]
        subprocess.run(launch, check=True)
        found = [json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).iterdir())]
    return [{**max(rows, key=lambda row: row["step_ms"]), "workers": count} for rows in zip(*found)]


def measure(folder: pathlib.Path, workloads: list[str], selections: list[str]) -> None:
    """Measure as one worker: all cases one after the other, each with the selections in turns."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index, rows = strategy.cluster_resolver.task_id, []
    for name in workloads:
        size, batch, steps = MIDDLE[name]
        batch *= strategy.num_replicas_in_sync
        arms = {}
        for selection in selections:
            with strategy.scope():
                work = make(Case(name, selection, "tapeloop", batch, size, steps=steps))
            trainer = tl.Trainer(work.model, work.policy, loss=work.loss, optimizer=work.optimizer(), strategy=strategy)
            arms[selection] = (trainer, work.data)
        times: dict[str, list[float]] = {selection: [] for selection in selections}
        for number in range(-1, ROUNDS):
            for selection, (trainer, data) in arms.items():
                short, long = (seconds_of(trainer, data, batch, count) for count in (max(1, steps // 5), steps))
                if number >= 0:
                    times[selection].append((long - short) / (steps - max(1, steps // 5)))
        for selection, (trainer, _) in arms.items():
            ms = 1000 * statistics.median(times[selection])
            sent = {"bytes": trainer.reduced_bytes, "rounds_ms": [1000 * each for each in times[selection]]}
            rows.append({"workload": name, "selection": selection, "batch": batch, "step_ms": ms, **sent})
    (folder / f"{index}.json").write_text(json.dumps(rows))


def seconds_of(trainer: tl.Trainer, data: Any, batch: int, steps: int) -> float:
    """Return how long a fit of so many steps takes."""
    part = tf.nest.map_structure(lambda value: value[: batch * steps], data)
    began = time.perf_counter()
    trainer.fit(part, batch_size=batch, shuffle=False, verbose=0)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
