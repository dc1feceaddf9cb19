"""A training step that happens wholly or not at all: built from its plan, or run eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from tapeloop._backend.patching import noting_all_assignments
from tapeloop.data.batch import examples_of
from tapeloop.optimization.finite_check import StepOutcome
from tapeloop.step.context import Computed, Training
from tapeloop.step.freezing import immutable_variables
from tapeloop.step.plan import Planner, StepPlan

Step = Callable[[Any], StepOutcome | None]


class Snapshot:
    """The values of variables at one moment. A value that is not asked for again costs nothing in a traced step."""

    def __init__(self, variables: Iterable[tf.Variable]) -> None:
        # A read that nothing asks for again is pruned from the graph; one that is costs a copy when its variable is
        # written.
        self._values = {variable.ref(): variable.read_value() for variable in variables}

    def add(self, variable: tf.Variable) -> None:
        """Take in the value of one more variable, unless it is there."""
        if variable.ref() not in self._values:
            self._values[variable.ref()] = variable.read_value()

    def roll_back(self) -> tf.Tensor:
        """Give the variables their values of then."""
        for variable, value in self._values.items():
            variable.deref().assign(value)
        return tf.constant(True)


def build(planner: Planner, plan: StepPlan) -> Step:
    """Turn the plan of a training step into the step: snapshot, compute, update, log, roll back if bad."""
    context = plan.context
    assert isinstance(context, Training)
    restored = variables_to_restore(planner, plan, context)
    # Whether a bad step fails before its update, or is rolled back, is decided here, once the plan has told what moves.
    fails = context.deferred and not restored and planner.may_fail()
    context.guard = planner.guard(fails=fails)

    def step(batch: Any) -> StepOutcome | None:
        before = Snapshot(restored)
        if planner.check is not None and context.has_control_flow:
            with context.guard.keeping_count():
                planner.check.kept.assign(tf.zeros_like(planner.check.kept))
        computed = plan.compute(batch)
        return _finish(planner, context, computed, batch, before if restored else None)

    return step


def run_eagerly(
    planner: Planner, batch: Any, in_pieces: Callable[[Callable[[Any], Any], Any], Computed] | None = None
) -> StepOutcome | None:
    """Run a training step op by op: every variable that it assigns to, wherever it is kept, is noted first.

    Args:
        planner: The user's part.
        batch: A batch.
        in_pieces: Takes the user's part and the batch, and computes it in pieces; None if it is not cut.
    """
    context = planner.new_context(deferred=in_pieces is not None)
    assert isinstance(context, Training)
    compute = functools.partial(planner.compute, context)
    # What the user keeps beside the model may change in ways that nobody sees, such as by a raw op.
    before = Snapshot(planner.parts.attributes.all_variables())
    aside = {variable.ref() for variable in _bookkeeping(planner)}

    def note(variable: tf.Variable) -> None:
        # Counts and sums of logs go on through a bad step.
        if variable.ref() not in aside:
            before.add(variable)

    try:
        # The methods that `frozen` wraps are those that note, so that it has to come second.
        with noting_all_assignments(note):
            with planner.frozen(context):
                computed = compute(batch) if in_pieces is None else in_pieces(compute, batch)
            planner.warn_if_nothing_updates(context)
            planner.prepare_logs()
            return _finish(planner, context, computed, batch, before)
    except Exception:
        before.roll_back()
        raise


def _finish(
    planner: Planner, context: Training, computed: Computed, batch: Any, before: Snapshot | None
) -> StepOutcome | None:
    """Make the updates that wait, take in the logs, and roll back a step that was not finite."""
    guard = context.guard
    planner.note_examples(context, batch)
    total = context.make_deferred(computed) if context.deferred else computed.checksums
    # The logs stand beside the updates and not behind them, so that the graph need not wait for one to do the other.
    planner.parts.means["train"].update(computed.mean["logs"], examples_of(batch), guard.is_counted(total))
    return guard.end(total, None if before is None else before.roll_back)


def variables_to_restore(planner: Planner, plan: StepPlan, context: Training) -> list[tf.Variable]:
    """List what a bad step must be rolled back in: all that it touches, but for what only its last update moves.

    The last update does not happen in a bad step, whereas an earlier one has happened when a later one turns out bad.
    """
    parts, selection = planner.parts, planner.selection
    if planner.check is None:
        return []
    moved_before = [target.tf_variable for follow in context.follows for target, _ in follow.pairs]
    # An update in a branch or a loop cannot be told from an earlier one: it may have happened already.
    earlier = context.updates[:-1] + [last for last in context.updates[-1:] if last.in_control_flow]
    moved_before += parts.updates.moved(selection, [variable for update in earlier for variable in update.variables])
    # What only the last update moves needs no snapshot, nor does what no layer can move, unless the user assigns to it.
    # Frozen batch statistics are among these: to keep them for nothing took 104 reads of a MobileNetV2.
    aside = {variable.ref() for variable in parts.updates.moved(selection, selection.trained)}
    aside |= {variable.tf_variable.ref() for variable in immutable_variables(selection)}
    aside -= {variable.tf_variable.ref() for variable in context.assigned}
    aside |= {variable.ref() for variable in _bookkeeping(planner)}
    if parts.nonfinite == "raise" and parts.updates.loss_scale.value is None:
        # The run ends at the bad step, before anybody reads the metrics.
        aside |= {variable.ref() for variable in parts.objective.variables}
    # An assignment that does not read is missing from a function's variables.
    model = [variable.tf_variable for variable in selection.tree.variables]
    touched = [*plan.touched, *model, *parts.attributes.all_variables()]
    found = {variable.ref(): variable for variable in touched if variable.ref() not in aside}
    return list({**found, **{variable.ref(): variable for variable in moved_before}}.values())


def _bookkeeping(planner: Planner) -> list[tf.Variable]:
    """List the variables that keep count of steps, bad ones among them: a rollback leaves them alone."""
    parts, check = planner.parts, [] if planner.check is None else [planner.check.kept]
    return [parts.counts, *parts.updates.loss_scale.variables, *check, *parts.means["train"].variables]


def variables_of_updates(planner: Planner) -> list[tf.Variable]:
    """List what the updates of a training step move, and what keeps count of them: the same on all devices."""
    return [*planner.parts.updates.moved(planner.selection, planner.selection.trained), *_bookkeeping(planner)]


def note_bytes(planner: Planner, plan: StepPlan) -> None:
    """Note how many bytes a step that was traced on one of several devices gives to the others, in all its updates."""
    reduction, context = planner.parts.updates.reduction, plan.context
    if reduction is not None and isinstance(context, Training):
        reduction.step_bytes = sum(update.bytes_sent for update in context.updates)


def moved_alike(planner: Planner, plan: StepPlan) -> list[tf.Variable]:
    """List what a step moves in the same way on all devices: what its updates move, and nothing else does."""
    others = {variable.tf_variable.ref() for variable in plan.context.assigned}
    return [variable for variable in variables_of_updates(planner) if variable.ref() not in others]


def movable_variables(planner: Planner) -> list[tf.Variable]:
    """List everything that a training step may move: what it trains, what it is rolled back in, what keeps count."""
    parts, selection = planner.parts, planner.selection
    model = [variable.tf_variable for variable in selection.tree.variables]
    mine = [*variables_of_updates(planner), *parts.objective.variables]
    touched = [reference.deref() for reference in planner.touched]
    found = (*model, *mine, *touched, *parts.attributes.all_variables())
    return list({variable.ref(): variable for variable in found}.values())
