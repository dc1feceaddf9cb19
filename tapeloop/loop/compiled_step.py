"""A planned step becomes a compiled step, with a loop around it that draws batches without the host."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tapeloop._backend import tracing, variables
from tapeloop._backend.assertions import DRAWING, has_stopped, xla_refusal
from tapeloop._backend.tracing import clock
from tapeloop.data.batch import Features, after, examples_of, open_spec_of, spec_of, tensors_in
from tapeloop.data.cursor import BatchCursor, IteratorReader, Reader, layout_of
from tapeloop.distribution.spread import Spread
from tapeloop.folding.fold import fold
from tapeloop.folding.option import Folding
from tapeloop.folding.store import FoldedPart
from tapeloop.loop.step_counts import StepCounts, counted, counts_before, limits
from tapeloop.loop.steps_per_call import Pace
from tapeloop.step import atomic
from tapeloop.step.accumulation import Microbatches, accumulate, compute_in_pieces
from tapeloop.step.plan import Planner, StepPlan

_LOG = logging.getLogger("tapeloop")
COMPILE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError)


class CompiledStep:
    """The steps of one kind for one selection, compiled once for each signature of batches.

    Attributes:
        planner: What plans them.
        kind: `"train"`, `"eval"` or `"predict"`.
        selection: What trains.
        trace_count: How often a step was traced.
        pace: The number of steps that a call of the loop runs.
    """

    def __init__(self, planner: Planner, microbatches: Microbatches, folding: Folding) -> None:
        """Make the step; nothing is traced yet.

        Args:
            planner: What plans it.
            microbatches: The number of pieces that the batches of a training step are cut in.
            folding: Whether its frozen part is folded.
        """
        self.planner = planner
        self.kind = planner.kind
        self.selection = planner.selection
        self.trace_count = 0
        self.pace = Pace(planner.parts.compilation.steps_per_call)
        # An evaluation keeps no activations for a gradient, which are what pieces save.
        self._microbatches = microbatches if self.kind == "train" else Microbatches(1)
        self._folding = folding
        self._counts = planner.parts.counts
        self._uses_xla = planner.parts.compilation.uses_xla and not planner.parts.replicas.are_several
        self._spread = Spread(planner.parts.copies, trains=self.kind == "train")
        self._plan_rest: Callable[[Any], StepPlan] | None = None
        self._is_tried = False
        self._latest_bounds: tuple[tuple[int, int, float], tuple[tf.Tensor, tf.Tensor, tf.Tensor]] | None = None
        self.forget()

    def run_steps(
        self, cursor: BatchCursor, most: int, before: tf.Tensor, is_stopping: Callable[[], bool] = lambda: False
    ) -> tuple[StepCounts, BaseException | None, bool]:
        """Run steps on the next batches of a cursor, until the host has something to do.

        Args:
            cursor: Where batches come from.
            most: The highest number of steps.
            before: How far the run has come; see `counts_before`.
            is_stopping: Tells whether this process is about to end.

        Returns:
            How the steps ended; the exception that ended the loop, if there was one: that of the last step, which then
            does not count, or of the data; and whether any process that trains is about to end.
        """
        # Workers that stopped by clocks of their own would wait for each other.
        seconds = math.inf if self._spread.is_on else self.pace.seconds
        start, limit, deadline = self._bounds(cursor.position, 1 if self._is_on_trial else most, seconds)
        variables.assign(self._counts, before)
        failure: BaseException | None = None
        try:
            args = cursor.reader, start, before, limit, deadline
            if self._is_driven:
                run = functools.partial(self._run_from_host, cursor.spec)
                loop: Callable[..., None] = functools.partial(self._loop, run)
            else:
                loop = tracing.unbound(self._loop_over(cursor))
            self._spread.begin(id(self), weakref.ref(cursor), self.planner.parts.interventions.count)
            began = time.perf_counter()
            loop(*args)
        except BaseException as error:
            failure = error
        counts, failure = _with_stop(StepCounts.of(variables.read(self._counts)), failure)
        # The counts are noted before each batch is drawn, so that they hold also if the step or the data has raised.
        cursor.advance(counts.batches)
        failure = failure and cursor.error_behind(failure)
        stops = False
        if failure is None:
            with self.planner.parts.replicas.noticing_loss():
                seconds, stops = self._spread.end(time.perf_counter() - began, is_stopping())
            self.pace.adapt(counts.batches, seconds)
        self._check_kernels()
        return counts, failure, stops

    def _bounds(self, position: int, most: int, seconds: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return where a call of the loop begins and ends, as tensors."""
        # Made anew they take 0.1 ms, and most epochs of few steps are one call each, of the same bounds.
        bounds = position, most, seconds
        if self._latest_bounds is None or self._latest_bounds[0] != bounds:
            limit = limits(most, self.planner.parts.max_consecutive)
            tensors = tf.constant(position, tf.int64), limit, tf.constant(seconds, tf.float64)
            self._latest_bounds = bounds, tensors
        return self._latest_bounds[1]

    def run_on_batch(self, batch: Any, before: tf.Tensor) -> tuple[StepCounts, dict[str, Any], BaseException | None]:
        """Run one step on a batch in tensors.

        Args:
            batch: The batch.
            before: How far the run has come.

        Returns:
            How the step ended, what it logged, and the exception that ended it, if there was one.
        """
        # One function does it all, so that a step on one batch costs one call: counts in, counts and logs out.
        counts, logs, failure = before, dict[str, Any](), None
        try:
            if self._is_driven:
                step = functools.partial(self._run_from_host, lambda: spec_of(batch))
                counts, logs = self._alone(step, batch, counts)
            else:
                single = self._single(batch)
                self._spread.renew()
                counts, logs = single(batch, counts)
        except BaseException as error:
            failure = error
        ended, failure = _with_stop(StepCounts.of(counts), failure)
        return ended, logs, failure

    def predict(self, batch: Any, before: tf.Tensor) -> Any:
        """Return what a step that predicts gives for a batch."""
        self._counts.assign(before)
        outputs = self._run_from_host(lambda: spec_of(batch), batch)
        self._check_kernels()
        return outputs

    def trace(self, cursor: BatchCursor) -> None:
        """Trace the loop for the batches of a cursor, which shows what is wrong before anything has moved."""
        if not self.planner.parts.compilation.run_eagerly:
            self._loop_over(cursor)

    def trace_on_batch(self, batch: Any) -> None:
        """Trace the step for single batches like this one, which shows what it touches before anything has moved."""
        if not self.planner.parts.compilation.run_eagerly:
            self._single(batch)

    def find_logs(self, cursor: BatchCursor) -> None:
        """Find out what the step logs, which its trace tells: the metrics have their variables from then on."""
        if not self.planner.parts.compilation.run_eagerly:
            self._loop_over(cursor)
            return
        try:
            self.plan(cursor.spec())
        except Exception as error:
            # Run eagerly, a step may do what no trace allows, such as reading a number.
            said = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:200]
            _LOG.warning("The step cannot be traced (%s): its metrics cover the rest of this epoch alone.", said)

    def plan(self, spec: Any, *, folds: bool = False) -> StepPlan:
        """Plan the step for batches of a signature, or for features of them.

        Args:
            spec: The signature.
            folds: Whether its frozen part is folded.
        """
        if isinstance(spec, Features):
            assert self._plan_rest is not None
            return self._plan_rest(spec)
        count, adapts = self._microbatches.count, self._microbatches.adapts
        plan_piece = functools.partial(self._plan_piece, folds=folds)
        if count == 1:
            return plan_piece(spec, deferred=self.planner.may_fail())
        return accumulate(functools.partial(plan_piece, deferred=True), spec, count, at_most=adapts)

    def _plan_piece(self, spec: Any, *, deferred: bool, folds: bool) -> StepPlan:
        """Plan the step for batches or micro-batches of a signature."""
        # Folded or not, the user's part is traced once.
        key = f"{spec} {deferred}"
        if key not in self._traced:
            self._traced[key] = self.planner.plan(spec, deferred=deferred)
        plan = self._traced[key]
        if not folds:
            return plan
        folded = fold(self.planner, plan, self._folding.store)
        if folded is None:
            return plan
        self._folded.append(folded.values)
        return folded.plan

    def refresh(self) -> None:
        """Bring folded values up to date, if weights may have moved since the last step."""
        if not all(part.refresh() for part in self._folded):
            self._give_up_kernels()

    def _check_kernels(self) -> None:
        """Build the step anew if weights have moved while it ran first."""
        if not all(part.has_current_kernels() for part in self._folded):
            self._give_up_kernels()

    def _give_up_kernels(self) -> None:
        """Have the step built anew of the same trace, with convolutions that keep no kernels."""
        self._folding.store.have_moved = True
        self._forget_built()

    def split_at(self, plan_rest: Callable[[Any], StepPlan]) -> None:
        """Run on features if a cursor gives them: `plan_rest` plans the rest of the step for their signature."""
        if self._plan_rest not in (None, plan_rest):
            self.forget()  # what is traced is the rest behind another split
        self._plan_rest = plan_rest

    def forget(self) -> None:
        """Forget all traces."""
        self._traced: dict[str, StepPlan] = {}
        self._counted: set[str] = set()
        self._forget_built()

    def _forget_built(self) -> None:
        """Forget what was built of the traces."""
        self._folded: list[FoldedPart] = []
        self._steps: dict[str, Callable[[Any], Any]] = {}
        self._loops: dict[str, Any] = {}
        self._singles: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        self._latest: tuple[weakref.ref[BatchCursor], Any] | None = None

    def try_again(self) -> None:
        """Have `microbatches="auto"` find its number anew from the next batch on."""
        self._is_tried = self._is_tried and not self._microbatches.adapts

    @property
    def _is_on_trial(self) -> bool:
        """Whether the host has to see how the next step ends: XLA may refuse it, or it may run out of memory."""
        # On the CPU, XLA made convolution nets several times slower: by itself it is tried on a GPU alone.
        tries_xla = self._uses_xla and self.planner.parts.compilation.jit_compile == "auto"
        return not self._is_tried and (tries_xla or self._microbatches.adapts)

    @property
    def _is_driven(self) -> bool:
        """Whether the host runs step by step."""
        return self._is_on_trial or self.planner.parts.compilation.run_eagerly

    @property
    def _counts_itself(self) -> bool:
        """Whether a step counts how steps end where it runs: it is masked, and the host does not ask."""
        return self.planner.masks

    def _folds(self, spec: Any) -> bool:
        """Tell whether the step for batches of a signature is folded: once it is, it stays so."""
        is_data = not isinstance(spec, Features)
        return is_data and (f"{spec} folded" in self._steps or self._folding.folds(self.kind))

    def _step(self, spec: Any, *, folds: bool) -> Callable[[Any], Any]:
        """Return the step for batches of a signature: planned and built if the signature is new."""
        # A plan is traced once, and built into the loop, the single step and the step that the host calls.
        key = f"{spec} folded" if folds else f"{spec}"
        if key not in self._steps:
            self.trace_count += f"{spec}" not in self._counted
            self._counted.add(f"{spec}")
            is_spread = self._spread.is_on and self.kind != "predict"
            spec = self._spread.spec_of_share(spec) if is_spread else spec
            plan = self.plan(spec, folds=folds)
            step = atomic.build(self.planner, plan) if self.kind == "train" else self.planner.build_evaluation(plan)
            if is_spread:
                logged, alike = self.planner.logged_variables(), atomic.moved_alike(self.planner, plan)
                known = [*atomic.movable_variables(self.planner), *logged]
                step = self._spread.add(step, spec, known, logged, alike)
                atomic.note_bytes(self.planner, plan)
            self._steps[key] = tf.function(step, autograph=False, jit_compile=True) if self._uses_xla else step
        return self._steps[key]

    def _compiled(self, spec: Any) -> Any:
        """Return the step for batches of a signature as a function that the host can call."""
        folds = self._folds(spec)
        key = f"{spec} {folds}"
        if key not in self._functions:
            step = self._step(spec, folds=folds)
            self._functions[key] = tf.function(step, autograph=False).get_concrete_function(spec)
        return self._functions[key]

    def _loop_over(self, cursor: BatchCursor) -> Any:
        """Return the loop that is traced for the batches of a cursor."""
        if self._latest is None or self._latest[0]() is not cursor:
            # `tf.function` would look its trace up by the same signature, but takes as long for it as for the call
            # itself.
            folds = f"{cursor.key} folded" in self._loops or self._folding.folds(self.kind)
            key = f"{cursor.key} folded" if folds else cursor.key
            if key not in self._loops:
                spec = cursor.spec()
                step = self._step(spec, folds=folds and not isinstance(spec, Features))
                loop = tf.function(functools.partial(self._loop, step), autograph=False)
                start, counts, limit = tf.constant(0, tf.int64), counts_before(0, 0, 0), limits(1, 0)
                args = cursor.reader.signature(), start, counts, limit, tf.constant(math.inf, tf.float64)
                self._loops[key] = loop.get_concrete_function(*args)
            self._latest = weakref.ref(cursor), self._loops[key]
        return self._latest[1]

    def _single(self, batch: Any) -> Any:
        """Return the step that is traced for batches like this batch, of any size."""
        # Shapes without the batch; of a scalar there is nothing to leave out.
        leaves = tensors_in(batch)
        kinds = [(type(leaf), leaf.dtype, leaf.shape[1:] if leaf.shape.rank else "scalar") for leaf in leaves]
        key = f"{kinds} {layout_of(batch)}"
        if key not in self._singles:
            spec = open_spec_of(batch)
            # Between two batches anything may be set by hand, such as the weights of a target network.
            step = self._step(spec, folds=False)
            share = self._spread.of_worker

            def run_alone(batch: Any, counts: tf.Tensor) -> tuple[tf.Tensor, dict[str, Any]]:
                return self._alone(step, batch if share is None else share.rows(batch), counts)

            alone = tf.function(run_alone, autograph=False)
            self._singles[key] = alone.get_concrete_function(spec, tf.TensorSpec([6], tf.int64))
        return self._singles[key]

    def _loop(
        self,
        step: Callable[[Any], Any],
        reader: Reader,
        start: tf.Tensor,
        counts: tf.Tensor,
        limit: tf.Tensor,
        seconds: tf.Tensor,
    ) -> None:
        """Run steps until the counts pass the limit or, after at least one step, the time is over.

        The counts are noted before each step, in case it fails; of masked steps the host counts the batches alone. The
        time is looked at where the steps run: data may turn slow in the middle of a call that was planned when it was
        fast.
        """
        # Counts and times are on the CPU, also if the step runs on a GPU: the loop's condition must not wait for a
        # device.
        with tf.device("CPU:0"):
            began = clock()
            deadline = began + seconds

        def goes_on(counts: tf.Tensor, now: tf.Tensor) -> tf.Tensor:
            with tf.device("CPU:0"):
                return tf.reduce_all(counts <= limit) & (now < deadline)

        def run_step(counts: tf.Tensor, now: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            del now
            with tf.device("CPU:0"):
                noted, number = [] if self._counts_itself else [self._counts.assign(counts)], start + counts[0]
            with tf.control_dependencies(noted), tf.name_scope(DRAWING):
                batch = reader.read(number, self._spread.of_worker)
            # At the end of an iterator, what depends on nothing in the batch (a counter, a seed) would run once too
            # often. A control edge from the batch itself is not enough: TensorFlow drops it, since the step takes the
            # batch anyway.
            with after(batch) if isinstance(reader, IteratorReader) else contextlib.nullcontext():
                outcome = step(batch)
            if self._counts_itself:
                self._counts.assign(counted(self._counts.read_value(), outcome))
                outcome = None
            with tf.device("CPU:0"):
                counts = counted(counts, outcome)
                with tf.control_dependencies([counts]):
                    return counts, clock()

        counts, _ = tf.while_loop(goes_on, run_step, (counts, began))
        if not self._counts_itself:
            self._counts.assign(counts)

    def _alone(self, step: Callable[[Any], Any], batch: Any, counts: tf.Tensor) -> tuple[tf.Tensor, dict[str, Any]]:
        """Run one step, and return the counts after it and what it logged."""
        with tf.device("CPU:0"):
            noted = self._counts.assign(counts)
        with tf.control_dependencies([noted]):
            self._spread.begin_in_graph()
            outcome = step(batch)
            self._spread.end_in_graph()
        with tf.device("CPU:0"):
            return counted(counts, outcome), self.planner.pop_logs()

    def _run_from_host(self, spec: Callable[[], Any], batch: Any) -> Any:
        """Run one step, and again without XLA if XLA refuses it, or in smaller pieces if it runs out of memory."""
        while True:
            # On the host, for the device has no memory to spare; only on trial, for it takes a copy of everything.
            kept = self._copies(spec) if self._is_on_trial and self._microbatches.adapts else []
            try:
                if self.planner.parts.compilation.run_eagerly:
                    outcome = self._run_eagerly(batch)
                else:
                    outcome = self._compiled(spec())(batch)
                self._is_tried = True
                return outcome
            except COMPILE_ERRORS as error:
                self._give_up_xla(error)
            except tf.errors.ResourceExhaustedError as error:
                if not self._microbatches.adapts:
                    raise
                for variable, value in kept:
                    variable.assign(value)
                self._microbatches.double(int(examples_of(batch)), error)
            self.forget()

    def _run_eagerly(self, batch: Any) -> Any:
        """Run one step op by op."""
        if self.kind == "train":
            count = self._microbatches.count
            count = min(count, int(examples_of(batch))) if self._microbatches.adapts else count
            in_pieces = functools.partial(compute_in_pieces, count=count) if count > 1 else None
            return atomic.run_eagerly(self.planner, batch, in_pieces)
        return self.planner.evaluate_eagerly(batch)

    def _copies(self, spec: Callable[[], Any]) -> list[tuple[tf.Variable, Any]]:
        """Return all that a step on trial may move, each variable with its value, on the host."""
        if self.planner.parts.compilation.run_eagerly:  # such a step undoes itself
            return []
        # Planned first, since the plan tells what the user's part touches.
        self._step(spec(), folds=False)
        return [(variable, variable.numpy()) for variable in atomic.movable_variables(self.planner)]

    def _give_up_xla(self, error: Exception) -> None:
        """Go on without XLA after an error which says that XLA cannot compile the step.

        Raises:
            Exception: The same error, if it says something else, or XLA was asked for.
        """
        reason = xla_refusal(error)
        if not self._uses_xla or self.planner.parts.compilation.jit_compile != "auto" or reason is None:
            raise error
        warnings.warn(
            f"XLA cannot compile the {self.kind} step because of {reason}: going on without XLA. "
            "`jit_compile=False` says so from the start.",
            stacklevel=2,
        )
        self._uses_xla = False


def _with_stop(counts: StepCounts, failure: BaseException | None) -> tuple[StepCounts, BaseException | None]:
    """Count the step that has failed before its update, if the failure is that."""
    return (counts.with_failed_step(), None) if failure is not None and has_stopped(failure) else (counts, failure)
