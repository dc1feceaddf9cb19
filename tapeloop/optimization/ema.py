"""Exponential moving averages of what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._validation import is_number
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo


@dataclass
class _Average:
    """The average of one variable.

    Attributes:
        variable: What is averaged.
        value: Its average.
        left_at: The step after which it was frozen, or None while it trains.
    """

    variable: tf.Variable
    value: tf.Variable
    left_at: int | None = None

    @classmethod
    def of(cls, variable: VariableInfo) -> _Average:
        """Start the average of a variable at its value."""
        raw = variable.tf_variable
        return cls(raw, tf.Variable(raw.read_value(), trainable=False, name="average"))

    def at(self, step: int, decay: float) -> tf.Tensor:
        """Return the average at a step: that of a frozen variable goes on towards the value at which it was frozen."""
        if self.left_at is None:
            return self.value.read_value()
        kept = tf.cast(decay ** (step - self.left_at), self.value.dtype)
        return self.variable + kept * (self.value - self.variable)


class MovingAverages:
    """An average for each variable from when it first trains: `average += (1 - decay) * (value - average)`.

    It is that of the variable's whole way since then: where one is frozen for a while, what the updates would have made
    of its average is made good when it is next needed. A variable that never trains never gets one.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992; without a correction of
    the start, for each average starts at its variable's value.
    """

    def __init__(self, decay: float | None) -> None:
        """Check and keep the decay.

        Args:
            decay: How much of an average is kept at each step, or None where nothing is averaged.

        Raises:
            ValueError: `decay` is not between 0 and 1.
        """
        if decay is not None and (not is_number(decay) or not 0 < decay < 1):
            raise ValueError(f"`ema` must be above 0 and below 1, such as 0.999. Received: {decay!r}.")
        self._swapped = False
        self._decay = None if decay is None else float(decay)
        self._averages: dict[VariableInfo, _Average] = {}

    def prepare(self, selection: Selection, step: int) -> None:
        """Start the averages of what trains and has none, take up those of what trains again, leave the others.

        Args:
            selection: What trains from now on.
            step: How many steps were trained.
        """
        if self._decay is None:
            return
        trained = [variable for variable in selection.trained if not variable.is_overwritten]
        # While a variable is frozen its average would go on towards the frozen value. That has a closed form, so
        # nothing is computed meanwhile: it is made good when the variable trains again, or when the averages are
        # swapped in.
        for variable, average in self._averages.items():
            if variable not in selection.group_of:
                average.left_at = step if average.left_at is None else average.left_at
            elif average.left_at is not None:
                average.value.assign(average.at(step, self._decay))
                average.left_at = None
        for variable in trained:
            if variable not in self._averages:
                self._averages[variable] = _Average.of(variable)

    @property
    def decay(self) -> float | None:
        """How much of an average is kept at each step."""
        return self._decay

    def named_variables(self) -> dict[str, tf.Variable]:
        """Return the averages by the paths of their variables."""
        return {variable.path: average.value for variable, average in self._averages.items()}

    def describe(self) -> dict[str, Any]:
        """Return, as JSON has it, what `rebuild` needs to make the same averages."""
        left_at = {variable.path: average.left_at for variable, average in self._averages.items()}
        return {"decay": self._decay, "left_at": left_at}

    def rebuild(self, description: Mapping[str, Any], by_path: Mapping[str, VariableInfo]) -> bool:
        """Make the averages that were described, and tell whether some of those there were are gone.

        Args:
            description: What `describe` returned, in this process or another.
            by_path: The model's variables by their paths; others are left out.
        """
        before, self._averages = self._averages, {}
        for path, left_at in description["left_at"].items():
            if path in by_path:
                variable = by_path[path]
                average = before.pop(variable, None) or _Average.of(variable)
                average.left_at = left_at
                self._averages[variable] = average
        return bool(before)

    def start_over(self) -> None:
        """Let go of all averages: each starts anew when its variable next trains."""
        self._averages = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """All averages."""
        return [average.value for average in self._averages.values()]

    def check_may_train(self) -> None:
        """Check that the variables have their own values.

        Raises:
            RuntimeError: They have those of their averages.
        """
        self.check_own_values("`fit` was called inside `ema_weights()`, which would undo it at its end.")

    def check_exists(self) -> None:
        """Check that what trains is averaged.

        Raises:
            ValueError: It is not.
        """
        if self._decay is None:
            raise ValueError("To validate with averages, make the trainer with `ema=0.999`, say: it has no `ema`.")

    def check_own_values(self, said: str) -> None:
        """Check that the variables have their own values.

        Args:
            said: What was asked for, and why it cannot be.

        Raises:
            RuntimeError: They have those of their averages.
        """
        if self._swapped:
            raise RuntimeError(f"{said} Call it outside.")

    def update(self, variables: Iterable[VariableInfo]) -> None:
        """Take the variables' new values into their averages."""
        if self._decay is None:
            return
        for variable in variables:
            if variable.is_overwritten:
                continue
            average = self._averages[variable].value
            # In the average's own type: with a decay near 1, a float16 difference would vanish.
            average.assign_sub(tf.cast(1 - self._decay, average.dtype) * (average - variable.tf_variable))

    def held(self, variables: Iterable[VariableInfo]) -> list[tf.Variable]:
        """Return the averages of these variables."""
        return [self._averages[variable].value for variable in variables if variable in self._averages]

    @contextlib.contextmanager
    def swap(self, step: int) -> Iterator[None]:
        """Give what has trained the values of its averages inside this context, and its own back after.

        Args:
            step: How many steps were trained.

        Raises:
            RuntimeError: There are no averages, or not yet.
        """
        if self._decay is None or not self._averages:
            when = "the trainer was made without `ema`" if self._decay is None else "nothing was trained yet"
            raise RuntimeError(
                f"There are no averages to evaluate with: {when}. Pass `ema=0.999`, say, and `fit` first."
            )
        # Within another such context the averages are in place already.
        outer, self._swapped = self._swapped, True
        own = [(average.variable, average.variable.numpy()) for average in self._averages.values()]
        averaged = [average.at(step, self._decay) for average in self._averages.values()]
        try:
            for (variable, _), value in zip(own, averaged if not outer else []):
                variable.assign(value)
            yield
        finally:
            for variable, value in own:
                variable.assign(value)
            self._swapped = outer
