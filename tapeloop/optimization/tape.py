"""The tape that watches chosen variables and nothing else, and the gradients that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tapeloop._backend.tracing import op_count
from tapeloop.errors import DisconnectedError
from tapeloop.model.tree import VariableInfo
from tapeloop.optimization.diagnosis import disconnected


class GroupTape(tf.GradientTape):
    """A gradient tape that watches the variables it was made for and nothing else, but for what `watch` adds.

    Attributes:
        variables: The variables that it watches.
        persistent: Whether gradients can be taken from it more than once.
        spent: Whether its one gradient was taken.
        start: How many ops the traced graph had when it began to record.
        stop: How many it had when it ended, once it has.

    Example:
        >>> class Custom(tl.Trainer):
        ...     def train_step(self, batch):
        ...         with self.tape() as tape:  # a `GroupTape`
        ...             loss = self.compute_loss(batch, training=True)
        ...         watched.extend(variable.path for variable in tape.variables)
        ...         self.update(tape, loss)
        ...         return {"loss": loss}
        >>> watched = []
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> logs = Custom(model, tl.Freeze("base"), loss="mse").train_on_batch(np.ones((8, 4)), np.ones((8, 2)))
        >>> watched
        ['head/kernel', 'head/bias']
    """

    def __init__(self, variables: Sequence[VariableInfo], persistent: bool = False) -> None:
        # A tape that watches by itself would record the frozen backbone too: Keras' `trainable=False` does not reach
        # the `tf.Variable` under a Keras variable.
        super().__init__(persistent=persistent, watch_accessed_variables=False)
        self.variables = tuple(variables)
        self.persistent = persistent
        self.spent = False
        self.start = 0
        self.stop: int | None = None

    def __enter__(self) -> GroupTape:
        super().__enter__()
        self.start = op_count()
        for variable in self.variables:
            self.watch(variable.tf_variable)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop = op_count()
        super().__exit__(*error)

    def precedes(self, tensor: tf.Tensor) -> bool:
        """Tell whether a tensor of a graph was computed when recording had ended."""
        if self.stop is None or tf.executing_eagerly():
            return False
        return any(tensor.op is op for op in tensor.graph.get_operations()[self.stop :])


def gradients_of(
    tape: GroupTape, loss: tf.Tensor, scale: tf.Tensor | None, *, allow_unconnected: bool = False
) -> list[tf.Tensor]:
    """Return the gradient of `loss` for each variable that `tape` watches.

    Args:
        tape: What recorded the loss.
        loss: A scalar.
        scale: By what the loss is multiplied while its gradients are computed, and they are divided after, or None.
        allow_unconnected: Whether a variable may be without a gradient, which is then zero.

    Raises:
        DisconnectedError: For some of the variables there is none.
        RuntimeError: The tape was used before.
        TypeError: `tape` is no tape of the trainer's.
        ValueError: `loss` is not a scalar.
    """
    if not isinstance(tape, GroupTape):
        raise TypeError(f"`update` takes what `self.tape(...)` returned. Received: {tape!r}.")
    if not tf.is_tensor(loss) or loss.shape.rank != 0:
        raise ValueError(f"The loss must be a scalar tensor, such as the mean over the batch. Received: {loss!r}.")
    if tape.spent:
        raise RuntimeError(
            f"The tape of {len(tape.variables)} variables was used before: it gives gradients once. Make another for "
            "the second loss, or one that lasts: `self.tape(..., persistent=True)`."
        )
    tape.spent = not tape.persistent
    # The scale is the gradient of the loss with respect to itself: nothing in the user's loss changes.
    sources = [variable.tf_variable for variable in tape.variables]
    gradients = tape.gradient(loss, sources, None if scale is None else tf.cast(scale, loss.dtype))
    # A gradient of None would freeze a variable that is said to train: that is never silent.
    missing = [variable for gradient, variable in zip(gradients, tape.variables) if gradient is None]
    # A loss behind the tape is a mistake whatever may be unconnected: nothing in it has a gradient.
    if missing and tape.precedes(loss):
        raise DisconnectedError(
            f"{len(missing)} of the {len(tape.variables)} variables that should train get no gradient: the loss is "
            "computed after the `with self.tape(...)` block: move it inside."
        )
    # Integers are connected with no loss at all.
    if allow_unconnected:
        missing = [variable for variable in missing if tf.as_dtype(variable.dtype).is_integer]
    if missing:
        raise DisconnectedError(disconnected(loss, missing, len(tape.variables)))
    # A row of an embedding that is read twice has two slices, which must be one sum before it is clipped or squared.
    dense = [
        _zero(variable) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(gradients, tape.variables)
    ]
    for gradient, source in zip(dense, sources):
        gradient.set_shape(source.shape)  # which a custom gradient may not know
    if scale is None:
        return dense
    return [
        gradient if variable.is_overwritten else gradient / tf.cast(scale, gradient.dtype)
        for gradient, variable in zip(dense, tape.variables)
    ]


def _zero(variable: VariableInfo) -> tf.Tensor:
    """Return what stands for the gradient of a variable that has none, and changes nothing."""
    # Where the "gradient" is the next value, that is the value which the variable has.
    value = variable.tf_variable
    return value.read_value() if variable.is_overwritten else tf.zeros(value.shape, value.dtype)
