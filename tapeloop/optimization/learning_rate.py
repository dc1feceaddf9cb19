"""Learning rates that may change without a new trace: a number, or a schedule times a variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.variables import read
from tapeloop.model.tree import raw


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
        """Return the rate that is a number, or the template's times a multiplier: of a schedule, its rate now."""
        setting = self.setting(multiplier, rate)
        return setting if self._schedule is None else setting * float(self._schedule.at(self._optimizer.iterations))

    def setting(self, multiplier: float, rate: float | None) -> float:
        """Return what `assign` needs for the same rate: the rate, or the multiplier of the schedule."""
        if self._schedule is not None:
            return multiplier
        return self._base() * multiplier if rate is None else rate

    def assign(self, setting: Any) -> None:
        """Set the rate, by the host or inside a step that is traced; see `setting`."""
        if self._schedule is not None:
            self._schedule.multiplier.assign(setting)
        elif not self._is_set(setting):
            self._optimizer.learning_rate = setting

    def _is_set(self, setting: Any) -> bool:
        """Tell, on the host, whether the rate is a number already: most fits set what is there."""
        # To look takes a quarter of the time that Keras takes to set it.
        rate = raw(self._optimizer.learning_rate)
        is_known = isinstance(setting, (int, float)) and isinstance(rate, tf.Variable) and tf.executing_eagerly()
        return is_known and bool(read(rate).numpy() == rate.dtype.as_numpy_dtype(setting))


class Multiplied(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule, or a function without arguments, times a variable."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.multiplier = tf.Variable(1.0, trainable=False)

    def __call__(self, step: Any) -> tf.Tensor:
        """Return the learning rate at a step of the optimizer's own count."""
        return tf.cast(self.at(step), self.multiplier.dtype) * self.multiplier

    def at(self, step: Any) -> Any:
        """Return the schedule's own number at a step."""
        is_schedule = isinstance(self.schedule, keras.optimizers.schedules.LearningRateSchedule)
        return self.schedule(step) if is_schedule else self.schedule()
