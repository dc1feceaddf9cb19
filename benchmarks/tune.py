"""How `trainer.tune` chooses, and how long it takes: an encoder, a vision transformer, an MLP, a MobileNetV2.

    python -m benchmarks.tune [--models encoder vit mlp mobilenetv2] [--out FILE]

What it picked is measured afresh against the trainer as it was: in this process, in turns, by fits of a second or so
after a warm-up; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tapeloop as tl
from benchmarks.cases import Case
from benchmarks.workloads import make

MODELS = {
    "encoder": ("adapters", 16, 64),
    "vit": ("norm", 16, 96),
    "mlp": ("all", 64, 0),
    "mobilenetv2": ("head", 16, 96),
}
ROUNDS = 5
ROUND_S = 1.0


def main() -> None:
    """Tune each of the models, and print what it took and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=pathlib.Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    found = [measure(name) for name in options.models]
    print(f"\n{'model':<12} {'tune s':>7} {'picked / now':>13}  picked")
    for row in found:
        print(f"{row['model']:<12} {row['seconds']:7.1f} {row['ratio']:13.2f}  {row['picked'] or 'as it is'}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1))


def measure(name: str) -> dict[str, Any]:
    """Tune one model, and measure afresh what was picked."""
    selection, batch, size = MODELS[name]
    case = Case(name, selection, "tapeloop", batch, size, steps=4)
    workload = make(case)

    def trainer(**options: Any) -> tl.Trainer:
        made = {"loss": workload.loss, "optimizer": workload.optimizer(), **options}
        return tl.Trainer(workload.model, workload.policy, **made)

    tuning = trainer().tune(*workload.data, batch_size=case.batch)
    arms = [trainer(), trainer(**tuning.options)]
    ratios = []
    for number in range(-1, ROUNDS):
        turn = arms if number % 2 else arms[::-1]
        seconds = {id(arm): step_s(arm, workload.data, case.batch, is_first=number < 0) for arm in turn}
        ratios.append(seconds[id(arms[1])] / seconds[id(arms[0])])
    picked = ", ".join(f"{option}={value!r}" for option, value in tuning.options.items())
    ratio = statistics.median(ratios[1:])
    return {"model": name, "seconds": tuning.seconds, "picked": picked, "ratio": ratio, "table": repr(tuning)}


def step_s(trainer: tl.Trainer, data: Any, batch: int, is_first: bool) -> float:
    """Return the seconds of a step in a fit of about a second, long enough for folding to set in."""
    if is_first:
        trainer.fit(*data, batch_size=batch, steps_per_epoch=50, verbose=0)
    began = time.perf_counter()
    trainer.fit(*data, batch_size=batch, steps_per_epoch=1, verbose=0)
    steps = max(2, int(ROUND_S / max(1e-4, time.perf_counter() - began)))
    began = time.perf_counter()
    trainer.fit(*data, batch_size=batch, steps_per_epoch=steps, verbose=0)
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
