"""What is being traced, and what a traced function says of itself: names that TensorFlow does not export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_def_registry


def effects(function: Any) -> list[tf.Operation]:
    """Return the ops of a concrete function that run whether or not an output needs them.

    TensorFlow notes them on the graph, whose class it does not document.
    """
    return list(function.graph.control_outputs)


def is_stateful(op: str) -> bool:
    """Tell whether ops of a type may do more than compute something of what they take.

    `tf.Operation.op_def` says it of an op in a graph, but nothing public of one in a function that the graph calls.
    """
    return bool(op_def_registry.get(op).is_stateful)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Run eagerly inside this context, though a function is being traced, and make variables unseen by its trace.

    `tf.init_scope` lifts variables out of the graph, but `tf.function` still sees them being made, by the creators that
    stand on the graph, and traces a second time for it. Another graph has no creators.
    """
    with tf.init_scope(), tf.Graph().as_default(), context.eager_mode():
        yield


def captures(graph: Any) -> list[tuple[Any, tf.Tensor]]:
    """Return what a graph that is being traced takes from outside, each with the tensor that stands for it inside.

    `ConcreteFunction.captured_inputs` says it of a function once its trace has ended, and names no inner tensors.
    """
    return list(getattr(graph, "captures", ()))
