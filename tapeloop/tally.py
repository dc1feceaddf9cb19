"""How steps end, and counting them where they run, so that the host need not look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

MOVED, OVERFLOWED, NON_FINITE = range(3)  # how a step may end
ANY = np.iinfo(np.int64).max
# By how a step ended: what it adds to the counts of a `Tally`, and which of them go on.
_ADDED = ((1, 1, 0, 0), (1, 0, 0, 0), (1, 0, 1, 1))
_KEPT = ((1, 1, 1, 0), (1, 1, 1, 0), (1, 1, 1, 1))


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
        return cls(*map(int, counts.numpy()))

    def start(self) -> tf.Tensor:
        """Return the counts with which the steps after these begin."""
        with tf.device("CPU:0"):
            return tf.constant([0, 0, 0, self.bad_in_a_row], tf.int64)


def limits(batches: int, bad_in_a_row: int) -> tf.Tensor:
    """Return up to which counts, these included, steps go on: after fewer batches, and with so many bad in a row."""
    with tf.device("CPU:0"):
        return tf.constant([batches - 1, ANY, ANY, bad_in_a_row], tf.int64)


def counted(counts: tf.Tensor, code: tf.Tensor | None) -> tf.Tensor:
    """Return the counts after one step more.

    Args:
        counts: Those before it.
        code: How it ended: `MOVED`, `OVERFLOWED` or `NON_FINITE`; None where nobody asked.
    """
    if code is None:
        return counts + tf.constant(_ADDED[MOVED], tf.int64)
    kept = tf.gather(tf.constant(_KEPT, tf.int64), code)
    return counts * kept + tf.gather(tf.constant(_ADDED, tf.int64), code)
