"""Exponential moving averages of what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import tensorflow as tf

from tapeloop.selection import Selection
from tapeloop.tree import VariableInfo


class Averages:
    """An average for each variable from when it first trains: `average += (1 - decay) * (value - average)`.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992; without a correction of
    the start, for each average starts at its variable's value.

    Attributes:
        decay: How much of the average is kept by each update, or None where nothing is averaged.
    """

    def __init__(self, decay: float | None) -> None:
        """Check and keep the decay.

        Raises:
            ValueError: `decay` is not between 0 and 1.
        """
        if decay is not None and (isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < 1):
            raise ValueError(f"`ema` must be above 0 and below 1, such as 0.999. Received: {decay!r}.")
        self.decay = decay
        self._averages: dict[int, tf.Variable] = {}

    def prepare(self, selection: Selection) -> None:
        """Start the averages of what trains and has none."""
        for variable in selection.trained if self.decay is not None else ():
            key = id(variable.variable)
            if key not in self._averages:
                self._averages[key] = tf.Variable(variable.tensor, trainable=False, name="average")

    def update(self, variables: Iterable[VariableInfo]) -> None:
        """Take the variables' new values into their averages."""
        if self.decay is not None:
            for variable in variables:
                average = self._averages[id(variable.variable)]
                average.assign_sub(tf.cast(1 - self.decay, average.dtype) * (average - variable.tensor))

    def held(self, variables: Iterable[VariableInfo]) -> list[tf.Variable]:
        """Return the averages of these variables."""
        keys = [id(variable.variable) for variable in variables]
        return [self._averages[key] for key in keys if key in self._averages]

    @contextlib.contextmanager
    def swapped(self, selection: Selection) -> Iterator[None]:
        """Give what trains the values of its averages inside this context, and its own back after.

        Raises:
            RuntimeError: There are no averages, or not yet.
        """
        held = [
            (v.tensor, self._averages[id(v.variable)]) for v in selection.trained if id(v.variable) in self._averages
        ]
        if not held:
            when = "the trainer was made without `ema`" if self.decay is None else "nothing was trained yet"
            raise RuntimeError(
                f"There are no averages to evaluate with: {when}. Pass `ema=0.999`, say, and `fit` first."
            )
        own = [variable.numpy() for variable, _ in held]
        try:
            for variable, average in held:
                variable.assign(average)
            yield
        finally:
            for (variable, _), value in zip(held, own):
                variable.assign(value)
