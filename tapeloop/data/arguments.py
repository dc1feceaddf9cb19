"""From the arguments of Keras' `fit` to data in one piece: inputs, targets and weights joined, and a part split off."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.data.array_source import lies_in_file
from tapeloop.data.batch import map_tensors, rows_of, tensors_in
from tapeloop.errors import DataError


def joined(x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """Return the data that was given as inputs, targets and weights, or as one object that has all of them.

    Args:
        x: The inputs; without the others, any data.
        y: The targets, or None.
        sample_weight: The weights of the examples, or None.

    Raises:
        DataError: There are targets or weights beside data that has its own, the weights are a number, or it is not
            clear whether a list is several inputs or batches.
    """
    if isinstance(sample_weight, numbers.Number):
        raise DataError(
            f"`sample_weight` is {sample_weight!r}, and must be an array of the weights of the examples. For so many "
            f"examples per batch write `batch_size={sample_weight!r}`: it is passed by name."
        )
    if y is None and sample_weight is None:
        if isinstance(x, list) and x and all(map(is_array, x)):
            raise DataError(
                f"`x` is a list of {len(x)} arrays and there is no `y`: these may be several inputs or batches. For "
                "several inputs write a tuple of one entry, `([first, second],)`; for batches of inputs alone write "
                "each as a tuple, `[(first,), (second,)]`."
            )
        return x
    if not is_arrays(x):
        extra = "y" if y is not None else "sample_weight"
        raise DataError(
            f"`{extra}` was given, and `x` is no array but a {type(x).__name__}, whose batches hold the targets and "
            "the weights. Put them there: `(inputs, targets, sample_weight)`."
        )
    return packed(x, y, sample_weight)


def packed(x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """Return inputs, targets and weights as a batch has them; inputs alone as they are.

    Args:
        x: The inputs.
        y: The targets, or None.
        sample_weight: The weights of the examples, or None.
    """
    # Not `keras.utils.pack_x_y_sample_weight`, which puts inputs alone in a tuple and loses weights without targets.
    if sample_weight is not None:
        return x, y, sample_weight
    return x if y is None else (x, y)


def is_array(value: Any) -> bool:
    """Tell whether a value is one array: NumPy's, a tensor, a data frame, a sparse matrix, or one in a file."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        return True
    # Data frames are told by their method.
    return hasattr(value, "shape") and (hasattr(value, "__array__") or hasattr(value, "tocoo"))


def is_arrays(value: Any) -> bool:
    """Tell whether a value is arrays, and not batches: one array, or a structure of several."""
    return is_array(value) or isinstance(value, (tuple, list, Mapping))


def check_validation_data(data: Any, options: Mapping[str, Any]) -> None:
    """Check what a fit validates on, before it is read.

    Args:
        data: The data, or None.
        options: How it is read, by the names of the arguments; None where one was not given.

    Raises:
        DataError: It is a list of arrays.
        ValueError: There is none, and it was said how it is read.
    """
    if isinstance(data, list) and data and all(map(is_array, data)):
        raise DataError(
            f"`validation_data` is a list of {len(data)} arrays, and a list is one of batches. For inputs and targets "
            "write a tuple, `(x, y)`; for batches of inputs alone write each as a tuple, `[(first,), (second,)]`."
        )
    given = [name for name, value in options.items() if value is not None]
    if data is None and given:
        raise ValueError(f"`{given[0]}` was given, and neither `validation_data` nor `validation_split`: add one.")


def with_validation_split(data: Any, validation_data: Any, validation_split: float | None) -> tuple[Any, Any]:
    """Return the data to train on and the data to validate on, of which either may be given.

    Args:
        data: The data, as `joined` returns it.
        validation_data: Data to validate on, or None.
        validation_split: How much of the data's arrays is split off for it, or None or 0.

    Raises:
        DataError: The data cannot be split.
        ValueError: Both were given, or the fraction is out of range.
    """
    if not validation_split:
        return data, validation_data
    if validation_data is not None:
        raise ValueError("`validation_data` and `validation_split` were both given: leave one out.")
    return split_off(data, validation_split)


def split_off(data: Any, fraction: float) -> tuple[Any, Any]:
    """Return the first part of arrays, to train on, and the last, to validate on.

    Args:
        data: Arrays, as `joined` returns them.
        fraction: How much of the examples is split off: above 0 and below 1.

    Raises:
        DataError: The data is not arrays, or one of the parts would have no examples.
        ValueError: `fraction` is out of range.

    Source: https://keras.io/api/models/model_training_apis/#fit-method, `validation_split`.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
        raise ValueError(f"`validation_split` must be a number above 0 and below 1. Received: {fraction!r}.")
    is_batches = isinstance(data, (tf.data.Dataset, keras.utils.PyDataset, list)) or not is_arrays(data)
    if is_batches:
        raise DataError(
            f"`validation_split` takes the last examples of arrays, and `x` is a {type(data).__name__} of batches. "
            "Pass `validation_data` instead."
        )
    lengths = {array.shape[0] if len(getattr(array, "shape", ())) else None for array in tensors_in(data)}
    if len(lengths) != 1:
        return data, data  # which the loader refuses, and says why
    examples = lengths.pop()
    first = math.floor(examples * (1 - fraction))
    if first in (0, examples):
        raise DataError(
            f"`validation_split={fraction}` of {examples} examples leaves none to {'validate' if first else 'train'} "
            "on."
        )

    parts = [(0, first), (first, examples)]
    training, validation = (map_tensors(functools.partial(_rows, start=a, stop=b), data) for a, b in parts)
    return training, validation


@dataclass(frozen=True)
class FileRows:
    """Some consecutive rows of an array in a file, which are read only when they are indexed.

    Attributes:
        array: The array.
        start: The first row.
        stop: The row after the last one.
    """

    array: Any
    start: int
    stop: int

    chunks = None  # by this and `__array__` an array in a file is told

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        return (self.stop - self.start, *self.array.shape[1:])

    @property
    def dtype(self) -> Any:
        """The type of the numbers."""
        return self.array.dtype

    def __getitem__(self, indices: np.ndarray) -> Any:
        return self.array[indices + self.start]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array[self.start : self.stop], dtype)


def _rows(array: Any, start: int, stop: int) -> Any:
    """Return consecutive rows of an array of any kind."""
    if lies_in_file(array):
        return FileRows(array, start, stop)
    if isinstance(array, tf.SparseTensor):
        return rows_of(array, start, stop - start)
    if hasattr(array, "tocsr"):
        return array.tocsr()[start:stop]
    if hasattr(array, "iloc"):
        return array.iloc[start:stop]
    return array[start:stop]
