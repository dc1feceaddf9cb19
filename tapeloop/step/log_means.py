"""Running means of the scalars that steps return."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from tapeloop._backend.variables import assign, read


class RunningMeans:
    """The running means of the scalars that a step returns, in variables, so that nothing is fetched unasked."""

    def __init__(self) -> None:
        # Steps may return other names in other phases: each set of names has sums of its own.
        self._sums: dict[tuple[str, ...], tf.Variable] = {}

    def prepare(self, names: Iterable[str]) -> None:
        """Make the variables for steps that return scalars of these names."""
        names = tuple(names)
        if names not in self._sums:
            self._sums[names] = tf.Variable(tf.zeros(len(names) + 1, tf.float64), trainable=False, name="sums")

    def update(self, values: Mapping[str, Any], examples: Any, counts: tf.Tensor | None = None) -> None:
        """Take in the scalars of one step, weighted by its examples, or not at all if `counts` is False."""
        # In float64: a sum in float32 no longer notices its smallest terms once it is a few million times as large.
        scalars = [tf.reduce_mean(tf.cast(value, tf.float64)) for value in values.values()]
        added = tf.stack([*scalars, tf.ones((), tf.float64)]) * tf.cast(examples, tf.float64)
        added = added if counts is None else tf.where(counts, added, tf.zeros_like(added))
        self._sums[tuple(values)].assign_add(added)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that hold the sums."""
        return list(self._sums.values())

    def named_variables(self) -> dict[str, list[tf.Variable]]:
        """Return the variables that hold the sums, by the names of the scalars."""
        return {f"means/{','.join(names)}": [sums] for names, sums in self._sums.items()}

    def results(self) -> tuple[dict[str, float], int]:
        """Return the means since the last reset, NaN if nothing was taken in, and the number of examples."""
        fetched = {names: read(sums).numpy() for names, sums in self._sums.items()}
        # Names that no step of this epoch returned are left out; but if no step counted, all are there, as NaN.
        counted = {names: sums for names, sums in fetched.items() if sums[-1]} or fetched
        totals: dict[str, tuple[float, float]] = {}
        for names, sums in counted.items():
            for name, total in zip(names, sums):
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + total, before[1] + sums[-1]
        means = {name: float(total / count) if count else math.nan for name, (total, count) in totals.items()}
        return means, int(sum(sums[-1] for sums in fetched.values()))

    def pop_results(self, names: tuple[str, ...]) -> dict[str, tf.Tensor]:
        """Return the means of scalars of these names, NaN if nothing was taken in, and reset them: inside a step."""
        sums = self._sums[names].read_value()
        means = sums[:-1] / sums[-1]
        # A traced function keeps the order of what reads and writes one variable.
        self._sums[names].assign(tf.zeros_like(sums))
        return dict(zip(names, tf.unstack(means, len(names)))) if names else {}

    def reset(self) -> None:
        """Start the means anew."""
        for sums in self._sums.values():
            assign(sums, _zeros(sums.shape[0]))


@functools.cache
def _zeros(count: int) -> tf.Tensor:
    # Made once: an epoch of few small steps would notice.
    return tf.zeros(count, tf.float64)
