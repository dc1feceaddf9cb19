"""Private names of TensorFlow about tracing: what a graph captures, runs unasked, and may do beside computing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import config, op_def_registry


def effects(function: Any) -> list[tf.Operation]:
    """Return the ops of a concrete function that run whether or not an output needs them.

    TensorFlow records them on the graph, whose class is not documented.
    """
    return list(function.graph.control_outputs)


def unbound(function: Any) -> Callable[..., Any]:
    """Return what calls a concrete function on arguments of the structure that it was traced for, which nobody checks.

    A call of the function itself binds the arguments to its signature first, which takes 0.2 ms.
    """

    def call(*args: Any) -> Any:
        # `tf.is_tensor` asks a protocol, which takes ten times as long.
        tensors = [part for part in tf.nest.flatten(args, expand_composites=True) if isinstance(part, tf.Tensor)]
        return function._call_flat(tensors, function.captured_inputs)

    return call


def is_stateful(op: str) -> bool:
    """Tell whether ops of a type may do more than compute something from their inputs.

    `tf.Operation.op_def` says so for an op in a graph. Nothing public does for a node of a function that it calls.

    Raises:
        ValueError: TensorFlow knows no such type.
    """
    return bool(_definition(op).is_stateful)


def may_act(op: str) -> bool:
    """Tell whether ops of a type are stateful or take a resource: not all that change one are called stateful.

    Raises:
        ValueError: TensorFlow knows no such type.
    """
    return is_stateful(op) or any(taken.type == tf.resource.as_datatype_enum for taken in _definition(op).input_arg)


def clock() -> tf.Tensor:
    """Return the time in seconds as the graph runs; 0 where ops must be deterministic, which a clock is not.

    TensorFlow says that they must, by `tf.config.experimental.enable_op_determinism`, in its private `config` alone.
    """
    return tf.zeros((), tf.float64) if config.is_op_determinism_enabled() else tf.timestamp()


def _definition(op: str) -> Any:
    definition = op_def_registry.get(op)
    if definition is None:
        raise ValueError(f"TensorFlow knows no op of the type `{op}`, so nobody can tell what it does.")
    return definition


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Run eagerly inside this context, though a function is being traced, and make variables unseen by its trace.

    `tf.init_scope` lifts variables out of the graph, but `tf.function` still sees them being made, by the creators that
    stand on the graph, and traces a second time for it. Another graph has no creators.
    """
    # A thread of its own was tried first: it has no creators either, but not the dtype policy of the user's thread.
    with tf.init_scope(), tf.Graph().as_default(), context.eager_mode():
        yield


def ops_since(start: int) -> list[tf.Operation]:
    """Return the ops that the graph that is being traced got after its first `start`; none where nothing is traced."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()[start:]


def op_count() -> int:
    """Return how many ops the graph that is being traced has; 0 where nothing is traced."""
    return len(ops_since(0))


def handle_id(variable: tf.Variable) -> int:
    """Return what tells a variable apart in a graph: Keras and TensorFlow make several objects for one handle."""
    return id(variable.handle)


def handles_taken(graph: Any, ops: Iterable[tf.Operation]) -> set[int]:
    """Return the `handle_id`s of the variables that some ops of a graph take."""
    # A variable enters a graph as its handle, a tensor of the type `resource`, under a name that says nothing of it.
    outside = {id(inner): id(outer) for outer, inner in captures(graph)}
    given = [tensor for op in ops for tensor in op.inputs if tensor.dtype == tf.resource]
    return {outside[id(tensor)] for tensor in given if id(tensor) in outside}


def captured_as(graph: Any, variables: Iterable[tf.Variable]) -> list[tf.Tensor]:
    """Return the tensors that stand for variables inside a graph."""
    wanted = {handle_id(variable) for variable in variables}
    return [inner for outer, inner in captures(graph) if id(outer) in wanted]


def captures(graph: Any) -> list[tuple[Any, tf.Tensor]]:
    """Return what a graph that is being traced takes from outside, each with the tensor that stands for it inside.

    `ConcreteFunction.captured_inputs` says it of a function once its trace has ended, and names no inner tensors.
    """
    # A plain `tf.Graph`, which belongs to no function, takes nothing from outside.
    return list(getattr(graph, "captures", ()))
