"""Dynamic loss scaling for float16."""

from __future__ import annotations

import tensorflow as tf

FIRST_SCALE = 2.0**15
GROWS_AFTER = 2000  # finite steps


class LossScale:
    """The number by which a float16 loss is multiplied, so that small gradients do not vanish.

    It halves when a gradient overflows and doubles after `GROWS_AFTER` steps without.

    Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2; the numbers are those of Keras'
    `LossScaleOptimizer`.
    """

    def __init__(self) -> None:
        self.value = tf.Variable(FIRST_SCALE, trainable=False, name="loss_scale")
        self._finite_steps = tf.Variable(0, trainable=False, name="finite_steps")

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return [self.value, self._finite_steps]

    def update(self, finite: tf.Tensor) -> None:
        """Take in how a step ended."""
        grows = finite & (self._finite_steps + 1 >= GROWS_AFTER)
        self._finite_steps.assign(tf.where(finite & ~grows, self._finite_steps + 1, 0))
        halved = tf.maximum(self.value / 2, 1.0)
        self.value.assign(tf.where(finite, tf.where(grows, self.value * 2, self.value), halved))
