"""What the feature cache saves: a step from it beside one without, and what the epoch costs that fills it.

    python -m benchmarks.cache [--rounds 5] [--only mobilenet resnet mobilenet-features resnet-features]

A step is that of later epochs, the time of a fit of six less that of a fit of one; the first epoch is a fit of one
epoch on data that was not seen before, digests, features and all, beside one without a cache on as much data. The rows
of features compare an epoch from the cache, that of a fit of many less that of a fit of one, with an epoch by hand: a
loop in the graph over features held in memory, that trains the head alone. The arms take turns in one process, after a
warm-up; the figure is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import Adam, by_hand, cross_entropy
from benchmarks.loop import Row, report
from benchmarks.workloads import classifier

BATCH, STEPS, EPOCHS = 16, 50, 6


def drawn(seed: int, size: int = 96, count: int = BATCH * STEPS) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw images and labels."""
    labels = tf.random.stateless_uniform((count,), (seed, 2), 0, 10, tf.int64)
    return tf.random.stateless_normal((count, size, size, 3), (seed, 1)), labels


def measure(application: str, rounds: int, most: float) -> None:
    """Measure an architecture of which the head trains."""
    trainers = {
        cache: tl.Trainer(classifier(application), tl.Freeze("backbone"), loss=cross_entropy(), metrics=["accuracy"])
        for cache in (None, "memory")
    }

    def fit(cache: str | None, data: Any, epochs: int) -> float:
        began = time.perf_counter()
        trainers[cache].fit(data, batch_size=BATCH, epochs=epochs, feature_cache=cache, verbose=0)
        return time.perf_counter() - began

    names = {"memory": "cached", None: "uncached"}
    times: dict[str, list[float]] = {
        f"{name} {what}": [] for name in names.values() for what in ("step", "first epoch")
    }
    for number in range(rounds + 1):
        data = drawn(number)
        for cache, name in names.items():
            first = fit(cache, data, 1)
            again, several = fit(cache, data, 1), fit(cache, data, EPOCHS)
            if number:
                times[f"{name} first epoch"].append(first)
                times[f"{name} step"].append((several - again) / (EPOCHS - 1) / STEPS)
    what = f"{application} 96x96, batch 16, head only"
    rows = [
        Row(f"{what}, from the cache / without it", "cached step", "uncached step", most),
        Row(f"{what}, the first epoch / one without a cache", "cached first epoch", "uncached first epoch", 1.15),
    ]
    report(times, rows)


def measure_features(application: str, rounds: int, examples: int, most: float) -> None:
    """Measure an epoch from the cache beside one by hand over the features, on as many examples."""
    size, epochs = 32, 6 if examples > 1000 else 51  # the size of an image does not count: no image is looked at
    model = classifier(application, size)
    trainer = tl.Trainer(model, tl.Freeze("backbone"), loss=cross_entropy(), optimizer=Adam(1e-4), metrics=["accuracy"])
    data = drawn(0, size, examples)
    width = model.get_layer("head").kernel.shape[0]
    features = tf.random.stateless_normal((examples, width), (0, 1))
    head = keras.layers.Dense(10)
    head.build((None, width))
    hand = by_hand(head, head.trainable_variables, (features, data[1]), BATCH)
    trainer.fit(data, batch_size=BATCH, feature_cache="memory", verbose=0)
    times: dict[str, list[float]] = {"cached": [], "hand": []}
    for number in range(rounds + 1):
        began = time.perf_counter()
        trainer.fit(data, batch_size=BATCH, feature_cache="memory", verbose=0)
        one = time.perf_counter()
        trainer.fit(data, batch_size=BATCH, epochs=epochs, feature_cache="memory", verbose=0)
        several = time.perf_counter()
        for _ in range(epochs - 1):
            hand()
        ended = time.perf_counter()
        if number:
            times["cached"].append((several - one - (one - began)) / (epochs - 1))
            times["hand"].append((ended - several) / (epochs - 1))
    what = f"{application}, an epoch of {examples} examples from the cache / by hand"
    report(times, [Row(what, "cached", "hand", most)])


MEASURES = {"mobilenet": ("MobileNetV2", 1 / 20), "resnet": ("ResNet50", 1 / 30)}
FEATURES = {"mobilenet-features": "MobileNetV2", "resnet-features": "ResNet50"}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*MEASURES, *FEATURES], default=[*MEASURES, *FEATURES])
    args = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, {args.rounds} rounds")
    print(f"{'this / that':<66}{'ms':>9}{'ms':>9}{'ratio':>7}{'most':>7}")
    for name in args.only:
        if name in MEASURES:
            measure(MEASURES[name][0], args.rounds, MEASURES[name][1])
        else:
            for examples, most in ((128, 1.3), (10_000, 1.1)):
                measure_features(FEATURES[name], args.rounds, examples, most)


if __name__ == "__main__":
    main()
