"""How gradients become updates: scaled, guarded, clipped, applied, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tapeloop._backend.assertions import stop_unless
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo
from tapeloop.optimization.clipping import Clipping
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.finite_check import FiniteCheck, is_finite
from tapeloop.optimization.following import Follow, Pair, move
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.microbatches import Microbatches
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.optimization.tape import GroupTape, gradients_of
from tapeloop.optimization.untracked import handles_behind

Gradients = Sequence[tuple[tf.Tensor, VariableInfo]]


@dataclass
class PendingUpdate:
    """One `update` or `apply` of a step.

    Attributes:
        variables: What it updates.
        nested: Whether it stands in a branch or a loop of the traced step.
        gradients: Its gradients, where they wait for those of the other micro-batches.
        overwrites: Of these, what overwrites its variable.
        loss: Its loss, where that is known, likewise.
    """

    variables: list[VariableInfo]
    nested: bool
    gradients: list[tf.Tensor] = field(default_factory=list)
    overwrites: list[tf.Tensor] = field(default_factory=list)
    loss: list[tf.Tensor] = field(default_factory=list)

    def paired(self, gradients: Sequence[tf.Tensor], overwrites: Sequence[tf.Tensor]) -> list[Any]:
        """Pair what was averaged with the variables, in their order."""
        kinds = {False: iter(gradients), True: iter(overwrites)}
        return [(next(kinds[variable.is_overwritten]), variable) for variable in self.variables]


@dataclass
class StepContext:
    """A training step while it is traced, or run eagerly.

    Attributes:
        selection: What trains.
        guard: What watches it, if anything does.
        waits: Whether updates wait for other micro-batches.
        graph: The graph into which the user's step is traced, or None where it runs eagerly.
        calls: The updates so far.
        follows: What is to follow others once all micro-batches are done.
        sums: What the guard is to look at, of each update that is neither in a branch nor in a loop.
        used: The identities of the handles of the variables that would get a gradient if they were watched.
        updating: Whether an update is being made at the moment.
        may_stop: Whether it waits for what the user computes to be traced, to tell whether there is anything to undo.
        stops: Whether a step that is not finite ends the run by failing, since nothing in it is to be undone.
    """

    selection: Selection
    guard: FiniteCheck | None
    waits: bool = False
    graph: Any = None
    calls: list[PendingUpdate] = field(default_factory=list)
    follows: list[Follow] = field(default_factory=list)
    sums: list[tf.Tensor] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    updating: bool = False
    may_stop: bool = False
    stops: bool = False

    def is_nested(self) -> bool:
        """Tell whether what is traced now stands in a branch or a loop of the user's step."""
        return self.graph is not None and tf.compat.v1.get_default_graph() is not self.graph

    @property
    def nests(self) -> bool:
        """Whether an update stands in a branch or a loop."""
        return any(call.nested for call in self.calls)

    def total(self) -> tf.Tensor:
        """Return the sums of all updates so far."""
        assert self.guard is not None
        added = [self.guard.added()] if self.nests else []
        return tf.add_n([*self.sums, *added]) if self.sums or added else tf.zeros(self.guard.variables[0].shape)


