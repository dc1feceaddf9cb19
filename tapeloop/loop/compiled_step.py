"""A selection and a body become a compiled step. Nothing here knows a policy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from tapeloop._backend import assertions
from tapeloop._backend.assertions import DRAWING, has_stopped
from tapeloop._backend.patching import Note
from tapeloop.data.batch import Features, after, open_spec_of
from tapeloop.data.cursor import ArrayReader, BatchCursor, IteratorReader, layout_of
from tapeloop.loop.pace import Pace
from tapeloop.loop.step_counts import StepCounts, counted, limits
from tapeloop.model.selection import Selection
from tapeloop.optimization import untracked
from tapeloop.step.clock import Clock
from tapeloop.step.compilation import Compilation
from tapeloop.step.freezing import frozen
from tapeloop.step.outcome import Split

COMPILE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError)


TakeLogs: TypeAlias = Callable[[], dict[str, Any]]


class CompiledStep:
    """A body compiled for one selection, and a loop around it that draws batches from a feed without the host.

    Both are traced once for each signature of a batch.

    Attributes:
        selection: What trains and what runs in inference mode while the body is traced.
        kind: `"train"`, `"eval"` or `"predict"`.
        trace_count: How often the body was traced.
        pace: How many steps a call of the loop runs.
    """

    def __init__(
        self,
        kind: str,
        body: Callable[[Any], Any],
        selection: Selection,
        compilation: Compilation,
        clock: Clock,
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        own: Callable[[], list[tf.Variable]] = list,
        note: Note = lambda variable: None,
    ) -> None:
        """Make the step.

        Args:
            kind: `"train"`, `"eval"` or `"predict"`.
            body: What is compiled: a function of a batch. In a loop it returns how the step ended, or None.
            selection: What trains.
            compilation: How it is compiled.
            clock: Where the loop keeps how far it has come.
            around: What else holds while the body is traced.
            own: Gives the variables that the body may read beside the model's.
            note: Called with each variable of the model that the body assigns to.
        """
        self.kind = kind
        self.selection = selection
        self.trace_count = 0
        self.pace = Pace(compilation.steps_per_call)
        self._body = body
        self._compilation = compilation
        self._around = around
        self._own = own
        self._note = note
        self._used: set[int] = set()
        self._is_on_trial = False
        self._split: Split | None = None
        self._begun = clock.counts
        self.compile()

    def run(
        self, feed: BatchCursor, most: int, before: StepCounts, patience: int, so_far: tuple[int, int] = (0, 0)
    ) -> tuple[StepCounts, BaseException | None]:
        """Run steps on the next batches of a feed, until something is for the host to do.

        Args:
            feed: Where batches come from.
            most: How many steps at most.
            before: What the steps before came to.
            patience: How many bad steps in a row are gone on after.
            so_far: How many steps and epochs were trained before.

        Returns:
            What the steps came to, and the exception that ended them, if one did: that of the last step, which then
            does not count, or of the data.
        """
        start, limit = tf.constant(feed.position, tf.int64), limits(1 if self._is_on_trial else most, patience)
        seconds = tf.constant(self.pace.seconds, tf.float64)
        self._begun.assign(before.start(*so_far))
        failure: BaseException | None = None
        try:
            if not self.is_driven:
                self._loop_over(feed)(feed.reader, start, self._begun.read_value(), limit, seconds)
            else:
                if self._is_on_trial:
                    self.trace(feed)
                self._loop(self, feed.reader, start, self._begun.read_value(), limit, seconds)
                self._is_on_trial = False
        except BaseException as error:
            failure = error
        tally = StepCounts.of(self._begun)
        if failure is not None and has_stopped(failure):
            tally, failure = tally.stopped(), None
        feed.advance(tally.batches)
        return tally, failure and feed.error_behind(failure)

    def run_on(
        self, batch: Any, before: StepCounts, so_far: tuple[int, int], take_logs: TakeLogs
    ) -> tuple[StepCounts, dict[str, Any], BaseException | None]:
        """Run one step on a batch in tensors.

        Args:
            batch: The batch.
            before: What the steps before came to.
            so_far: How many steps and epochs were trained before.
            take_logs: Returns what the step logged, and starts it anew; called inside the step.

        Returns:
            What the step came to, what it logged, and the exception that ended it, if one did.
        """
        counts, logs, failure = before.start(*so_far), dict[str, Any](), None
        try:
            if self.is_driven:
                counts, logs = self._alone(self, batch, counts, take_logs)
            else:
                counts, logs = self._single(batch, take_logs)(batch, counts)
        except BaseException as error:
            failure = error
        tally = StepCounts.of(counts)
        if failure is not None and has_stopped(failure):
            tally, failure = tally.stopped(), None
        return tally, logs, failure

    def __call__(self, batch: Any) -> Any:
        """Run the body on a batch."""
        if self._compilation.run_eagerly:
            return self._run(batch)
        try:
            return self._traced(self._function, batch)
        except COMPILE_ERRORS as error:
            reason = assertions.xla_refusal(error)
            if self._compilation.jit_compile != "auto" or reason is None:
                raise
            warnings.warn(
                f"XLA cannot compile the {self.kind} step because of {reason}: going on without XLA. "
                "`jit_compile=False` says so from the start.",
                stacklevel=2,
            )
            self._compilation = dataclasses.replace(self._compilation, jit_compile=False)
            self.compile()
            return self(batch)

    def trace(self, feed: BatchCursor) -> None:
        """Trace the loop for batches of a feed, which shows what is wrong before anything has moved."""
        if self._compilation.run_eagerly:
            return
        if self.is_driven and not self._is_on_trial:
            self._check(self._function, feed.spec())
        else:
            self._loop_over(feed)

    def whole(self, spec: Any) -> Any:
        """Trace the body by itself for batches of a signature, and return the function."""
        with self._around(), frozen(self.selection, self._note) as calls:
            function = self._whole(spec)
        self._used |= calls.read
        self._warn_untracked(function)
        return function

    def variables(self) -> list[tf.Variable]:
        """Return the variables of the model, and those that the body may read beside them."""
        return [*(variable.tf_variable for variable in self.selection.tree.variables), *self._own()]

    def split_at(self, split: Split) -> None:
        """Run on features from now on where it is fed them: only what of the body comes behind a split."""
        if self._split not in (None, split):
            self.compile()  # what is traced is the rest behind another split
        self._split = split

    def compile(self) -> None:
        """Forget all traces."""
        # TensorFlow counts traces by code, and would warn that all steps together retrace: a partial is one of a kind.
        autograph, uses_xla = self._compilation.autograph, self._compilation.uses_xla
        self._function = tf.function(functools.partial(self._run), autograph=autograph, jit_compile=uses_xla or None)
        # In the loop the body is a function of its own where it is compiled in another way than the loop.
        step = self._function if autograph or uses_xla else self._run
        self._looped = tf.function(functools.partial(self._loop, step), autograph=False)
        self._singles: dict[str, Any] = {}
        self._step = step
        self._is_on_trial = uses_xla and self._compilation.jit_compile == "auto"
        self._latest: tuple[weakref.ref[BatchCursor], Any] | None = None

    @property
    def is_driven(self) -> bool:
        """Whether the host runs step by step: because it is to, or because it must see how the first one ends."""
        return self._compilation.run_eagerly or self._is_on_trial

    def _loop_over(self, feed: BatchCursor) -> Any:
        """Return the loop that is traced for batches of a feed; to look it up costs about as much as to call it."""
        if self._latest is None or self._latest[0]() is not feed:
            start, limit = tf.constant(0, tf.int64), limits(1, 0)
            args = start, self._begun.read_value(), limit, tf.constant(math.inf, tf.float64)
            looped = self._check(self._looped, feed.reader.signature(), *args)
            self._latest = weakref.ref(feed), looped
        return self._latest[1]

    def _single(self, batch: Any, take_logs: TakeLogs) -> Any:
        """Return the step that is traced for batches like one, of any size; by their shapes, it is found at once."""
        leaves = tf.nest.flatten(batch)
        key = str([None if value is None else (value.dtype, value.shape[1:]) for value in leaves])
        key = f"{key} {layout_of(batch)}"
        if key not in self._singles:

            def alone(batch: Any, counts: tf.Tensor) -> Any:
                return self._alone(self._step, batch, counts, take_logs)

            traced = tf.function(alone, autograph=False)
            self._singles[key] = self._check(traced, open_spec_of(batch), tf.TensorSpec([6], tf.int64))
        return self._singles[key]

    def _loop(
        self,
        step: Callable[[Any], Any],
        source: ArrayReader | IteratorReader,
        start: tf.Tensor,
        counts: tf.Tensor,
        limit: tf.Tensor,
        seconds: tf.Tensor,
    ) -> None:
        """Run steps until the counts pass the limit, or, after one step at least, the time is over.

        The counts are noted before each step, for the case that it fails. The time is looked at where the steps run:
        data may turn slow in the middle of a call that was planned when it was fast.
        """
        with tf.device("CPU:0"):
            began = tf.timestamp()
            deadline = began + seconds

        def goes_on(counts: tf.Tensor, now: tf.Tensor) -> tf.Tensor:
            with tf.device("CPU:0"):
                return tf.reduce_all(counts <= limit) & (now < deadline)

        def run(counts: tf.Tensor, now: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            del now
            with tf.device("CPU:0"):
                noted, number = self._begun.assign(counts), start + counts[0]
            with tf.control_dependencies([noted]), tf.name_scope(DRAWING):
                batch = source.read(number)
            with after(batch) if isinstance(source, IteratorReader) else contextlib.nullcontext():
                ended = step(batch)
            with tf.device("CPU:0"):
                counts = counted(counts, ended)
                with tf.control_dependencies([counts]):
                    return counts, tf.timestamp()

        counts, _ = tf.while_loop(goes_on, run, (counts, began))
        self._begun.assign(counts)

    def _alone(
        self, step: Callable[[Any], Any], batch: Any, counts: tf.Tensor, take_logs: TakeLogs
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """Run one step, and return the counts after it and what it logged."""
        with tf.device("CPU:0"):
            noted = self._begun.assign(counts)
        with tf.control_dependencies([noted]):
            ended = step(batch)
        with tf.device("CPU:0"):
            return counted(counts, ended), take_logs()

    def _run(self, batch: Any) -> Any:
        with self._around(), frozen(self.selection, self._note) as calls:
            result = self._rest(batch) if isinstance(batch, Features) else self._body(batch)
        self._used |= calls.read
        self.trace_count += not tf.executing_eagerly()
        return result

    def _whole(self, spec: Any) -> Any:
        """Trace the body by itself, for batches of a signature."""
        return tf.function(self._body, autograph=self._compilation.autograph).get_concrete_function(spec)

    def _rest(self, features: Features) -> Any:
        """Run what of the body comes behind its split."""
        assert self._split is not None
        return self._split.rest_for(features)(features)

    def _traced(self, function: Any, *args: Any) -> Any:
        """Call a compiled function; where that traces it, look what it reads."""
        traced = self.trace_count
        result = function(*args)
        if self.trace_count > traced:
            self._warn_untracked(function.get_concrete_function(*args))
        return result

    def _check(self, function: Any, *args: Any) -> Any:
        """Return a function's trace, made if there is none, after a look at what it reads."""
        traced = self.trace_count
        concrete = function.get_concrete_function(*args)
        if self.trace_count > traced:
            self._warn_untracked(concrete)
        return concrete

    def _functions(self, traced: Any) -> list[Any]:
        """Return the functions that tell what a traced step assigns to."""
        return [traced]

    def _warn_untracked(self, traced: Any) -> None:
        """Name the variables that a traced step uses as if they trained, though the model does not track them."""
        known = {id(variable.tf_variable) for variable in self.selection.tree.variables} | set(map(id, self._own()))
        unknown = [variable for variable in traced.trainable_variables if id(variable) not in known]
        untracked.warn(unknown, self._used, self._functions(traced))
