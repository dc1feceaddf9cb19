"""A selection and a body become a compiled step. Nothing here knows a policy."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop.modes import frozen
from tapeloop.selection import Selection

COMPILE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError)


@dataclass(frozen=True)
class Compilation:
    """How a body becomes a step.

    Attributes:
        autograph: Whether AutoGraph converts the body.
        jit_compile: Whether XLA compiles it; with `"auto"`, where there is a GPU and XLA can.
        run_eagerly: Whether it is not compiled at all, but run op by op.
    """

    autograph: bool
    jit_compile: bool | str = False
    run_eagerly: bool = False

    def __post_init__(self) -> None:
        if self.jit_compile not in (True, False, "auto"):
            raise ValueError(f"`jit_compile` must be True, False or 'auto'. Received: {self.jit_compile!r}.")
        if not isinstance(self.run_eagerly, bool):
            raise ValueError(f"`run_eagerly` must be True or False. Received: {self.run_eagerly!r}.")
        if self.run_eagerly and self.jit_compile is True:
            raise ValueError(
                "`run_eagerly=True` runs op by op, and `jit_compile=True` compiles. Received both: leave one out."
            )

    @property
    def uses_xla(self) -> bool:
        """Whether XLA is to be tried."""
        return bool(self.jit_compile) and (self.jit_compile is True or bool(tf.config.list_physical_devices("GPU")))


class Step:
    """A body compiled for one selection: traced once for each signature of a batch.

    Attributes:
        selection: What trains and what runs in inference mode while the body is traced.
        kind: `"train"`, `"eval"` or `"predict"`.
        trace_count: How often the body was traced.
    """

    def __init__(
        self,
        kind: str,
        body: Callable[[Any], Any],
        selection: Selection,
        compilation: Compilation,
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        own: Callable[[], list[tf.Variable]] = list,
    ) -> None:
        """Make the step.

        Args:
            kind: `"train"`, `"eval"` or `"predict"`.
            body: What is compiled: a function of a batch.
            selection: What trains.
            compilation: How it is compiled.
            around: What else holds while the body is traced.
            own: Gives the variables that the body may read beside the model's.
        """
        self.kind = kind
        self.selection = selection
        self.trace_count = 0
        self._body = body
        self._compilation = compilation
        self._around = around
        self._own = own
        self.compile()

    def __call__(self, batch: Any) -> Any:
        """Run the body on a batch."""
        if self._compilation.run_eagerly:
            return self._run(batch)
        traced = self.trace_count
        try:
            result = self._function(batch)
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
            self._compilation = Compilation(self._compilation.autograph)
            self.compile()
            return self(batch)
        if self.trace_count > traced:
            _warn_untracked(self._function.get_concrete_function(batch), self.selection, self._own())
        return result

    def trace(self, batch: Any) -> None:
        """Trace the body for batches like this one, which shows what is wrong with it before anything has moved."""
        if self._compilation.run_eagerly:
            return
        traced = self.trace_count
        concrete = self._function.get_concrete_function(batch)
        if self.trace_count > traced:
            _warn_untracked(concrete, self.selection, self._own())

    def compile(self) -> None:
        """Forget all traces."""
        # TensorFlow counts traces by code, and would warn that all steps together retrace: a partial is one of a kind.
        run = functools.partial(self._run)
        jit_compile = self._compilation.uses_xla or None
        self._function = tf.function(run, autograph=self._compilation.autograph, jit_compile=jit_compile)

    def _run(self, batch: Any) -> Any:
        with self._around(), frozen(self.selection):
            result = self._body(batch)
        self.trace_count += not tf.executing_eagerly()
        return result


def _warn_untracked(traced: Any, selection: Selection, own: list[tf.Variable]) -> None:
    """Name the variables that a traced step reads and the model does not track, where they could have trained."""
    known = {id(variable.tensor) for variable in selection.tree.variables} | {id(variable) for variable in own}
    unknown = sorted({variable.name for variable in traced.trainable_variables if id(variable) not in known})
    if unknown:
        warnings.warn(
            f"The step reads {len(unknown)} variables that the model does not track, such as "
            f"{', '.join(f'`{name}`' for name in unknown[:5])}: no policy can see them, and they do not train. Make "
            "them by `add_weight`, or assign their layer to an attribute of a Keras layer or `tf.Module`.",
            stacklevel=2,
        )
