"""What can be said of a batch: a structure of tensors with the examples as the first dimension."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tapeloop.errors import DataError


def shapes(structure: Any) -> str:
    """Say the shapes and dtypes of a structure of tensors: `(32, 10) float32`."""
    flat = [value for value in tf.nest.flatten(structure) if value is not None]
    if not flat:
        return "missing"
    said = [f"{_shape(value)} {tf.as_dtype(value.dtype).name}" for value in flat]
    return said[0] if len(said) == 1 else f"[{', '.join(said)}]"


def _shape(value: Any) -> str:
    known = not isinstance(value.shape, tf.TensorShape) or value.shape.rank is not None
    return str(tuple(value.shape)) if known else "of unknown shape,"


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


def after(batch: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no op of a graph runs before a batch is there.

    What depends on nothing in it, such as `counter.assign_add(1)`, would run though an iterator has come to its end
    instead of giving the batch.
    """
    tensors = [value for value in tf.nest.flatten(batch, expand_composites=True) if value is not None]
    # Tied to the tensors themselves, an op that takes one of them would not count as tied, nor what is called by it.
    return tf.control_dependencies([tf.group(*tensors)])


def any_size(value: Any) -> Any:
    """Return the signature of a tensor, or what one signature becomes, with any number of examples."""
    spec = value if isinstance(value, tf.TypeSpec) else tf.type_spec_from_value(value)
    shape = [None, *spec.shape[1:]] if spec.shape.rank else spec.shape
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    return type(spec)(shape, spec.dtype)


def open_spec_of(batch: Any) -> Any:
    """Return the signature of batches like one, of any size."""
    return tf.nest.map_structure(lambda value: None if value is None else any_size(value), batch)


def as_tensors(batch: Any, name: str) -> Any:
    """Return a structure whose arrays are tensors, floating ones in Keras' float type; what is missing stays so.

    Raises:
        DataError: One of them cannot be a tensor.
    """

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
            return value
        if hasattr(value, "tocoo"):  # a sparse matrix of SciPy
            coo = value.tocoo()
            entries = coo.astype(keras.config.floatx()) if coo.dtype == np.float64 else coo
            places = np.stack([entries.row, entries.col], 1).astype(np.int64)
            return tf.sparse.reorder(tf.SparseTensor(places, entries.data, entries.shape))
        array = np.asarray(value)
        try:
            return tf.convert_to_tensor(array.astype(keras.config.floatx()) if array.dtype == np.float64 else array)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"In {name}, {type(value).__name__} of the dtype `{array.dtype}` and the shape {array.shape} cannot be "
                f"a tensor: {error}. Give its numbers one dtype, as by `.astype('float32')`, and its rows one length."
            ) from error

    return tf.nest.map_structure(convert, batch)


class Features(NamedTuple):
    """A batch of what is computed once and for all, in the stead of a batch of the data.

    Attributes:
        tensors: The tensors at which a step was cut.
    """

    tensors: tuple[Any, ...]
