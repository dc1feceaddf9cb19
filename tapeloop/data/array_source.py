"""Sources of batches of arrays: gathered in the graph from memory, shuffled by `tf.data`, or sliced from a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapeloop.data.batch import map_tensors, open_spec_of, tensors_in
from tapeloop.data.class_weight import ClassWeights, with_class_weights
from tapeloop.data.cursor import BatchCursor, IteratorReader, layout_of
from tapeloop.data.sampler import Sampler

ON_DEVICE_BYTES = 2**30  # arrays up to this size lie on the device of the steps, larger ones in the host's memory


class ArrayReader(NamedTuple):
    """Gathers batches from tensors in memory, which for small steps is nearly twice as fast as `tf.data`.

    Attributes:
        tensors: A structure of tensors with the examples first.
        order: The indices of the examples in the order of the epoch: `[batches, batch_size]` if all batches have as
            many examples, else `[examples]`.
        batch_size: Examples per batch if the last batch has fewer, as a scalar of int64; else None.
        device: The device that holds the tensors, if it is not the device of the steps.
        class_weights: Weights of examples by class, if there are any.
    """

    tensors: Any
    order: tf.Tensor
    batch_size: tf.Tensor | None
    device: str | None
    class_weights: ClassWeights | None

    def signature(self) -> ArrayReader:
        """Return the signature of readers of any number of examples."""
        # Data of another length, or with a validation split, then runs in the trace that there is.
        return self._replace(tensors=open_spec_of(self.tensors), order=open_spec_of(self.order))

    def read(self, number: tf.Tensor) -> Any:
        """Return the batch of this number, counted from 0."""
        # Arrays that lie with the host are gathered there: only the batch is copied to the device of the steps.
        with tf.device(self.device):
            if self.batch_size is None:  # then the shape of a batch is static, as XLA needs it
                indices = tf.gather(self.order, number)
            else:
                indices = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            batch = map_tensors(lambda tensor: tf.gather(tensor, indices), self.tensors)
        return with_class_weights(batch, self.class_weights)


@dataclass
class _Arrays:
    """Arrays that are cut in batches.

    Attributes:
        arrays: A structure of arrays with the examples first.
        batch_size: Examples per batch.
        sampler: The order of the examples in each epoch.
        class_weights: Weights of examples by class, if there are any.
    """

    arrays: Any
    batch_size: int
    sampler: Sampler
    class_weights: ClassWeights | None = None

    def __post_init__(self) -> None:
        self.examples = int(tensors_in(self.arrays)[0].shape[0])
        # A batch larger than the data is a whole batch of all examples, whose number is then static.
        self.batch_size = min(self.batch_size, self.examples)
        self.size = math.ceil(self.examples / self.batch_size)
        self.smallest_batch = self.examples % self.batch_size or self.batch_size


class ArraySource(_Arrays):
    """Dense and ragged tensors in memory, of which batches are gathered in the graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dense = [tensor for tensor in tensors_in(self.arrays) if isinstance(tensor, tf.Tensor)]
        too_large = sum(tensor.dtype.size * tensor.shape.num_elements() for tensor in dense) > ON_DEVICE_BYTES
        # Without a GPU there is one memory, and nothing to decide.
        self._device = "CPU:0" if too_large and tf.config.list_logical_devices("GPU") else None
        if self._device is not None:
            with tf.device(self._device):
                self.arrays = map_tensors(tf.identity, self.arrays)

    def cursors(self) -> Iterator[BatchCursor]:
        """Yield the cursor of the next epoch, which has all of its batches."""
        order, batch_size = tf.constant(self.sampler.next_order(self.examples), tf.int64), None
        # A row for each batch has a static shape, as XLA needs it; a smaller last batch does not fit in such rows.
        if self.examples % self.batch_size:
            batch_size = tf.constant(self.batch_size, tf.int64)
        else:
            order = tf.reshape(order, [-1, self.batch_size])
        yield BatchCursor(ArrayReader(self.arrays, order, batch_size, self._device, self.class_weights), self.size)


class SparseSource(_Arrays):
    """Tensors in memory some of which are sparse: TensorFlow cannot gather these, so `tf.data` cuts and shuffles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Made once, as it takes the sparse tensors apart by examples.
        self._dataset = tf.data.Dataset.from_tensor_slices(tuple(tensors_in(self.arrays)))

    def cursors(self) -> Iterator[BatchCursor]:
        """Yield the cursor of the next epoch, which has all of its batches."""
        dataset, seed = self._dataset, self.sampler.next_seed()
        if self.sampler.shuffle:
            # The buffer holds all examples: a smaller one would only mix examples that lie near each other.
            dataset = dataset.shuffle(self.examples, seed=seed)
        dataset = dataset.batch(self.batch_size).prefetch(tf.data.AUTOTUNE)
        yield from DatasetSource(dataset, layout_of(self.arrays), self.class_weights).cursors()


@dataclass(frozen=True)
class DatasetSource:
    """A `tf.data.Dataset` of batches.

    Attributes:
        dataset: The dataset.
        layout: The layout of a batch, see `IteratorReader`; None if elements are batches.
        class_weights: Weights of examples by class, if there are any.
    """

    dataset: tf.data.Dataset
    layout: Any
    class_weights: ClassWeights | None

    @property
    def size(self) -> int | None:
        """How many batches it has, or None if that is not known or there is no end."""
        cardinality = int(self.dataset.cardinality())
        return cardinality if cardinality >= 0 else None

    def cursors(self) -> Iterator[BatchCursor]:
        """Yield the cursor of the next epoch, which has all of its batches."""
        yield BatchCursor(IteratorReader.over(self.dataset, self.layout, self.class_weights), self.size)


class FileSlices(_Arrays):
    """Arrays some of which lie in a file: batches are read as they are asked for, and never all are in memory."""

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        order = self.sampler.next_order(self.examples)
        for start in range(0, self.examples, self.batch_size):
            indices = order[start : start + self.batch_size]
            yield map_tensors(functools.partial(_rows, indices=indices), self.arrays)


def _rows(array: Any, indices: np.ndarray) -> Any:
    """Return the rows of an array with these indices."""
    if not lies_in_file(array):
        return tf.gather(array, indices)
    # HDF5 reads rows in ascending order alone: they are read so, and then put in the order of the indices.
    ascending, back = np.unique(indices, return_inverse=True)
    return array[ascending][back]


def lies_in_file(array: Any) -> bool:
    """Tell whether an array is read only when it is indexed: a `np.memmap`, or a dataset of HDF5 or Zarr."""
    return isinstance(array, np.memmap) or (hasattr(array, "chunks") and hasattr(array, "__array__"))
