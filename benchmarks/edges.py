"""What a fit and an epoch cost at their ends, beside a loop by hand that only calls its compiled function.

    python -m benchmarks.edges [--rounds 9]

A fit of one step is one of a trainer that has fitted before. An epoch more is the time of a fit of many epochs of one
step less that of a fit of one, for each of the epochs between, less a call of the same step by hand. The arms take
turns in one process, after a warm-up; the figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import Adam, by_hand, tapeloop
from benchmarks.loop import Row, compare
from benchmarks.workloads import classifier, cross_entropy, images, mlp, vectors

EPOCHS = 21


def measure_one_step(what: str, models: list[keras.Model], policy: tl.VariablePolicy, data: Any, rounds: int) -> None:
    """Measure a fit of one step."""
    ours, other = models
    batch, is_frozen = len(data[0]), isinstance(policy, tl.Freeze)
    trained = (other.get_layer("head") if is_frozen else other).trainable_variables
    model = _frozen(other) if is_frozen else other
    arms = {
        "tapeloop": tapeloop(ours, policy, data, batch, verbose=0),
        "hand": by_hand(model, trained, data, batch),
    }
    compare(arms, [Row(f"{what}, a fit of one step / by hand", "tapeloop", "hand", 1.2)], rounds, 1)


def _frozen(model: keras.Model) -> Any:
    backbone, head = model.get_layer("backbone"), model.get_layer("head")
    return lambda x, training: head(backbone(x, training=False), training=training)


def stack(layers: int) -> keras.Model:
    """Build a frozen stack of small layers, in blocks of ten, under a head."""
    dense = keras.layers.Dense
    blocks = [keras.Sequential([dense(8) for _ in range(10)], name=f"block_{number}") for number in range(layers // 10)]
    return keras.Sequential([keras.Input((64,)), *blocks, dense(10, name="head")])


def epoch_ms(layers: int, rounds: int) -> tuple[float, float]:
    """Return the milliseconds of an epoch more of one step, and those of a call of the step by hand."""
    data, model, other = vectors(8), stack(layers), stack(layers)
    trainer = tl.Trainer(model, tl.TrainOnly("head"), loss=cross_entropy(), optimizer=Adam(1e-4), metrics=["accuracy"])
    hand = by_hand(other, other.get_layer("head").trainable_variables, data, 8)

    def seconds(run: Any) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def fit(epochs: int) -> float:
        return seconds(lambda: trainer.fit(data, batch_size=8, epochs=epochs, verbose=0))

    found = []
    for number in range(rounds + 1):
        one, many = fit(1), fit(EPOCHS)
        by_the_hand = statistics.median(seconds(hand) for _ in range(EPOCHS))
        if number:
            found.append((1e3 * (many - one) / (EPOCHS - 1), 1e3 * by_the_hand))
    ours, theirs = zip(*found)
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, {args.rounds} rounds")
    print(f"{'this / that':<66}{'ms':>9}{'ms':>9}{'ratio':>7}{'most':>7}")
    measure_one_step("MLP, batch 64", [mlp(), mlp()], tl.TrainAll(), vectors(64), 20 * args.rounds)
    application = [classifier("MobileNetV2") for _ in range(2)]
    measure_one_step("MobileNetV2, batch 16", application, tl.Freeze("backbone"), images(16), args.rounds)
    print(f"{'an epoch more of one step, by the number of layers':<66}{'ms':>9}{'by hand':>9}{'more':>7}{'most':>7}")
    for layers in (10, 100, 1000):
        ours, hand = epoch_ms(layers, args.rounds)
        print(f"{layers:<66}{ours:>9.2f}{hand:>9.2f}{ours - hand:>7.2f}{3:>7}", flush=True)


if __name__ == "__main__":
    main()
