"""Batches cut from arrays: gathered in the graph where they lie in memory, read in slices where they lie in a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.data.class_weight import ClassWeights
from tapeloop.data.cursor import ArrayReader, BatchCursor, IteratorReader, on_device, places_of
from tapeloop.data.sampler import Sampler

ON_DEVICE_BYTES = 2**30  # arrays up to this size lie on the device of the steps, larger ones in the host's memory


class ArraySource:
    """Batches gathered in the graph from tensors in memory."""

    def __init__(
        self, tensors: Any, batch_size: int, examples: int, orders: Sampler, class_weights: ClassWeights | None
    ) -> None:
        """Put the tensors where batches are to be gathered.

        Args:
            tensors: A structure of tensors with the examples first; None where something is missing.
            batch_size: Examples in a batch.
            examples: How many there are.
            orders: In which order they come.
            class_weights: Weights of examples by class, if there are any.
        """
        self._batch_size = min(batch_size, examples)
        self._examples = examples
        self._orders = orders
        self._class_weights = class_weights
        given = [value for value in tf.nest.flatten(tensors) if isinstance(value, tf.Tensor)]
        too_large = sum(value.dtype.size * value.shape.num_elements() for value in given) > ON_DEVICE_BYTES
        self._device = "CPU:0" if too_large and tf.config.list_logical_devices("GPU") else None
        self._tensors = tensors if self._device is None else tf.nest.map_structure(_on_the_host, tensors)

    def feeds(self) -> Iterator[BatchCursor]:
        """Give the batches of one epoch."""
        order, batch_size = tf.constant(self._orders.next(self._examples), tf.int64), None
        if self._examples % self._batch_size:
            batch_size = tf.constant(self._batch_size, tf.int64)
        else:
            order = tf.reshape(order, [-1, self._batch_size])
        source = ArrayReader(self._tensors, order, batch_size, self._device, self._class_weights)
        yield BatchCursor(source, math.ceil(self._examples / self._batch_size))


def _on_the_host(value: Any) -> Any:
    with tf.device("CPU:0"):
        return tf.identity(value) if isinstance(value, tf.Tensor) else value


class DatasetSource:
    """The batches of a `tf.data.Dataset`."""

    def __init__(self, data: tf.data.Dataset, places: Any, class_weights: ClassWeights | None) -> None:
        """Keep the dataset.

        Args:
            data: Batches.
            places: Where each tensor of an element belongs in the batch, or None where elements are batches.
            class_weights: Weights of examples by class, if there are any.
        """
        self.data = data
        self._places = places
        self._class_weights = class_weights

    @property
    def size(self) -> int | None:
        """How many batches it has, or None where nobody knows, or there is no end."""
        cardinality = int(self.data.cardinality())
        return cardinality if cardinality >= 0 else None

    def feeds(self) -> Iterator[BatchCursor]:
        """Give the batches of one epoch."""
        yield BatchCursor(IteratorReader(iter(on_device(self.data)), self._places, self._class_weights), self.size)


class SparseSource:
    """Batches of tensors some of which are sparse, which cannot be gathered; see `ArraySource`."""

    def __init__(
        self, tensors: Any, batch_size: int, examples: int, orders: Sampler, class_weights: ClassWeights | None
    ) -> None:
        """Keep the tensors; see `ArraySource`."""
        self._data = tf.data.Dataset.from_tensor_slices(tuple(v for v in tf.nest.flatten(tensors) if v is not None))
        self._places = places_of(tensors)
        self._batch_size = batch_size
        self._examples = examples
        self._orders = orders
        self._class_weights = class_weights

    def feeds(self) -> Iterator[BatchCursor]:
        """Give the batches of one epoch."""
        data, seed = self._data, self._orders.next_seed()
        if self._orders.shuffle:
            data = data.shuffle(self._examples, seed=seed)
        data = data.batch(self._batch_size).prefetch(tf.data.AUTOTUNE)
        yield from DatasetSource(data, self._places, self._class_weights).feeds()


class FileSlices:
    """Batches read from arrays that lie in a file, which are not to be in memory all at once."""

    def __init__(self, arrays: Any, batch_size: int, examples: int, orders: Sampler) -> None:
        """Keep the arrays, of so many examples each."""
        self._arrays = arrays
        self._batch_size = batch_size
        self._examples = examples
        self._orders = orders

    def __iter__(self) -> Iterator[Any]:
        order = self._orders.next(self._examples)
        for start in range(0, self._examples, self._batch_size):
            chosen = order[start : start + self._batch_size]
            in_file, back = np.unique(chosen, return_inverse=True)  # HDF5 reads in ascending order alone
            yield tf.nest.map_structure(functools.partial(_rows, rows=chosen, in_file=in_file, back=back), self._arrays)


def _rows(array: Any, rows: Any, in_file: Any, back: Any) -> Any:
    """Return some rows of an array, which for one in a file are given in ascending order, with the way back."""
    if array is None:
        return None
    return array[in_file][back] if lies_in_file(array) else tf.gather(array, rows)


def lies_in_file(array: Any) -> bool:
    """Tell whether an array is read when it is asked for: a `np.memmap`, or a dataset of HDF5 or Zarr."""
    return isinstance(array, np.memmap) or (hasattr(array, "chunks") and hasattr(array, "__array__"))
