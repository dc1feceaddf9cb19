"""A training step that happens wholly or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend.assertions import can_stop
from tapeloop._backend.patching import noting_all_assignments
from tapeloop.data.batch import after, examples_of, spec_of
from tapeloop.model.selection import Selection
from tapeloop.optimization.finite_check import is_finite
from tapeloop.optimization.following import move
from tapeloop.optimization.updates import PendingUpdate, StepContext, Updates
from tapeloop.step.accumulation import Computed, averaged, check_alike, checked, piece_spec, plan, zeros_of
from tapeloop.step.clock import Clock
from tapeloop.step.compilation import Compilation
from tapeloop.step.freezing import immutable_variables
from tapeloop.step.objective import Objective
from tapeloop.step.outcome import Split, StepOutcome
from tapeloop.step.running_means import RunningMeans
from tapeloop.step.snapshot import Snapshot


class Transaction:
    """One selection's training steps: the user's step on a batch or its pieces, and what must hold around it.

    Attributes:
        selection: What trains.
        microbatches: In how many pieces a batch is cut.
        guard: What watches the steps, if anything does.
        used: The identities of the handles of the variables that would get a gradient if they were watched.
        functions: What the user computes, as it was last traced.
    """

    def __init__(
        self,
        selection: Selection,
        updates: Updates,
        clock: Clock,
        objective: Objective,
        body: Callable[[Any], Any],
        means: RunningMeans,
        kept: Callable[[], list[tf.Variable]],
        others: Callable[[], list[tf.Variable]],
        compilation: Compilation,
        is_plain: Callable[[], bool],
    ) -> None:
        """Keep what a step is made of.

        Args:
            selection: What trains.
            updates: What becomes of gradients.
            clock: Where the loop keeps how far it has come.
            objective: Whose metrics a step moves.
            body: What the user computes, on a batch or a piece of one.
            means: Takes in what it returns.
            kept: Gives the variables that the trainer has among its own attributes.
            others: Gives these and those of the models that it has there.
            compilation: How the step is compiled.
            is_plain: Tells whether the body has one update, which comes last.
        """
        self.guard = updates.new_guard(selection)
        self.selection = selection
        self.microbatches = updates.microbatches
        self._updates = updates
        self._clock = clock
        self._objective = objective
        self._body = body
        self._means = means
        self._kept = kept
        self._others = others
        self._compilation = compilation
        self._is_plain = is_plain
        self._wholes: dict[int, StepContext] = {}
        self._written: set[Any] = set()
        self.used: set[int] = set()
        self.functions: list[Any] = []
        self._undoable: list[tf.Variable] = []
        self._last_update = 0
        self._keep_eagerly: Callable[[tf.Variable], None] | None = None  # while an eager step runs

    def run(self, batch: Any, split: Split | None = None) -> StepOutcome | None:
        """Trace a step, or run it eagerly.

        Args:
            batch: A batch, or features of one.
            split: The step in two, if they are features.

        Raises:
            DataError: The batch has fewer examples than it is to be cut in pieces.
        """
        running = self._updates.running = StepContext(self.selection, self.guard)
        try:
            return self._run_eagerly(running, batch) if tf.executing_eagerly() else self._trace(running, batch, split)
        finally:
            self._updates.running = None

    def whole(self, spec: Any) -> Any:
        """Trace what the user computes on a batch of a signature, to be cut."""
        running = self._updates.running = StepContext(self.selection, self.guard)
        running.may_stop = running.waits = self._may_stop()
        try:
            function = self._function(running, spec)
        finally:
            self._updates.running = None
        self._wholes[id(function)] = running
        return function

    def own(self) -> list[tf.Variable]:
        """Return the variables that are the trainer's and not the model's."""
        return [*self._updates.moved(self.selection.trained), *self._kept()]

    def note(self, variable: tf.Variable) -> None:
        """Take in that a variable of the model is about to be assigned to, which may have to be undone."""
        running = self._updates.running
        if running is None or not running.updating:
            self._written.add(variable.ref())
        if self._keep_eagerly is not None:
            self._keep_eagerly(variable)

    def keep(self) -> Snapshot:
        """Return the values of all that the next step might change, what its last update moves aside."""
        self.microbatches.begin()
        return Snapshot(self._undoable)

    def out_of_memory(self, examples: int, error: Exception) -> None:
        """Cut batches in more pieces from now on, after a step on so many examples ran out of memory.

        Raises:
            RuntimeError: That is no help, or not safe.
        """
        self.microbatches.double(examples, self._last_update, error)

    def _function(self, running: StepContext, spec: Any) -> Any:
        """Trace what the user computes as a function of its own: it tells all that it touches before it runs."""

        def compute(part: Any) -> Any:
            return self._compute(running, part)

        function = tf.function(compute, autograph=self._compilation.autograph).get_concrete_function(spec)
        self.functions = [function]
        return function

    def _trace(self, running: StepContext, batch: Any, split: Split | None) -> StepOutcome | None:
        examples = examples_of(batch)
        count = self._count(batch, examples)
        running.may_stop = count == 1 and self._may_stop()
        running.waits = count > 1 or running.may_stop
        cuts = plan(examples if isinstance(examples, int) else None, count)
        if count > 1 and not isinstance(examples, int):
            batch = checked(batch, count)
        if split is None:
            specs = {pieces.size: piece_spec(batch, pieces.size) if count > 1 else spec_of(batch) for pieces in cuts}
            functions = {size: self._function(running, spec) for size, spec in specs.items()}
            touched = [v for function in functions.values() for v in function.variables]
            self._warn_if_nothing_updates(running)
        else:
            whole = self._wholes[id(split.function)]
            running.calls, running.follows = whole.calls, whole.follows
            running.may_stop, running.waits = whole.may_stop, whole.waits
            functions, touched = {cuts[0].size: split.rest_for(batch)}, split.function.variables
        self._undoable = self._exposed(running, touched)
        running.stops = running.may_stop and not self._undoable
        kept = self._begin(running)
        if count == 1:
            result = functions[cuts[0].size](batch)
            seen = self._commit(running, result, batch) if running.waits else result["seen"]
            return self._settle(running, seen, kept.restore)
        with after(batch):  # or what depends on nothing in it would run before it is found that it cannot be cut
            outputs = functions[cuts[0].size].structured_outputs
            zeros = tf.nest.map_structure(lambda output: zeros_of(output.shape, output.dtype), outputs)
            result = averaged(lambda part, pieces: functions[pieces.size](part), batch, examples, cuts, zeros)
            seen = self._commit(running, result, batch)
        return self._settle(running, seen, kept.restore)

    def _warn_if_nothing_updates(self, running: StepContext) -> None:
        """Say once that a step updates nothing, which a missing call of `update` is the likely cause of."""
        moves = any(variable.tf_variable.ref() in self._written for variable in self.selection.trained)
        if not running.calls and not moves and not self._updates.was_warned:
            self._updates.was_warned = True
            warnings.warn(
                "`train_step` calls neither `self.update(tape, loss)` nor `self.apply(gradients)`, so that nothing "
                f"trains of the {len(self.selection.trained)} variables that the policy selects.",
                stacklevel=2,
            )

    def _run_eagerly(self, running: StepContext, batch: Any) -> StepOutcome | None:
        examples = examples_of(batch)
        count = self._count(batch, examples)
        running.waits = count > 1
        self._begin(running)
        kept, aside = Snapshot(self._others()), {variable.ref() for variable in self._bookkeeping()}

        def note(variable: tf.Variable) -> None:
            if variable.ref() not in aside:
                kept.add(variable)

        self._undoable, self._keep_eagerly = [], note
        try:
            with noting_all_assignments(note):
                if count == 1:
                    seen = self._compute(running, batch)["seen"]
                else:
                    cuts = plan(examples, count)
                    result = averaged(lambda part, _: self._compute(running, part), batch, examples, cuts, None)
                    seen = self._commit(running, result, batch)
            self._warn_if_nothing_updates(running)
        except Exception:
            kept.restore()
            raise
        finally:
            self._keep_eagerly = None
        return self._settle(running, seen, kept.restore)

    def _may_stop(self) -> bool:
        """Tell whether a step may fail where it is not finite, if there turns out to be nothing to undo."""
        ends, compiled = self._updates.ends_at_bad, self._compilation.uses_xla  # XLA drops what makes a step fail
        return self._is_plain() and ends and not compiled and self._updates.optimizers.are_keras and can_stop()

    def _count(self, batch: Any, examples: Any) -> int:
        """Return in how many pieces a batch is cut; where the trainer chooses, in no more than it has examples."""
        count = self.microbatches.count
        if count > 1:
            check_alike(batch)
        return min(count, examples) if self.microbatches.adapts and isinstance(examples, int) else count

    def _begin(self, running: StepContext) -> Snapshot:
        self._last_update = len(running.calls)
        if self.guard is not None and running.nests:
            self.guard.begin()
        return Snapshot(self._undoable if self.guard is not None else [])

    def _compute(self, running: StepContext, part: Any) -> Any:
        """Run the user's step on a batch or a piece of one; what its updates need is returned where they wait."""
        running.calls, running.follows, running.sums = [], [], []
        running.graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

        logs = self._body(part)
        self.used |= running.used
        if not running.waits:
            return {"seen": self._look(running, logs, part)}
        if not running.may_stop:
            logs = {name: _floating(value) for name, value in logs.items()}
        losses, gradients = [call.loss for call in running.calls], [call.gradients for call in running.calls]
        decays = [follow.decay for follow in running.follows]
        mean = {"logs": logs, "losses": losses, "gradients": gradients, "decays": decays}
        return Computed(mean, [call.overwrites for call in running.calls])

    def _commit(self, running: StepContext, computed: Computed, batch: Any) -> list[tf.Tensor]:
        """Make the updates that waited, in their order, and let others follow them; see `_look`."""

        mean = computed.mean

        def follow_after(number: int) -> None:
            for follow, decay in zip(running.follows, mean["decays"]):
                if follow.after == number:
                    move(follow.pairs, decay)

        follow_after(0)
        given = zip(running.calls, mean["losses"], mean["gradients"], computed.largest)
        for number, (call, loss, gradients, overwrites) in enumerate(given, 1):
            pairs = call.paired(gradients, overwrites)
            self._updates.commit(running, number, pairs, loss[0] if loss else None)
            follow_after(number)
        return self._look(running, mean["logs"], batch)

    @tf.autograph.experimental.do_not_convert
    def _look(self, running: StepContext, logs: Mapping[str, tf.Tensor], batch: Any) -> list[tf.Tensor]:
        """Take in the logs, and return the sums of a step and whether they are finite.

        Nothing is returned where nobody watches, nor where a step that is not finite fails.
        In a step that is traced, this stands beside the updates and not behind them.
        """
        if self.guard is None or running.stops:
            self._means.update(logs, examples_of(batch))
            return []
        total = running.total()
        finite = is_finite(total)
        self._means.update(logs, examples_of(batch), finite)
        self.guard.keep(total)
        return [total, finite]

    def _settle(self, running: StepContext, seen: list[tf.Tensor], undo: Callable[[], None]) -> StepOutcome | None:
        """Undo a step that was not finite, and return how it ended."""
        if self.guard is None or running.stops:
            return None

        def undone() -> tf.Tensor:
            running.updating = True
            undo()
            running.updating = False
            return tf.constant(True)

        total, finite = seen
        if self._undoable or tf.executing_eagerly():
            tf.cond(finite, lambda: tf.constant(False), undone)
        scale = self._updates.loss_scale
        if scale is None:
            return StepOutcome(finite, None)
        overflowed = ~finite & tf.math.is_finite(total[0]) & (scale.value > 1)
        scale.update(finite)
        return StepOutcome(finite, overflowed)

    def _exposed(self, running: StepContext, touched: Sequence[tf.Variable]) -> list[tf.Variable]:
        """List what a bad step must be undone in: all that it touches, but for what only its last update moves.

        That one does not happen in a bad step, whereas an earlier one has happened when a later one turns out bad.
        """
        *earlier, last = running.calls or [PendingUpdate([], nested=False)]
        exposed = [target.tf_variable for follow in running.follows for target, _ in follow.pairs]
        exposed += self._updates.moved([v for call in (*earlier, *[last] * last.nested) for v in call.variables])
        aside = {variable.ref() for variable in self._updates.moved(self.selection.trained)}
        aside |= {variable.tf_variable.ref() for variable in immutable_variables(self.selection)}
        aside -= self._written
        aside |= {variable.ref() for variable in self._bookkeeping()}
        if self._updates.ends_at_bad and not self.microbatches.adapts:  # before anybody could look at the metrics
            aside |= {variable.ref() for variable in self._objective.variables}
        # An assignment that does not read is missing from a function's variables.
        touched = [*touched, *(variable.tf_variable for variable in self.selection.tree.variables), *self._others()]
        found = {variable.ref(): variable for variable in touched if variable.ref() not in aside}
        return list({**found, **{variable.ref(): variable for variable in exposed}}.values())

    def _bookkeeping(self) -> list[tf.Variable]:
        """List what keeps count of steps, bad ones among them, and is never undone."""
        counts = [self._clock.counts, *self._updates.variables, *(() if self.guard is None else self.guard.variables)]
        return counts if self.microbatches.adapts else [*counts, *self._means.variables]


def _floating(value: Any) -> tf.Tensor:
    """Return a log in the float type in which its means over pieces are taken."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype == tf.float64 else tf.cast(value, keras.config.floatx())
