"""Ops of a graph run by themselves, outside of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.python.eager import context, execute


def can_run_alone(op: tf.Operation) -> bool:
    """Tell whether `runnable` runs an op: one that calls no function of its graph."""
    return not any(attr.HasField("func") or attr.list.func for attr in op.node_def.attr.values())


def runnable(op: tf.Operation) -> Callable[[Sequence[Any]], list[Any]]:
    """Return a function that runs an op of a graph eagerly, on values for what it takes, and returns what it gives.

    `tf.raw_ops` has the same ops, but renames the arguments and attributes of some, such as those of `Squeeze`.
    """
    # Attributes are read here, once: to read them takes ten times as long as to run a small op.
    if op.type == "Const":
        constant = [tf.constant(tf.make_ndarray(op.get_attr("value")))]
        return lambda values: constant
    attributes: list[Any] = []
    for name in op.node_def.attr:
        if not name.startswith("_"):  # notes of the graph, none of the op's own
            attributes += [name, tf.nest.map_structure(_as_given, op.get_attr(name))]
    kind, count, given = op.type.encode(), len(op.outputs), tuple(attributes)
    return lambda values: list(execute.execute(kind, count, list(values), given, context.context()))


def _as_given(value: Any) -> Any:
    """Return an attribute as an op that is run takes it: a dtype as its number, a shape as a list."""
    if isinstance(value, tf.DType):
        return value.as_datatype_enum
    return execute.make_shape(tf.TensorShape(value), "shape") if isinstance(value, TensorShapeProto) else value
