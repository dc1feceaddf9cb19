"""Noticing an Inf or a NaN in a step, and what happens to the step then: a bad step changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from tapeloop._backend.assertions import stop_unless
from tapeloop.errors import NonFiniteError, listed
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo
from tapeloop.optimization.loss_scale import LossScale


class FiniteCheck:
    """The checksums of one selection's steps: the sum of a loss or gradient is finite if all of it is.

    The checksums of a step are a tensor: the loss first, then a sum for each variable. An update in a branch or a loop
    of the traced step has no tensor to show, and adds to a variable, which also keeps the checksums of a bad step.

    Attributes:
        kept: That variable.
    """

    def __init__(self, selection: Selection) -> None:
        self._places = {variable: 1 + place for place, variable in enumerate(selection.trained)}
        self.kept = tf.Variable(tf.zeros(1 + len(self._places)), trainable=False, name="checksums")

    def checksums(self, loss: tf.Tensor | None, gradients: Sequence[tuple[tf.Tensor, VariableInfo]]) -> tf.Tensor:
        """Return the checksums of one update."""
        # A sum of finite numbers is finite, but for an overflow at 1e38: one reduction a gradient is all that this
        # costs. float16 is summed in float32.
        places = [self._places[variable] for _, variable in gradients]
        found = [tf.reduce_sum(tf.cast(gradient, tf.float32)) for gradient, _ in gradients]
        loss = tf.zeros(()) if loss is None else tf.cast(loss, tf.float32)
        # One update of all that trains is what most steps make: then each sum is at its place already.
        if places == list(self._places.values()):
            return tf.stack([loss, *found])
        return tf.scatter_nd([[place] for place in (0, *places)], tf.stack([loss, *found]), self.kept.shape)

    def total(self, checksums: Sequence[tf.Tensor], has_control_flow: bool) -> tf.Tensor:
        """Return the checksums of all updates so far."""
        added = [self.kept.read_value()] if has_control_flow else []
        return tf.add_n([*checksums, *added]) if checksums or added else tf.zeros(self.kept.shape)

    def error(self, step: int, epoch: int, also: str = "") -> NonFiniteError:
        """Return the error of the bad step whose checksums were kept."""
        kept = self.kept.numpy()
        paths = tuple(v.path for v, place in self._places.items() if not tf.math.is_finite(kept[place]))
        what = [] if tf.math.is_finite(kept[0]) else [f"the loss is {kept[0]}"]
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


class StepOutcome(NamedTuple):
    """How a step ended, if its checksums were looked at.

    Attributes:
        finite: Whether all in it was finite, so that its updates happened.
        overflowed: Whether it was not finite because its loss was scaled too far; None if no loss is scaled.
    """

    finite: tf.Tensor
    overflowed: tf.Tensor | None


@dataclass(frozen=True)
class Ending:
    """What happens to a step that is not finite. The build of a step picks one, from the plan.

    Attributes:
        check: The checksums; None if nobody looks at them, and every step happens.
        loss_scale: The scale of the loss, which takes part in how a step ends.
        fails: Whether a bad step fails before its one update, and the run ends with it: nothing has moved, nothing is
            rolled back. Otherwise it makes no update, and what it moved before is put back. To fail is cheaper: on two
            CPU cores it took the smallest MLP from 1.03 to 0.91 of the time of a loop by hand (`docs/notes.md`).
    """

    check: FiniteCheck | None
    loss_scale: LossScale
    fails: bool = False

    def guard(self, total: tf.Tensor | None, update: Callable[[], tf.Tensor]) -> None:
        """Make an update, unless the checksums of it and of those before it are not finite."""
        if self.check is None:
            update()
        elif self.fails:
            # An `Assert` before the update takes some thirty switches and merges off a small step. The host recognises
            # it by its message (`has_stopped`), and makes a `NonFiniteError` of it.
            with tf.control_dependencies([self.check.kept.assign(total)]):
                stopped = stop_unless(all_finite(total))
            with tf.control_dependencies([stopped]):
                update()
        else:
            tf.cond(all_finite(total), update, lambda: tf.constant(False))

    def is_counted(self, total: tf.Tensor | None) -> tf.Tensor | None:
        """Return whether a step of these checksums counts in the logs; None if it does in any case."""
        return None if self.check is None or self.fails else all_finite(total)

    def roll_back_if_bad(
        self, total: tf.Tensor | None, roll_back: Callable[[], tf.Tensor] | None
    ) -> StepOutcome | None:
        """Roll back a step that was not finite, if there is anything to, and return how it ended."""
        if self.check is None or self.fails:
            return None
        finite = all_finite(total)
        self.check.kept.assign(total)
        if roll_back is not None:
            tf.cond(finite, lambda: tf.constant(False), roll_back)
        return StepOutcome(finite, self.loss_scale.update(total, finite))


def all_finite(checksums: tf.Tensor | None) -> tf.Tensor:
    """Return whether all of the checksums are finite."""
    return tf.reduce_all(tf.math.is_finite(checksums))
