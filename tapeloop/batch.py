"""What can be said of a batch: a structure of tensors with the examples as the first dimension."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tapeloop.errors import DataError


def shapes(structure: Any) -> str:
    """Say the shapes and dtypes of a structure of tensors: `(32, 10) float32`."""
    flat = [value for value in tf.nest.flatten(structure) if value is not None]
    if not flat:
        return "missing"
    said = [f"{tuple(value.shape)} {tf.as_dtype(value.dtype).name}" for value in flat]
    return said[0] if len(said) == 1 else f"[{', '.join(said)}]"


def spec_of(batch: Any) -> Any:
    """Return the signature of a batch, or of any structure of tensors in which some may be missing."""
    return tf.nest.map_structure(lambda value: None if value is None else tf.type_spec_from_value(value), batch)


def examples_of(batch: Any) -> Any:
    """Return how many examples a batch has: a number, or a tensor where it is known only when the step runs.

    Raises:
        DataError: Nothing in it has a first dimension.
    """
    for value in tf.nest.flatten(batch):
        if value is not None and value.shape.rank:
            return tf.shape(value)[0] if value.shape[0] is None else value.shape[0]
    raise DataError(f"A batch must hold a tensor with the batch as its first dimension. Received: {shapes(batch)}.")
