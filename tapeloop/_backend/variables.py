"""Reading and assigning variables on the host by one op each.

`variable.assign` and `variable.numpy` go through Python that takes three times as long as the op itself, which an epoch
of few small steps would spend most of its time on. `variable.handle` is what the ops take, and is not documented.
"""

from __future__ import annotations

import tensorflow as tf


def read(variable: tf.Variable) -> tf.Tensor:
    """Return the value of a variable."""
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Set a variable to a tensor of its own shape and dtype, which nobody checks."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
