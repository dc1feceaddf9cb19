"""Running means of the scalars that steps return."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tapeloop._backend import tracing


class RunningMeans:
    """The running means of the scalars that a step returns, in variables, so that nothing is fetched unasked."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tf.Variable] = {}

    def update(self, values: Mapping[str, Any], examples: Any, counts: tf.Tensor | None = None) -> None:
        """Take in one step's values, counted by its examples, or not at all where `counts` is False."""
        names = tuple(values)
        if names not in self._sums:
            tracing.outside_of_trace(functools.partial(self._make, names))
        # In float64: a sum in float32 no longer notices its smallest terms once it is a few million times as large.
        scalars = [tf.reduce_mean(tf.cast(value, tf.float64)) for value in values.values()]
        added = tf.stack([*scalars, tf.ones((), tf.float64)]) * tf.cast(examples, tf.float64)
        self._sums[names].assign_add(added if counts is None else tf.where(counts, added, tf.zeros_like(added)))

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return list(self._sums.values())

    def _make(self, names: tuple[str, ...]) -> None:
        self._sums[names] = tf.Variable(tf.zeros(len(names) + 1, tf.float64), trainable=False, name="sums")

    def results(self) -> tuple[dict[str, float], int]:
        """Return the means since the last reset, NaN where nothing was taken in, and over how many examples."""
        fetched = {names: sums.numpy() for names, sums in self._sums.items()}
        counted = {names: sums for names, sums in fetched.items() if sums[-1]} or fetched
        totals: dict[str, list[float]] = {}
        for names, sums in counted.items():
            for name, total in zip(names, sums):
                totals.setdefault(name, [0.0, 0.0])
                totals[name] = [totals[name][0] + total, totals[name][1] + sums[-1]]
        means = {name: float(total / count) if count else math.nan for name, (total, count) in totals.items()}
        return means, int(sum(sums[-1] for sums in fetched.values()))

    def take(self, names: tuple[str, ...]) -> dict[str, tf.Tensor]:
        """Return the means of some scalars, NaN where nothing was taken in, and start them anew: inside a step."""
        sums = self._sums[names].read_value()
        means = sums[:-1] / sums[-1]
        with tf.control_dependencies([means]):
            self._sums[names].assign(tf.zeros_like(sums))
        return dict(zip(names, tf.unstack(means, len(names)))) if names else {}

    def reset(self) -> None:
        """Start the means anew."""
        for sums in self._sums.values():
            sums.assign(tf.zeros_like(sums))