class Updates:
    """Everything between the gradients of a step and the new values of its variables.

    Attributes:
        optimizers: The optimizers of all groups.
        clipping: The norms to which gradients are clipped.
        microbatches: In how many pieces a batch is cut.
        averages: The averages of what trains.
        loss_scale: By what losses are multiplied, where a layer computes in float16.
        running: The step that is being traced, or run eagerly, while one is.
        was_warned: Whether it was said that a step updates nothing.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        clipping: Clipping,
        microbatches: Microbatches,
        averages: MovingAverages,
        *,
        looks: bool,
        ends_at_bad: bool,
    ) -> None:
        """Keep the parts.

        Args:
            optimizers: The optimizers of all groups.
            clipping: The norms to which gradients are clipped.
            microbatches: In how many pieces a batch is cut.
            averages: The averages of what trains.
            looks: Whether what is not finite is looked for.
            ends_at_bad: Whether the run ends at the first step that is not finite.
        """
        self.optimizers = optimizers
        self.clipping = clipping
        self.microbatches = microbatches
        self.averages = averages
        self.loss_scale: LossScale | None = None
        self.running: StepContext | None = None
        self.was_warned = False
        self._looks = looks
        self._ends_at_bad = ends_at_bad

    def prepare(self, selection: Selection, step: int, *, changing: bool) -> None:
        """Make all that training with a selection needs, before anything is traced.

        Args:
            selection: What trains.
            step: How many steps were trained.
            changing: Whether the policy changes as training goes, so that other groups may come later.

        Raises:
            PolicyError: The optimizers, or the norms to clip to, are not for its groups.
        """
        self.clipping.check(selection, changing=changing)
        self.optimizers.prepare(selection, changing=changing)
        self.averages.prepare(selection, step)
        self.microbatches.prepare()
        if self.loss_scale is None and any(layer.object.compute_dtype == "float16" for layer in selection.tree.layers):
            self.loss_scale = LossScale()

    def new_guard(self, selection: Selection) -> FiniteCheck | None:
        """Return what is to watch the steps of a selection, or None where nothing is."""
        return FiniteCheck(selection) if self._looks or self.loss_scale is not None else None

    @property
    def ends_at_bad(self) -> bool:
        """Whether the run ends at the first step that is not finite."""
        return self._ends_at_bad and self.loss_scale is None

    def gradients(self, tape: GroupTape, loss: tf.Tensor) -> list[tuple[tf.Tensor, VariableInfo]]:
        """Return the gradient of a loss for each variable that `tape` watches."""
        scale = None if self.loss_scale is None else self.loss_scale.value
        gradients = gradients_of(tape, loss, scale)
        if self.running is not None:
            self.running.used |= handles_behind(loss, tape.start)
        return list(zip(gradients, tape.variables))

    def apply(self, gradients: Gradients, loss: tf.Tensor | None = None) -> None:
        """Update variables by their gradients: now, or, in a micro-batch, when all of them are done.

        Raises:
            RuntimeError: It would have to wait, but stands in a branch or a loop.
        """
        running = self.running
        assert running is not None
        nested = running.is_nested()
        call = PendingUpdate([variable for _, variable in gradients], nested)
        running.calls.append(call)
        if not running.waits:
            self.commit(running, len(running.calls), gradients, loss)
            return
        if nested:
            raise _cannot_wait("update")
        call.gradients = [gradient for gradient, variable in gradients if not variable.is_overwritten]
        call.overwrites = [gradient for gradient, variable in gradients if variable.is_overwritten]
        call.loss = [] if loss is None else [tf.cast(loss, tf.float32)]

    def follow(self, pairs: Sequence[Pair], decay: tf.Tensor) -> None:
        """Move variables towards others: now, or, in a micro-batch, when all of them are done.

        Raises:
            RuntimeError: It would have to wait, but stands in a branch or a loop.
        """
        running = self.running
        if running is None or not running.waits:
            move(pairs, decay)
        elif running.is_nested():
            raise _cannot_wait("follow")
        else:
            running.follows.append(Follow(pairs, len(running.calls), decay))

    def commit(self, running: StepContext, number: int, gradients: Gradients, loss: tf.Tensor | None) -> None:
        """Update variables by their gradients on the whole batch, unless something in the step was not finite.

        Args:
            running: The step.
            number: The update's number in it, from 1.
            gradients: The gradients.
            loss: What they are gradients of, where that is known.
        """

        def update() -> tf.Tensor:
            with tf.control_dependencies(self.microbatches.mark(number)):
                self.optimizers.apply(running.selection, self.clipping.clip(running.selection, gradients))
            self.averages.update([variable for _, variable in gradients])
            return tf.constant(True)

        running.updating = True
        try:
            if running.guard is None:
                update()
            else:
                sums = running.guard.sums(loss, gradients)
                if running.calls[number - 1].nested:
                    running.guard.add(sums)
                else:
                    running.sums.append(sums)
                total = running.total()
                if running.stops:
                    with tf.control_dependencies([running.guard.keep(total)]):
                        finite = stop_unless(is_finite(total))
                    with tf.control_dependencies([finite]):
                        update()
                else:
                    tf.cond(is_finite(total), update, lambda: tf.constant(False))
        finally:
            running.updating = False

    @property
    def variables(self) -> list[tf.Variable]:
        """What keeps count here, and is none of a step's to undo."""
        return [*self.microbatches.variables, *([] if self.loss_scale is None else self.loss_scale.variables)]

    def moved(self, variables: Sequence[VariableInfo]) -> list[tf.Variable]:
        """List what an update of these variables moves: them, their optimizers' state, their averages."""
        return [*(v.tf_variable for v in variables), *self.optimizers.state(variables), *self.averages.held(variables)]


def _cannot_wait(verb: str) -> RuntimeError:
    return RuntimeError(
        f"`{verb}` in a branch or a loop of the traced step cannot wait for the other micro-batches. Set "
        "`microbatches=1`, or move it out of the `if`, the `while` or the `tf.cond`."
    )
