"""Variables that a step uses as if they were the model's, though the model does not track them.

A layer that a model keeps in a closure, or one that the user keeps beside the model and calls inside the tape, looks as
if it would train, and does not. A target network that is kept beside the model is used as well, but nobody expects it
to train: the step assigns to it, or calls it outside of the tape or behind a `stop_gradient`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import tensorflow as tf

from tapeloop._backend import tracing
from tapeloop._backend.traced_graph import TracedGraph
from tapeloop._search import search

BLOCKING = frozenset({"StopGradient", "PreventGradient"})


def handles_read_since(start: int) -> set[int]:
    """Return the identities of the handles of the variables that the ops added to the graph since `start` take."""
    return tracing.handles_taken(tf.compat.v1.get_default_graph(), tracing.ops_since(start))


def handles_behind(loss: tf.Tensor, start: int) -> set[int]:
    """Return the identities of the handles of the variables that would get a gradient of a loss if they were watched.

    Args:
        loss: The loss, in a graph.
        start: How many ops the graph had when the tape began to record.
    """
    if tf.executing_eagerly():
        return set()
    recorded = {id(op) for op in loss.graph.get_operations()[start:]}

    # No gradient goes through whole numbers, a `stop_gradient`, or what was computed before the tape began.
    def counts(op: tf.Operation) -> bool:
        return id(op) in recorded and op.type not in BLOCKING

    behind = search([loss.op], lambda op: [i.op for i in op.inputs if i.dtype.is_floating] if counts(op) else [])
    return tracing.handles_taken(loss.graph, filter(counts, behind))


def warn(variables: Iterable[tf.Variable], used: Collection[int], function: Any) -> None:
    """Name the variables that are used as if they would train.

    Args:
        variables: Variables that a step reads and the model does not track.
        used: The identities of the handles of the variables that are used so.
        function: The concrete function of the step, which tells what it assigns to.
    """
    # A target network beside the model is read outside of the tape, or assigned to: it is not meant to train.
    suspects = [variable for variable in variables if tracing.handle_id(variable) in used]
    if not suspects:
        return
    whole = TracedGraph(function, suspects)
    written = {id(whole.variables[name]) for name in whole.written() if name in whole.variables}
    unknown = sorted({variable.name for variable in suspects if id(variable) not in written})
    if unknown:
        warnings.warn(
            f"The step uses {len(unknown)} variables that the model does not track, such as "
            f"{', '.join(f'`{name}`' for name in unknown[:5])}: no policy can see them, and they do not train. Make "
            "them by `add_weight`, or assign their layer to an attribute of a Keras layer or `tf.Module`; what should "
            "not train belongs outside of the tape, or behind `tf.stop_gradient`.",
            stacklevel=2,
        )
