"""A selection and a body become a compiled step. Nothing here knows a policy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop import untracked
from tapeloop.batch import after
from tapeloop.feed import DRAWING, Arrays, Feed, Stream
from tapeloop.frontier import Cut, Features, find
from tapeloop.graph import Traced
from tapeloop.modes import Note, frozen
from tapeloop.obstacles import Obstacle
from tapeloop.pace import Pace
from tapeloop.selection import Selection
from tapeloop.tally import Clock, Tally, counted, has_stopped, limits

COMPILE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError)


@dataclass(frozen=True)
class Compilation:
    """How a body becomes a step.

    Attributes:
        autograph: Whether AutoGraph converts the body.
        jit_compile: Whether XLA compiles it; with `"auto"`, where there is a GPU and XLA can.
        run_eagerly: Whether it is not compiled at all, but run op by op.
        steps_per_call: How many steps a call of the compiled loop runs, or `"auto"`.
    """

    autograph: bool
    jit_compile: bool | str = False
    run_eagerly: bool = False
    steps_per_call: int | str = "auto"

    def __post_init__(self) -> None:
        if self.jit_compile not in (True, False, "auto"):
            raise ValueError(f"`jit_compile` must be True, False or 'auto'. Received: {self.jit_compile!r}.")
        if not isinstance(self.run_eagerly, bool):
            raise ValueError(f"`run_eagerly` must be True or False. Received: {self.run_eagerly!r}.")
        if self.run_eagerly and self.jit_compile is True:
            raise ValueError(
                "`run_eagerly=True` runs op by op, and `jit_compile=True` compiles. Received both: leave one out."
            )
        Pace(self.steps_per_call)

    @property
    def uses_xla(self) -> bool:
        """Whether XLA is to be tried."""
        return bool(self.jit_compile) and (self.jit_compile is True or bool(tf.config.list_physical_devices("GPU")))


class Step:
    """A body compiled for one selection, and a loop around it that draws batches from a feed without the host.

    Both are traced once for each signature of a batch.

    Attributes:
        selection: What trains and what runs in inference mode while the body is traced.
        kind: `"train"`, `"eval"` or `"predict"`.
        trace_count: How often the body was traced.
        pace: How many steps a call of the loop runs.
        moves: The identities of the variables that it assigns to, where its frontier was looked for.
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
        self.moves: frozenset[int] = frozenset()
        self._cuts: dict[tuple[str, bool, frozenset[int]], Cut] = {}
        self._cut: Cut | None = None
        self._begun = clock.counts
        self.compile()

    def run(
        self, feed: Feed, most: int, before: Tally, patience: int, so_far: tuple[int, int] = (0, 0)
    ) -> tuple[Tally, BaseException | None]:
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
                self._loop_over(feed)(feed.source, start, self._begun.read_value(), limit, seconds)
            else:
                if self._is_on_trial:
                    self.trace(feed)
                self._loop(self, feed.source, start, self._begun.read_value(), limit, seconds)
                self._is_on_trial = False
        except BaseException as error:
            failure = error
        tally = Tally.of(self._begun)
        if failure is not None and has_stopped(failure):
            tally, failure = tally.stopped(), None
        feed.drawn(tally.batches)
        if isinstance(failure, tf.errors.OutOfRangeError) and feed.has_ended(failure):
            failure = None
        return tally, failure and (feed.cause_of(failure) or failure)

    def run_on(self, batch: Any, before: Tally, so_far: tuple[int, int]) -> tuple[Tally, BaseException | None]:
        """Run one step on a batch in tensors; see `run`."""
        counts, failure = before.start(*so_far), None
        try:
            arguments = batch, counts
            counts = self._alone(self, *arguments) if self.is_driven else self._traced(self._on_batch, *arguments)
        except BaseException as error:
            failure = error
        tally = Tally.of(counts)
        if failure is not None and has_stopped(failure):
            tally, failure = tally.stopped(), None
        return tally, failure

    def __call__(self, batch: Any) -> Any:
        """Run the body on a batch."""
        if self._compilation.run_eagerly:
            return self._run(batch)
        try:
            return self._traced(self._function, batch)
        except COMPILE_ERRORS as error:
            reason = re.search(r"on XLA\w*: (\w+)|(?s:.*)\bXLA\b", str(error))
            if self._compilation.jit_compile != "auto" or not reason:
                raise
            warnings.warn(
                f"XLA cannot compile the {self.kind} step because of "
                f"{f'the op `{reason[1]}`' if reason[1] else str(error).splitlines()[0]}: going on without XLA. "
                "`jit_compile=False` says so from the start.",
                stacklevel=2,
            )
            self._compilation = dataclasses.replace(self._compilation, jit_compile=False)
            self.compile()
            return self(batch)

    def trace(self, feed: Feed) -> None:
        """Trace the loop for batches of a feed, which shows what is wrong before anything has moved."""
        if self._compilation.run_eagerly:
            return
        if self.is_driven and not self._is_on_trial:
            self._check(self._function, feed.spec())
        else:
            self._loop_over(feed)

    def cut(self, spec: Any, batch: Any, *, random: bool, moving: frozenset[int] = frozenset()) -> Cut | list[Obstacle]:
        """Find the frontier of the step, on whose features it then runs where it is fed them.

        Args:
            spec: The signature of batches.
            batch: One of them.
            random: Whether what is random may come before it.
            moving: The identities of variables that another step moves.

        Returns:
            Where the step is cut, or what stands in the way.
        """
        key = str(spec), random, moving
        if key not in self._cuts:
            with self._around(), frozen(self.selection, self._note) as calls:
                function = self._whole(spec)
            self._used |= calls.read
            self._warn_untracked(function)
            variables = [*(variable.tensor for variable in self.selection.tree.variables), *self._own()]
            whole = Traced(function, variables)
            self.moves = frozenset(id(whole.variables[name]) for name in whole.written() if name in whole.variables)
            found = find(whole, self.selection, batch, random=random, moving=moving)
            if not isinstance(found, Cut):
                return found
            self._cuts[key] = found
        if self._cut not in (None, self._cuts[key]):
            self.compile()  # what is traced is the rest behind another cut
        self._cut = self._cuts[key]
        return self._cut

    def compile(self) -> None:
        """Forget all traces."""
        # TensorFlow counts traces by code, and would warn that all steps together retrace: a partial is one of a kind.
        autograph, uses_xla = self._compilation.autograph, self._compilation.uses_xla
        self._function = tf.function(functools.partial(self._run), autograph=autograph, jit_compile=uses_xla or None)
        # In the loop the body is a function of its own where it is compiled in another way than the loop.
        step = self._function if autograph or uses_xla else self._run
        self._looped = tf.function(functools.partial(self._loop, step), autograph=False)
        self._on_batch = tf.function(functools.partial(self._alone, step), autograph=False, reduce_retracing=True)
        self._is_on_trial = uses_xla and self._compilation.jit_compile == "auto"
        self._latest: tuple[weakref.ref[Feed], Any] | None = None

    @property
    def is_driven(self) -> bool:
        """Whether the host runs step by step: because it is to, or because it must see how the first one ends."""
        return self._compilation.run_eagerly or self._is_on_trial

    def _loop_over(self, feed: Feed) -> Any:
        """Return the loop that is traced for batches of a feed; to look it up costs about as much as to call it."""
        if self._latest is None or self._latest[0]() is not feed:
            start, limit = tf.constant(0, tf.int64), limits(1, 0)
            args = start, self._begun.read_value(), limit, tf.constant(math.inf, tf.float64)
            looped = self._check(self._looped, feed.source.signature(), *args)
            self._latest = weakref.ref(feed), looped
        return self._latest[1]

    def _loop(
        self,
        step: Callable[[Any], Any],
        source: Arrays | Stream,
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
                batch = source.batch(number)
            with after(batch) if isinstance(source, Stream) else contextlib.nullcontext():
                ended = step(batch)
            with tf.device("CPU:0"):
                counts = counted(counts, ended)
                with tf.control_dependencies([counts]):
                    return counts, tf.timestamp()

        counts, _ = tf.while_loop(goes_on, run, (counts, began))
        self._begun.assign(counts)

    def _alone(self, step: Callable[[Any], Any], batch: Any, counts: tf.Tensor) -> tf.Tensor:
        """Run one step, and return the counts after it."""
        with tf.device("CPU:0"):
            noted = self._begun.assign(counts)
        with tf.control_dependencies([noted]):
            ended = step(batch)
        with tf.device("CPU:0"):
            return counted(counts, ended)

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
        """Run what of the body comes behind its cut."""
        assert self._cut is not None
        return self._cut.rest_for(features)(features)

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
        known = {id(variable.tensor) for variable in self.selection.tree.variables} | set(map(id, self._own()))
        unknown = [variable for variable in traced.trainable_variables if id(variable) not in known]
        untracked.warn(unknown, self._used, self._functions(traced))
