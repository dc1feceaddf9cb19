"""How steps end, and counting them where they run, so that the host need not look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.step.outcome import StepOutcome

ANY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StepCounts:
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
    def of(cls, counts: Any) -> StepCounts:
        """Return the tally that a tensor of counts holds."""
        return cls(*map(int, counts.numpy()[:4]))

    def stopped(self) -> StepCounts:
        """Return the tally with one step more, at which `stop_unless` ended the run."""
        return StepCounts(self.batches + 1, self.moved, self.bad + 1, self.bad_in_a_row + 1)

    def start(self, step: int = 0, epoch: int = 0) -> tf.Tensor:
        """Return the counts with which the steps after these begin, and how far training has come before them."""
        with tf.device("CPU:0"):
            return tf.constant([0, 0, 0, self.bad_in_a_row, step, epoch], tf.int64)


def limits(batches: int, bad_in_a_row: int) -> tf.Tensor:
    """Return up to which counts, these included, steps go on: after fewer batches, and with so many bad in a row."""
    with tf.device("CPU:0"):
        return tf.constant([batches - 1, ANY, ANY, bad_in_a_row, ANY, ANY], tf.int64)


def counted(counts: tf.Tensor, ended: StepOutcome | None) -> tf.Tensor:
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
