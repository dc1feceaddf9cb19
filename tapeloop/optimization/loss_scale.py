"""Dynamic loss scaling for float16."""

from __future__ import annotations

import tensorflow as tf

from tapeloop.model.selection import Selection

FIRST_SCALE = 2.0**15
GROWS_AFTER = 2000  # finite steps


class LossScale:
    """The number by which a float16 loss is multiplied, so that small gradients do not vanish.

    It halves when a gradient overflows and doubles after `GROWS_AFTER` steps without. A model that computes in no
    float16 has none.

    Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2; the numbers are those of Keras'
    `LossScaleOptimizer`.

    Attributes:
        value: The scale, or None before a selection needs one.
        variables: The scale, and the number of finite steps since it last changed.
    """

    def __init__(self) -> None:
        self.value: tf.Variable | None = None
        self.variables: list[tf.Variable] = []

    def prepare(self, selection: Selection) -> None:
        """Make the scale, if a layer of the model computes in float16."""
        if self.value is None and any(layer.object.compute_dtype == "float16" for layer in selection.tree.layers):
            self.rebuild(True)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Return its variables by name."""
        return {str(number): variable for number, variable in enumerate(self.variables)}

    def rebuild(self, exists: bool) -> None:
        """Make the scale if there is none and there shall be one; if there shall be none, begin anew."""
        if not exists:
            self.start_over()
        elif self.value is None:
            self.value = tf.Variable(FIRST_SCALE, trainable=False, name="loss_scale")
            self.variables = [self.value, tf.Variable(0, trainable=False, dtype=tf.int64, name="finite_steps")]

    def start_over(self) -> None:
        """Begin with the first scale."""
        for variable, first in zip(self.variables, (FIRST_SCALE, 0)):
            variable.assign(first)

    def update(self, checksums: tf.Tensor, finite: tf.Tensor) -> tf.Tensor | None:
        """Take in how a step ended, and return whether it overflowed; None if there is no scale.

        Args:
            checksums: Those of the step, the loss first.
            finite: Whether all of them are finite.
        """
        if self.value is None:
            return None
        finite_steps = self.variables[1]
        # A loss that is not finite itself was not scaled too far, and at a scale of 1 nothing is left to lower.
        overflowed = ~finite & tf.math.is_finite(checksums[0]) & (self.value > 1)
        grows = finite & (finite_steps + 1 >= GROWS_AFTER)
        finite_steps.assign(tf.where(finite & ~grows, finite_steps + 1, 0))
        # Not below 1, where the scale would lose gradients that float16 holds without one.
        halved = tf.maximum(self.value / 2, 1.0)
        self.value.assign(tf.where(finite, tf.where(grows, self.value * 2, self.value), halved))
        return overflowed
