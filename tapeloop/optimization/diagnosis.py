"""Why a variable gets no gradient, as far as the traced graph and its value tell."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tapeloop._backend import tracing
from tapeloop._backend.traced_graph import PYTHON
from tapeloop._search import search, way_to
from tapeloop.errors import listed
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.optimization.untracked_variables import BLOCKING


def disconnected(loss: tf.Tensor, missing: Sequence[VariableInfo], total: int) -> str:
    """Say which variables get no gradient, the likely cause for each, and what to do.

    Args:
        loss: What was differentiated.
        missing: The variables without a gradient.
        total: How many should have one.
    """
    causes: dict[str, list[str]] = {}
    for variable in missing:
        causes.setdefault(_cause(loss, variable), []).append(variable.path)
    return (
        f"{len(missing)} of the {total} variables that should train get no gradient. "
        + " ".join(f"{listed(paths)}: {cause}." for cause, paths in causes.items())
        + " Let the loss depend on them, or freeze them: `Freeze(...)` with these paths; of a loss that is one of "
        "several, take the gradients by `self.gradients(tape, loss, unconnected='zero')`."
    )


def warn_zero_terms(selection: Selection) -> None:
    """Warn of layers whose low-rank terms, of Keras' `enable_lora`, are all zero: so are their gradients, for good.

    Args:
        selection: What trains.
    """
    # The change of a kernel is the product of its two terms, and the gradient of each has the other as a factor.
    terms: dict[SubmodelInfo, list[VariableInfo]] = {}
    for variable in selection.trained:
        if variable.name.startswith("lora_") and getattr(variable.submodels[-1].object, "lora_enabled", False):
            terms.setdefault(variable.submodels[-1], []).append(variable)
    zero = [
        layer.path
        for layer, found in terms.items()
        if len(found) > 1 and not any(bool(tf.reduce_any(each.tf_variable != 0)) for each in found)
    ]
    if zero:
        warnings.warn(
            f"The low-rank terms of {listed(zero)} are all zero, so that their gradients are zero and they never "
            "train. Keras sets them to zero when weights without such terms are loaded: load them first, and call "
            "`enable_lora` after that.",
            stacklevel=2,
        )


def _cause(loss: tf.Tensor, variable: VariableInfo) -> str:
    if not tf.as_dtype(variable.dtype).is_floating:
        return f"integers ({variable.dtype}) have no gradient"
    if tf.executing_eagerly():
        return "the loss does not depend on it, or through a `stop_gradient`, an integer or NumPy"
    # The causes in the order in which they are told apart: not read; read, and going nowhere; cut off on the way; or
    # read outside of the tape, which the graph does not show and which is left if it shows nothing else.
    read = next(iter(tracing.captured_as(loss.graph, [variable.tf_variable])), None)
    if read is None:
        return "not read where the loss is computed, its layer is not called there"
    route = _route(read, loss)
    if route is None:
        return "what is computed from it does not reach the loss"
    if _is_differentiable(loss, read):
        return "read outside of `with self.tape(...):`"
    return f"on the way to the loss is {_what(_block(loss, route))}"


def _route(start: tf.Tensor, end: tf.Tensor) -> list[Any] | None:
    """Return the ops on a shortest way from one tensor of a graph to another, or None where there is no way."""
    came_from = search(start.consumers(), lambda op: [user for output in op.outputs for user in output.consumers()])
    return way_to(end.op, came_from) if end.op in came_from else None


def _is_differentiable(loss: tf.Tensor, tensor: tf.Tensor) -> bool:
    """Tell whether the graph, without regard to tapes, has a gradient of the loss for a tensor of it."""
    try:
        return tf.gradients(loss, tensor)[0] is not None
    except LookupError:  # an op that has none, and was not declared to have none
        return False


def _block(loss: tf.Tensor, route: Sequence[Any]) -> Any:
    """Return the op of the route that lets no gradient through: those after it have one, those before it none."""

    def is_behind(number: int) -> bool:
        return any(_is_differentiable(loss, output) for output in route[number].outputs)

    # By bisection, for each look at an op asks TensorFlow for the gradients of the whole way behind it.
    return route[bisect.bisect_left(range(len(route) - 1), True, key=is_behind)]


def _what(op: Any) -> str:
    """Say what an op is."""
    if op.type in BLOCKING:
        return "a `stop_gradient`"
    if op.type in PYTHON:
        return "a `py_function` or `numpy_function`"
    if op.type == "IdentityN":
        return "a custom gradient (or `remat`, for which a layer's arguments are all that it depends on)"
    if op.type in ("If", "StatelessIf", "Case", "StatelessCase", "While", "StatelessWhile"):
        return f"something in a branch or a loop (`{op.type}`)"
    integers = [tensor.dtype.name for tensor in op.inputs if tensor.dtype.is_integer]
    return (
        f"`{op.type}` of {integers[0]}, and integers have no gradient" if integers else f"`{op.type}`, without gradient"
    )
