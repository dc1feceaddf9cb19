"""How far a run has come, where a compiled loop keeps it."""

from __future__ import annotations

import tensorflow as tf


class Clock:
    """How far a run has come, in a variable that a compiled loop keeps: counts, then the step and epoch before them.

    Attributes:
        counts: `[batches, moved, bad, bad_in_a_row, step, epoch]`; the first four are those of a `StepCounts`.
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
