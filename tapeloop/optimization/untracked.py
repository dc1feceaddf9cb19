"""Variables that a step uses as if they were the model's, though the model does not track them.

A layer that a model keeps in a closure, or one that the user keeps beside the model and calls inside the tape, looks as
if it would train, and does not. A target network that is kept beside the model is used as well, but nobody expects it
to train: the step assigns to it, or calls it outside of the tape or behind a `stop_gradient`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import tensorflow as tf

from tapeloop._backend import tracing
from tapeloop._backend.traced_graph import TracedGraph

BLOCKING = frozenset({"StopGradient", "PreventGradient"})


def op_count() -> int:
    """Return how many ops the graph that is being traced has; 0 where nothing is traced."""
    return 0 if tf.executing_eagerly() else len(tf.compat.v1.get_default_graph().get_operations())


def handles_read_since(start: int) -> set[int]:
    """Return the identities of the handles of the variables that the ops added to the graph since `start` take."""
    if tf.executing_eagerly():
        return set()
    graph = tf.compat.v1.get_default_graph()
    return set(_handles(graph, graph.get_operations()[start:]))


def handles_behind(loss: tf.Tensor, start: int) -> set[int]:
    """Return the identities of the handles of the variables that would get a gradient of a loss if they were watched.

    Args:
        loss: The loss, in a graph.
        start: How many ops the graph had when the tape began to record.
    """
    if tf.executing_eagerly():
        return set()
    recorded = {id(op) for op in loss.graph.get_operations()[start:]}
    seen: set[int] = set()
    found, waiting = [], [loss.op]
    while waiting:
        op = waiting.pop()
        if id(op) in seen or id(op) not in recorded or op.type in BLOCKING:
            continue
        seen.add(id(op))
        found.append(op)
        waiting += [given.op for given in op.inputs if given.dtype.is_floating]
    return set(_handles(loss.graph, found))


def warn(variables: Iterable[tf.Variable], used: Collection[int], functions: Iterable[Any]) -> None:
    """Name the variables that are used as if they would train.

    Args:
        variables: Variables that a step reads and the model does not track.
        used: The identities of the handles of the variables that are used so.
        functions: The concrete functions of the step, which tell what it assigns to.
    """
    suspects = [variable for variable in variables if id(variable.handle) in used]
    if not suspects:
        return
    written: set[int] = set()
    for function in functions:
        whole = TracedGraph(function, suspects)
        written |= {id(whole.variables[name]) for name in whole.written() if name in whole.variables}
    unknown = sorted({variable.name for variable in suspects if id(variable) not in written})
    if unknown:
        warnings.warn(
            f"The step uses {len(unknown)} variables that the model does not track, such as "
            f"{', '.join(f'`{name}`' for name in unknown[:5])}: no policy can see them, and they do not train. Make "
            "them by `add_weight`, or assign their layer to an attribute of a Keras layer or `tf.Module`; what should "
            "not train belongs outside of the tape, or behind `tf.stop_gradient`.",
            stacklevel=2,
        )


def _handles(graph: Any, ops: Iterable[tf.Operation]) -> Iterator[int]:
    outside = {id(inner): id(outer) for outer, inner in tracing.captures(graph)}
    for op in ops:
        for given in op.inputs:
            if given.dtype == tf.resource and id(given) in outside:
                yield outside[id(given)]
