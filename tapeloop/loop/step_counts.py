"""Counting how steps end where they run, so that the host need not look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.optimization.finite_check import StepOutcome

UNLIMITED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StepCounts:
    """How the steps of a call ended.

    Attributes:
        batches: The number of steps that ran, each on a batch.
        applied: The number of steps that made their updates.
        skipped: The number of steps that were not finite, and moved nothing.
        consecutive_skipped: The number of skipped steps at the end, in this call and before it.
    """

    batches: int = 0
    applied: int = 0
    skipped: int = 0
    consecutive_skipped: int = 0

    @classmethod
    def of(cls, counts: Any) -> StepCounts:
        """Return the counts that a tensor holds."""
        return cls(*counts.numpy()[:4].tolist())

    def with_failed_step(self) -> StepCounts:
        """Return the counts with one more step, which failed before its update."""
        return StepCounts(self.batches + 1, self.applied, self.skipped + 1, self.consecutive_skipped + 1)


def counts_before(consecutive_skipped: int, step: int, epoch: int) -> tf.Tensor:
    """Return the counts with which a call begins: see `new_counts`."""
    with tf.device("CPU:0"):
        return tf.constant([0, 0, 0, consecutive_skipped, step, epoch], tf.int64)


def limits(batches: int, max_consecutive: int) -> tf.Tensor:
    """Return the highest counts after which a call still begins another step."""
    # One less than the number: another step begins as long as no count is above its limit.
    with tf.device("CPU:0"):
        return tf.constant([batches - 1, UNLIMITED, UNLIMITED, max_consecutive, UNLIMITED, UNLIMITED], tf.int64)


def counted(counts: tf.Tensor, outcome: StepOutcome | None) -> tf.Tensor:
    """Return the counts after one more step.

    Args:
        counts: The counts before it, of shape (6,).
        outcome: How it ended; None if nobody looked.
    """
    # By arithmetic on one tensor, and not by branches: a small step spends more on a `tf.cond` than on all of this.
    row_again = counts * tf.constant([1, 1, 1, 0, 1, 1], tf.int64)
    applied = row_again + tf.constant([1, 1, 0, 0, 0, 0], tf.int64)
    if outcome is None:
        return applied
    after = tf.where(outcome.finite, applied, counts + tf.constant([1, 0, 1, 1, 0, 0], tf.int64))
    # An overflow is the loss scale's business: it neither counts as a bad step nor ends a row of them.
    if outcome.overflowed is not None:
        after = tf.where(outcome.overflowed, row_again + tf.constant([1, 0, 0, 0, 0, 0], tf.int64), after)
    return after if outcome.goes_on is None else tf.where(outcome.goes_on, after, counts)
