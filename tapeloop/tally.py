"""How steps end, and counting them where they run, so that the host need not look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

ANY = np.iinfo(np.int64).max
_STOPPED = "the step was not finite"


class Clock:
    """How far a run has come, in a variable that a compiled loop keeps: counts, then the step and epoch before them.

    Attributes:
        counts: `[batches, moved, bad, bad_in_a_row, step, epoch]`; the first four are those of a `Tally`.
    """

    def __init__(self) -> None:
        with tf.device("CPU:0"):
            self.counts = tf.Variable(tf.zeros(6, tf.int64), trainable=False, name="begun")

    def step(self, *, trains: bool) -> tf.Tensor:
        """Return how many steps were trained before the one that runs."""
        counts = self.counts.read_value()
        return counts[4] + counts[1] if trains else counts[4]

    def epoch(self) -> tf.Tensor:
        """Return how many epochs were trained before the step that runs."""
        return self.counts.read_value()[5]


class Ended(NamedTuple):
    """How a step ended that somebody watched.

    Attributes:
        finite: Whether all in it was finite, so that it moved what trains.
        overflowed: Whether it was not because its loss was scaled too far; None where no loss is.
    """

    finite: tf.Tensor
    overflowed: tf.Tensor | None


@dataclass(frozen=True)
class Tally:
    """What some steps came to.

    Attributes:
        batches: How many were run, each on a batch.
        moved: How many of them moved what trains.
        bad: How many were not finite, and moved nothing.
        bad_in_a_row: How many of the last ones, in this call and before it.
    """

    batches: int = 0
    moved: int = 0
    bad: int = 0
    bad_in_a_row: int = 0

    @classmethod
    def of(cls, counts: Any) -> Tally:
        """Return the tally that a tensor of counts holds."""
        return cls(*map(int, counts.numpy()[:4]))

    def stopped(self) -> Tally:
        """Return the tally with one step more, at which `stop_unless` ended the run."""
        return Tally(self.batches + 1, self.moved, self.bad + 1, self.bad_in_a_row + 1)

    def start(self, step: int = 0, epoch: int = 0) -> tf.Tensor:
        """Return the counts with which the steps after these begin, and how far training has come before them."""
        with tf.device("CPU:0"):
            return tf.constant([0, 0, 0, self.bad_in_a_row, step, epoch], tf.int64)


def limits(batches: int, bad_in_a_row: int) -> tf.Tensor:
    """Return up to which counts, these included, steps go on: after fewer batches, and with so many bad in a row."""
    with tf.device("CPU:0"):
        return tf.constant([batches - 1, ANY, ANY, bad_in_a_row, ANY, ANY], tf.int64)


def counted(counts: tf.Tensor, ended: Ended | None) -> tf.Tensor:
    """Return the counts after one step more.

    Args:
        counts: Those before it.
        ended: How it ended; None where nobody watched.
    """
    row_again = counts * tf.constant([1, 1, 1, 0, 1, 1], tf.int64)
    moved = row_again + tf.constant([1, 1, 0, 0, 0, 0], tf.int64)
    if ended is None:
        return moved
    after = tf.where(ended.finite, moved, counts + tf.constant([1, 0, 1, 1, 0, 0], tf.int64))
    if ended.overflowed is None:
        return after
    return tf.where(ended.overflowed, row_again + tf.constant([1, 0, 0, 0, 0, 0], tf.int64), after)


def stop_unless(finite: tf.Tensor) -> tf.Operation:
    """Return what ends the run of a compiled loop, when it runs, at a step that is not finite; see `has_stopped`."""
    return tf.debugging.Assert(finite, [_STOPPED])


def can_stop() -> bool:
    """Tell whether TensorFlow is set up so that `stop_unless` is heeded, and its failure seen by who runs the step."""
    options = tf.config.optimizer.get_experimental_options()
    return tf.config.experimental.get_synchronous_execution() and not options.get("debug_stripper")


def has_stopped(error: BaseException) -> bool:
    """Tell whether an exception is that of `stop_unless`."""
    return isinstance(error, tf.errors.InvalidArgumentError) and f"[{_STOPPED}]" in str(error)
