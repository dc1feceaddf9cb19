"""Sources of batches of arrays: gathered in the graph from memory, shuffled by `tf.data`, or sliced from a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapeloop.data.batch import Share, map_tensors, open_spec_of, tensors_in
from tapeloop.data.class_weight import ClassWeights, with_class_weights
from tapeloop.data.cursor import BatchCursor, IteratorReader, layout_of
from tapeloop.data.sampler import Sampler

ON_DEVICE_BYTES = 2**30  # arrays up to this size lie on the device of the steps, larger ones in the host's memory
PREFETCHED = tf.data.AUTOTUNE  # batches of sparse arrays that `tf.data` makes before they are drawn


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

    def read(self, number: tf.Tensor, share: Share | None = None) -> Any:
        """Return the batch of this number, counted from 0, or the share of one device of it."""
        # Arrays that lie with the host are gathered there: only the batch is copied to the device of the steps.
        with tf.device(self.device):
            if self.batch_size is None:  # then the shape of a batch is static, as XLA needs it
                indices = tf.gather(self.order, number)
            else:
                indices = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            # Of the indices: what other devices compute is not gathered here.
            indices = indices if share is None else share.rows(indices)
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
        self._read = 0

    def skip(self, passes: int, batches: int) -> None:
        """Have the next pass begin after so many passes more, and after so many of its batches."""
        self.sampler.skip(passes)
        self._read = batches

    def _pop_read(self) -> int:
        """Return how many batches of the pass that begins were read before."""
        read, self._read = self._read, 0
        return read


class ArraySource(_Arrays):
    """Dense and ragged tensors in memory, of which batches are gathered in the graph.

    Attributes:
        key: The key of its readers, once it is known; see `reader_key`.
    """

    key: str = ""

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
        order, batch_size = self.sampler.next_order(self.examples), None
        # A row for each batch has a static shape, as XLA needs it; a smaller last batch does not fit in such rows.
        if self.examples % self.batch_size:
            batch_size = tf.constant(self.batch_size, tf.int64)
        else:
            order = order.reshape(-1, self.batch_size)
        order = tf.constant(order, tf.int64)
        reader = ArrayReader(self.arrays, order, batch_size, self._device, self.class_weights)
        cursor = BatchCursor(reader, self.size, key=self.key)
        self.key = cursor.key  # to describe the arrays takes a quarter of what an epoch of few small steps takes
        cursor.advance(self._pop_read())
        yield cursor


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
        source = DatasetSource(dataset.batch(self.batch_size), layout_of(self.arrays), self.class_weights, PREFETCHED)
        # The order follows from the seed, so that the batches before can be left out.
        source.skip(0, self._pop_read())
        yield from source.cursors()


@dataclass
class DatasetSource:
    """A `tf.data.Dataset` of batches.

    Attributes:
        dataset: The dataset.
        layout: The layout of a batch, see `IteratorReader`; None if elements are batches.
        class_weights: Weights of examples by class, if there are any.
        prefetch: How many batches are made ahead; 0: as many as the dataset itself says.
    """

    dataset: tf.data.Dataset
    layout: Any
    class_weights: ClassWeights | None
    prefetch: int = 0

    def __post_init__(self) -> None:
        self._read = 0
        self._restore: Callable[[Any], None] | None = None

    def skip(self, passes: int, batches: int, restore: Callable[[Any], None] | None = None) -> None:
        """Have the next pass begin after so many passes more, and after so many of its batches.

        Args:
            passes: How many passes were begun before.
            batches: How many batches of the next pass were read before.
            restore: Brings the iterator of the next pass to where it was; if None, batches are left out.
        """
        # A dataset that shuffles draws the order of a pass when its iterator is made.
        for _ in range(passes):
            iter(self.dataset)
        self._read, self._restore = batches, restore

    @property
    def size(self) -> int | None:
        """How many batches it has, or None if that is not known or there is no end."""
        cardinality = int(self.dataset.cardinality())
        return cardinality if cardinality >= 0 else None

    def cursors(self) -> Iterator[BatchCursor]:
        """Yield the cursor of the next epoch, which has all of its batches."""
        read, restore, self._read, self._restore = self._read, self._restore, 0, None
        dataset = self.dataset if restore is not None or not read else self.dataset.skip(read)
        dataset = dataset.prefetch(self.prefetch) if self.prefetch else dataset
        reader = IteratorReader.over(dataset, self.layout, self.class_weights)
        if restore is not None:
            restore(reader.iterator)
        yield BatchCursor(reader, None if self.size is None else self.size - read, read)


class FileSlices(_Arrays):
    """Arrays some of which lie in a file: batches are read as they are asked for, and never all are in memory."""

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        order = self.sampler.next_order(self.examples)
        for start in range(self._pop_read() * self.batch_size, self.examples, self.batch_size):
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
