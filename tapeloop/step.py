"""A selection and a body become a compiled step. Nothing here knows a policy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tapeloop.errors import DisconnectedError
from tapeloop.modes import frozen
from tapeloop.optim import Gradient
from tapeloop.selection import Selection
from tapeloop.tree import VariableInfo


class GroupTape(tf.GradientTape):
    """A gradient tape that watches the variables it was made for and nothing else.

    Attributes:
        variables: The variables that it watches.
    """

    def __init__(self, variables: Sequence[VariableInfo], persistent: bool = False) -> None:
        super().__init__(persistent=persistent, watch_accessed_variables=False)
        self.variables = tuple(variables)

    def __enter__(self) -> GroupTape:
        super().__enter__()
        for variable in self.variables:
            self.watch(variable.tensor)
        return self


class Step:
    """A body compiled for one selection: traced once for each signature of a batch.

    Attributes:
        selection: What trains and what runs in inference mode while the body is traced.
        kind: `"train"`, `"eval"` or `"predict"`.
        trace_count: How often the body was traced.
    """

    def __init__(self, kind: str, body: Callable[[Any], Any], selection: Selection, autograph: bool) -> None:
        self.kind = kind
        self.selection = selection
        self.trace_count = 0
        self._body = body
        # TensorFlow counts traces by code, and would warn that all steps together retrace: a partial is one of a kind.
        self._function = tf.function(functools.partial(self._run), autograph=autograph)

    def __call__(self, batch: Any) -> Any:
        """Run the body on a batch."""
        traced = self.trace_count
        result = self._function(batch)
        if self.trace_count > traced:
            self.trace(batch)
        return result

    def trace(self, batch: Any) -> None:
        """Trace the body for batches like this one, which shows what is wrong with it before anything has moved."""
        _warn_untracked(self._function.get_concrete_function(batch), self.selection)

    def _run(self, batch: Any) -> Any:
        with frozen(self.selection):
            result = self._body(batch)
        self.trace_count += 1
        return result


def connected_gradients(tape: GroupTape, loss: tf.Tensor) -> list[tuple[Gradient, VariableInfo]]:
    """Return the gradient of `loss` for each variable that `tape` watches.

    Raises:
        DisconnectedError: For some of them there is none.
        TypeError: `tape` is no tape of the trainer's.
        ValueError: `loss` is not a scalar.
    """
    if not isinstance(tape, GroupTape):
        raise TypeError(f"`update` takes what `self.tape(...)` returned. Received: {tape!r}.")
    if not tf.is_tensor(loss) or loss.shape.rank != 0:
        raise ValueError(f"The loss must be a scalar tensor, such as the mean over the batch. Received: {loss!r}.")
    gradients = tape.gradient(loss, [variable.tensor for variable in tape.variables])
    missing = [variable for gradient, variable in zip(gradients, tape.variables) if gradient is None]
    if missing:
        raise DisconnectedError(_disconnected(missing, len(tape.variables)))
    return list(zip(gradients, tape.variables))


def _warn_untracked(traced: Any, selection: Selection) -> None:
    """Name the variables that a traced step reads and the model does not track, where they could have trained."""
    known = {id(variable.tensor) for variable in selection.tree.variables}
    unknown = sorted({variable.name for variable in traced.trainable_variables if id(variable) not in known})
    if unknown:
        warnings.warn(
            f"The step reads {len(unknown)} variables that the model does not track, such as "
            f"{', '.join(f'`{name}`' for name in unknown[:5])}: no policy can see them, and they do not train. Make "
            "them by `add_weight`, or assign their layer to an attribute of a Keras layer or `tf.Module`.",
            stacklevel=2,
        )


def _disconnected(missing: list[VariableInfo], total: int) -> str:
    paths = ", ".join(f"`{variable.path}`" for variable in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    integers = [variable for variable in missing if not tf.as_dtype(variable.dtype).is_floating]
    if integers:
        cause = "They hold integers, which have no gradient"
    elif len(missing) == total:
        cause = "The loss does not depend on any of them: was it computed inside `with self.tape():`, in TensorFlow ops"
    else:
        cause = "Either their layer is not called in this step, or its output passes a `stop_gradient` or an integer"
    return (
        f"{len(missing)} of the {total} variables that should train get no gradient: {paths}{more}. {cause}. "
        "Let the loss depend on them, or freeze them: `Freeze(...)` with these paths."
    )
