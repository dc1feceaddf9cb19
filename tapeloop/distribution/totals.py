"""What devices add up on their own while a call of the loop runs, put together when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from tapeloop._backend.collectives import all_reduced
from tapeloop.distribution.adoption import Copies


class Totals:
    """Sums and averages over all devices, between which nothing goes over the wire.

    Sums, such as those of logs and metrics, go on from what they were on the chief's first device, and from zero on
    all others: so their sum is that of all batches, whoever has seen them. What each device moves by itself, such as
    batch statistics, becomes its mean: a moving average of means is the mean of the moving averages. Whole numbers,
    such as the states of seeds, become what the first has.
    """

    def __init__(self, sums: Sequence[tf.Variable], moved: Sequence[tf.Variable], copies: Copies) -> None:
        """Take in what is added up, and what each device moves by itself."""
        self._copies = copies
        self._replicas = replicas = copies.replicas
        self._sums = sums
        # Each variable, what the first of all devices gives of it, and what the others give.
        self._shares = [(each, 1.0, 1.0) for each in sums]
        for each in moved:
            mean = 1.0 / replicas.count
            self._shares.append((each, mean, mean) if each.dtype.is_floating else (each, 1.0, 0.0))
        for variable in (replicas.token, *sums, *moved):
            copies.all_of(variable)
        self.begin = tf.function(self._begin, autograph=False)
        self.end = tf.function(self._end, autograph=False, input_signature=[tf.TensorSpec([2], tf.float64)])

    def _begin(self) -> None:
        """Have each sum go on from what it is on the first of all devices alone."""
        for variable in self._sums:
            for replica, copy in enumerate(self._copies.all_of(variable)):
                if replica or not self._replicas.is_chief:
                    copy.assign(tf.zeros_like(copy))

    def _end(self, told: tf.Tensor) -> tf.Tensor:
        """Give every device the sums and the averages of all, and return the means of two numbers that each tells."""
        group, instance = self._replicas.group()
        sizes = [math.prod(variable.shape) for variable, *_ in self._shares] + [2]
        results = []
        for replica, device in enumerate(self._replicas.devices):
            with tf.device(device):
                place = 0 if self._replicas.is_chief and not replica else 1
                own = [(self._copies.of(variable, replica), shares[place]) for variable, *shares in self._shares]
                # All in one message: float64 holds whole numbers and float32 as they are.
                parts = [tf.reshape(tf.cast(copy, tf.float64) * share, [-1]) for copy, share in own]
                flat = tf.concat([*parts, told / self._replicas.count], 0)
                token = self._copies.of(self._replicas.token, replica)
                *added, means = tf.split(all_reduced(flat, group, instance, token), sizes)
                for (copy, _), value in zip(own, added):
                    copy.assign(tf.cast(tf.reshape(value, copy.shape), copy.dtype))
                results.append(means)
        return results[0]
