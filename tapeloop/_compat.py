"""The private names of Keras that tapeloop cannot do without, each in one function.

`tests/test_compat.py` fails when one of them changes its meaning.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that `layer` tracks directly, in the order in which it tracked them.

    `keras.Model.layers` is public; a plain `keras.Layer` that holds others has no public counterpart.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def inherited_training(layer: keras.Layer) -> bool | None:
    """Return the `training` that the layers called next inside `layer` would inherit.

    Keras keeps one value for a whole nest of calls, and offers no way to read it.
    """
    return getattr(layer._get_call_context(), "training", None)


def inherit_training(layer: keras.Layer, training: bool | None) -> None:
    """Set the `training` that the layers called next inside `layer` inherit.

    An explicit argument would do for layers that take one; those that do not are reached by this alone.
    """
    layer._get_call_context().training = training


def call_methods(layer: keras.Layer) -> tuple[str, ...]:
    """Return the names of the methods by which Keras may run `layer`.

    A quantized layer runs `quantized_call` instead of `call`, which Keras decides in each call anew.
    """
    return ("call",) if layer.quantization_mode is None else ("call", "quantized_call")


def sealed_scope() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which assignments to Keras variables, and losses added by layers, are dropped.

    Inside a user's own `keras.StatelessScope` there is nothing to drop, and a second scope would hide the values
    that the user maps to variables; no public function tells whether one is active.
    """
    return contextlib.nullcontext() if backend.in_stateless_scope() else keras.StatelessScope()


def added_losses(layer: keras.Layer) -> list[tf.Tensor]:
    """Return what `layer` itself, without its sublayers, added to the losses when it was last called.

    The public `Layer.losses` mixes in those of sublayers and the weight penalties, unmarked.
    """
    return list(layer._get_own_losses())


def outside_of_trace(make: Callable[[], None]) -> None:
    """Call `make`, which makes variables, as if no function were being traced.

    `tf.init_scope` lifts the variables out of the graph, but `tf.function` still sees them being made and traces a
    second time for it. What is being traced is known to the tracing thread alone, so another thread is free of it;
    Keras keeps the dtype policy by thread too, which is why it is handed over.
    """
    failures: list[Exception] = []
    policy = keras.config.dtype_policy()

    def run() -> None:
        keras.config.set_dtype_policy(policy)
        try:
            make()
        except Exception as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="tapeloop-outside-of-trace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
