"""Checks that a compiled step makes when it runs, and telling from an error's text which of them failed."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from tapeloop.errors import DataError

_REFUSED = "the batch is refused:"


def require(condition: tf.Tensor, *said: Any) -> tf.Operation:
    """Return what lets a step fail, when it runs, where a batch is not as it must be; `refusal` makes an error of it.

    Args:
        condition: What must hold.
        said: The error's text, in strings and small tensors.
    """
    # The text is a constant of the graph: only an exception carries it to the host.
    return tf.debugging.Assert(condition, [_REFUSED, *said])


def refusal(error: BaseException) -> DataError | None:
    """Return what is wrong with the data, if an error says that: what `require` has prepared, or texts for numbers."""
    if isinstance(error, tf.errors.UnimplementedError) and "Cast string to" in str(error):
        return DataError(
            "The inputs, the targets or the weights of the examples are texts, and the model or the loss computes "
            "with numbers. Turn them into numbers, as `keras.layers.StringLookup` or `TextVectorization` does."
        )
    # TensorFlow prints each string and tensor in brackets of its own, one dimension a pair.
    found = re.search(rf"\[{_REFUSED}\] (.*\])", str(error)) if isinstance(error, tf.errors.OpError) else None
    return None if found is None else DataError(" ".join(re.findall(r"\[+([^\]]*)\]+", found[1])))


_STOPPED = "the step was not finite"


def stop_unless(finite: tf.Tensor) -> tf.Operation:
    """Return what ends the run of a compiled loop, when it runs, at a step that is not finite; see `has_stopped`."""
    return tf.debugging.Assert(finite, [_STOPPED])


def can_stop() -> bool:
    """Tell whether TensorFlow is set up so that `stop_unless` is heeded, and its failure seen by who runs the step."""
    # `debug_stripper` drops assertions; run asynchronously, they fail in some later op.
    options = tf.config.optimizer.get_experimental_options()
    return tf.config.experimental.get_synchronous_execution() and not options.get("debug_stripper")


def has_stopped(error: BaseException) -> bool:
    """Tell whether an exception is that of `stop_unless`."""
    return isinstance(error, tf.errors.InvalidArgumentError) and f"[{_STOPPED}]" in str(error)


DRAWING = "draw_batch"  # the scope in which a compiled loop draws


def came_up_drawing(failure: BaseException) -> bool:
    """Tell whether a failure is one of drawing a batch, in a compiled loop or in a step of its own."""
    # In a loop the failing op is named with its scope; run by itself, an op is named by its kind.
    return DRAWING in str(failure) or "[Op:IteratorGetNext]" in str(failure)


def xla_refusal(error: Exception) -> str | None:
    """Return why XLA cannot compile a step, if that is what an error says."""
    found = re.search(r"on XLA\w*: (\w+)|(?s:.*)\bXLA\b", str(error))
    if found is None:
        return None
    return f"the op `{found[1]}`" if found[1] else str(error).splitlines()[0]
