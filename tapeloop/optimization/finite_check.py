"""Noticing an Inf or a NaN in a step, and what happens to the step then: a bad step changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from tapeloop._backend.assertions import stop_unless
from tapeloop._backend.patching import masked_assignments
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
        goes_on: Whether no step before it has ended the run; None if the host sees to that. See `Masking`.
    """

    finite: tf.Tensor
    overflowed: tf.Tensor | None
    goes_on: tf.Tensor | None = None


@dataclass(frozen=True)
class Guard:
    """What happens to a step that is not finite: here nothing, since nobody looks.

    Attributes:
        check: The checksums; None if nobody looks at them, and every step happens.
        loss_scale: The scale of the loss, which takes part in how a step ends.
    """

    check: FiniteCheck | None
    loss_scale: LossScale

    def update(self, total: tf.Tensor | None, make: Callable[[], tf.Tensor]) -> None:
        """Make an update, unless the checksums of it and of those before it are not finite."""
        make()

    def is_counted(self, total: tf.Tensor | None) -> tf.Tensor | None:
        """Return whether a step of these checksums counts in the logs; None if it does in any case."""
        return None

    def end(self, total: tf.Tensor | None, roll_back: Callable[[], tf.Tensor] | None) -> StepOutcome | None:
        """Roll back a step that was not finite, if there is anything to, and return how it ended."""
        return None

    def keeping_count(self) -> contextlib.AbstractContextManager[None]:
        """Have what keeps the checksums be assigned to inside this context only if the step counts."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Failing(Guard):
    """A bad step fails before its one update, and the run ends with it: nothing has moved, nothing is rolled back.

    It takes some thirty switches and merges off a small step: on two CPU cores it took the smallest MLP from 1.03 to
    0.91 of the time of a loop by hand (`docs/notes.md`).
    """

    def update(self, total: tf.Tensor | None, make: Callable[[], tf.Tensor]) -> None:
        """Fail in place of the update; the host recognises that by its message (`has_stopped`)."""
        assert self.check is not None
        with tf.control_dependencies([self.check.kept.assign(total)]):
            stopped = stop_unless(all_finite(total))
        with tf.control_dependencies([stopped]):
            make()


@dataclass(frozen=True)
class Branching(Guard):
    """A bad step makes no update, and is rolled back, in branches: whoever runs it waits to see which are taken."""

    def update(self, total: tf.Tensor | None, make: Callable[[], tf.Tensor]) -> None:
        """Make an update in a branch."""
        tf.cond(all_finite(total), make, lambda: tf.constant(False))

    def is_counted(self, total: tf.Tensor | None) -> tf.Tensor | None:
        """Return whether the step was finite."""
        return all_finite(total)

    def end(self, total: tf.Tensor | None, roll_back: Callable[[], tf.Tensor] | None) -> StepOutcome | None:
        """Roll back in a branch."""
        assert self.check is not None
        finite = all_finite(total)
        self.check.kept.assign(total)
        if roll_back is not None:
            tf.cond(finite, lambda: tf.constant(False), roll_back)
        return StepOutcome(finite, self.loss_scale.update(total, finite))


@dataclass(frozen=True)
class Masking(Guard):
    """Everything is computed and assigned in any case; what a bad step assigns is what was there before.

    So there is nothing for the host to decide within a call of the loop. After the step that ends the run, the rest of
    the call's steps leave everything as it is too; the host hears of it when the call ends.

    Attributes:
        counts: How far the run has come, in a variable where the steps run; see `new_counts`.
        max_consecutive: The number of consecutive bad steps after which the run goes on.
    """

    counts: tf.Variable
    max_consecutive: int

    def update(self, total: tf.Tensor | None, make: Callable[[], tf.Tensor]) -> None:
        """Make an update, or assign to all that it moves the value that it has."""
        with masked_assignments(self.is_counted(total)):
            make()

    def is_counted(self, total: tf.Tensor | None) -> tf.Tensor:
        """Return whether the step was finite, and none before it has ended the run."""
        return all_finite(total) & self._goes_on()

    def end(self, total: tf.Tensor | None, roll_back: Callable[[], tf.Tensor] | None) -> StepOutcome | None:
        """Roll back, or assign to all that a rollback would move the value that it has."""
        assert self.check is not None
        finite, goes_on = all_finite(total), self._goes_on()
        if roll_back is not None:
            with masked_assignments(~(finite & goes_on)):
                roll_back()
        with masked_assignments(goes_on):
            self.check.kept.assign(total)
            overflowed = self.loss_scale.update(total, finite)
        return StepOutcome(finite, overflowed, goes_on)

    def keeping_count(self) -> contextlib.AbstractContextManager[None]:
        """Keep the checksums of the step that has ended the run."""
        return masked_assignments(self._goes_on())

    def _goes_on(self) -> tf.Tensor:
        return self.counts.read_value()[3] <= self.max_consecutive


def guard_for(
    check: FiniteCheck | None, loss_scale: LossScale, masking: tuple[tf.Variable, int] | None, *, fails: bool = False
) -> Guard:
    """Pick what happens to a step that is not finite.

    Args:
        check: The checksums; None if nobody looks at them.
        loss_scale: The scale of the loss.
        masking: If the step is masked, the counts and the number of bad steps that a mask goes by.
        fails: Whether it has one update, which comes last, and nothing else to undo.
    """
    if check is None:
        return Guard(check, loss_scale)
    if masking is not None:
        return Masking(check, loss_scale, *masking)
    return Failing(check, loss_scale) if fails else Branching(check, loss_scale)


def runs_on_gpu() -> bool:
    """Tell whether steps run on a GPU, which the host keeps busy only while it need not wait for what it computes."""
    return bool(tf.config.list_logical_devices("GPU"))


def all_finite(checksums: tf.Tensor | None) -> tf.Tensor:
    """Return whether all of the checksums are finite."""
    return tf.reduce_all(tf.math.is_finite(checksums))
