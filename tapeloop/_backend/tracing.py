"""Private names of TensorFlow about tracing: what a graph captures, runs unasked, and may do beside computing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.framework import op_def_registry


def effects(function: Any) -> list[tf.Operation]:
    """Return the ops of a concrete function that run whether or not an output needs them.

    TensorFlow records them on the graph, whose class is not documented.
    """
    return list(function.graph.control_outputs)


def is_stateful(op: str) -> bool:
    """Tell whether ops of a type may do more than compute something from their inputs.

    `tf.Operation.op_def` says so for an op in a graph. Nothing public does for a node of a function that it calls.

    Raises:
        ValueError: TensorFlow knows no such type.
    """
    definition = op_def_registry.get(op)
    if definition is None:
        raise ValueError(f"TensorFlow knows no op of the type `{op}`, so nobody can tell what it does.")
    return bool(definition.is_stateful)


def outside_of_trace(make: Callable[[], None]) -> None:
    """Call `make`, which makes variables, as if no function were being traced.

    `tf.init_scope` lifts the variables out of the graph, but `tf.function` still sees them being made and traces a
    second time for it. What is being traced is known to the tracing thread alone, so another thread is free of it;
    Keras keeps the dtype policy and the custom objects in scope by thread too, which is why they are handed over.
    """
    failures: list[Exception] = []
    policy = keras.config.dtype_policy()
    custom_objects = global_state.get_global_attribute("custom_objects_scope_dict") or {}

    def run() -> None:
        keras.config.set_dtype_policy(policy)
        try:
            with keras.saving.custom_object_scope(custom_objects):
                make()
        except Exception as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="tapeloop-outside-of-trace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def captures(graph: Any) -> list[tuple[Any, tf.Tensor]]:
    """Return what a graph that is being traced takes from outside, each with the tensor that stands for it inside.

    `ConcreteFunction.captured_inputs` says it of a function once its trace has ended, and names no inner tensors.
    """
    return list(getattr(graph, "captures", ()))
