"""Learning rates that may change without a new trace: a number, or a schedule times a variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals


class Rate:
    """The learning rate of one optimizer: its template's number or schedule, times a multiplier that may change."""

    def __init__(self, optimizer: keras.optimizers.Optimizer, base: Callable[[], float]) -> None:
        """Keep an optimizer.

        Args:
            optimizer: Whose learning rate it is.
            base: Gives the number of its template.
        """
        self._optimizer = optimizer
        self._base = base
        schedule = keras_internals.schedule_of(optimizer)
        self._schedule = None if schedule is None else Multiplied(schedule)
        # The schedule is in the trace, the multiplier is a variable: another phase's costs no trace.
        if self._schedule is not None:
            optimizer.learning_rate = self._schedule

    def get(self, multiplier: float, rate: float | None) -> float:
        """Return the rate that `set` would give now."""
        if self._schedule is not None:
            return multiplier * self._schedule.unmultiplied(self._optimizer.iterations)
        return self.setting(multiplier, rate)

    def set(self, multiplier: float, rate: float | None) -> None:
        """Set the rate to a number, or to the template's times a multiplier."""
        if self._schedule is not None:
            self._schedule.multiplier.assign(multiplier)
        else:
            self._optimizer.learning_rate = self.setting(multiplier, rate)

    def setting(self, multiplier: float, rate: float | None) -> float:
        """Return what `assign_in_step` needs for the same rate: the rate, or the multiplier of the schedule."""
        if self._schedule is not None:
            return multiplier
        return self._base() * multiplier if rate is None else rate

    def assign_in_step(self, setting: tf.Variable) -> None:
        """Set the rate inside a step that is traced; see `setting`."""
        if self._schedule is not None:
            self._schedule.multiplier.assign(setting)
        else:
            # The public setter takes no tensor.
            variable = keras_internals.learning_rate_variable(self._optimizer)
            assert variable is not None
            variable.assign(setting)


class Multiplied(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule, or a function without arguments, times a variable."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.multiplier = tf.Variable(1.0, trainable=False)

    def __call__(self, step: Any) -> tf.Tensor:
        """Return the learning rate at a step of the optimizer's own count."""
        return tf.cast(self._at(step), self.multiplier.dtype) * self.multiplier

    def unmultiplied(self, step: Any) -> float:
        """Return the schedule's own number at a step."""
        return float(self._at(step))

    def _at(self, step: Any) -> Any:
        is_schedule = isinstance(self.schedule, keras.optimizers.schedules.LearningRateSchedule)
        return self.schedule(step) if is_schedule else self.schedule()
