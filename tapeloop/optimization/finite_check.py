"""Noticing what is not finite in a step, and undoing such a step, so that a bad batch changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tapeloop.errors import NonFiniteError, listed
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo


class FiniteCheck:
    """Watches one selection's steps: the sum of each loss and gradient is finite just where all of it is.

    The sums of a step are added up in a tensor. What stands in a branch or a loop of the traced step has no tensor to
    show for it, and adds to a variable, which also holds the sums of a step that was not finite.
    """

    def __init__(self, selection: Selection) -> None:
        self._places = {variable: 1 + place for place, variable in enumerate(selection.trained)}
        self._sums = tf.Variable(tf.zeros(1 + len(self._places)), trainable=False, name="sums")

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return [self._sums]

    def sums(self, loss: tf.Tensor | None, gradients: Sequence[tuple[tf.Tensor, VariableInfo]]) -> tf.Tensor:
        """Return the sums of what an update is made of: of its loss, then of the gradient of each variable."""
        places = [self._places[variable] for _, variable in gradients]
        found = [tf.reduce_sum(tf.cast(gradient, tf.float32)) for gradient, _ in gradients]
        loss = tf.zeros(()) if loss is None else tf.cast(loss, tf.float32)
        if places == list(self._places.values()):
            return tf.stack([loss, *found])
        return tf.scatter_nd([[place] for place in (0, *places)], tf.stack([loss, *found]), self._sums.shape)

    def begin(self) -> None:
        """Forget what branches and loops of the last step added."""
        self._sums.assign(tf.zeros_like(self._sums))

    def add(self, sums: tf.Tensor) -> None:
        """Take in the sums of an update in a branch or a loop."""
        self._sums.assign_add(sums)

    def added(self) -> tf.Tensor:
        """Return what branches and loops of this step added so far."""
        return self._sums.read_value()

    def keep(self, sums: tf.Tensor) -> tf.Tensor:
        """Hold on to the sums of a step, for the case that it was not finite."""
        return self._sums.assign(sums)

    def error(self, step: int, epoch: int, also: str = "") -> NonFiniteError:
        """Return the error of the step that was not finite."""
        bad = ~tf.math.is_finite(self._sums).numpy()
        paths = tuple(variable.path for variable, place in self._places.items() if bad[place])
        what = [f"the loss is {self._sums.numpy()[0]}"] if bad[0] else []
        if paths:
            count = f"{len(paths)} of {len(self._places)} variables"
            what.append(f"the gradients of {count} are not finite: {listed(paths)}")
        error = NonFiniteError(
            f"At step {step}, epoch {epoch}, {', and '.join(what)}. {also}The model and the optimizers are as before "
            "it. Look at its batch (a label outside of the classes gives NaN on a GPU and under XLA), lower the "
            "learning rate or set `clip_norm`; `nonfinite='skip'` goes on without such batches."
        )
        error.step, error.paths = step, paths
        return error


def is_finite(sums: tf.Tensor) -> tf.Tensor:
    """Tell whether all that was summed is finite."""
    return tf.reduce_all(tf.math.is_finite(sums))
