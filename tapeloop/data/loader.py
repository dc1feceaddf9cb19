"""Data: whatever holds batches becomes something that can be gone through once per epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

import keras
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.data.array_source import ArraySource, DatasetSource, FileSlices, SparseSource, lies_in_file
from tapeloop.data.batch import as_tensors, open_spec_of, shapes
from tapeloop.data.class_weight import ClassWeights, class_weights_of
from tapeloop.data.cursor import BatchCursor
from tapeloop.data.iterable_source import IterableSource
from tapeloop.data.pydataset import PyDatasetBatches
from tapeloop.data.sampler import Sampler
from tapeloop.errors import DataError


class Source(Protocol):
    """What can be gone through again and again."""

    def feeds(self) -> Iterator[BatchCursor]:
        """Go through it once."""


class DataLoader:
    """Batches of data, gone through epoch by epoch.

    Attributes:
        name: What the data is called in errors.
        per_epoch: How many batches an epoch has, or None where nobody can say before its end.
        fewest: How many examples the smallest batch has, or None likewise.
    """

    def __init__(
        self, source: Source, length: int | None, steps_per_epoch: int | None, name: str, fewest: int | None = None
    ) -> None:
        self.name = name
        self.per_epoch = steps_per_epoch if steps_per_epoch is not None else length
        self.fewest = fewest
        self._source = source
        self._steps_per_epoch = steps_per_epoch
        self._feeds: Iterator[BatchCursor] | None = None
        self._feed: BatchCursor | None = None
        self._drawn = 0

    def feed(self) -> BatchCursor:
        """Return what the next batch comes from.

        Raises:
            DataError: There is none.
        """
        for running in (self._feeds, None):  # what is left of the last epoch, then from the start
            if self._feed is not None and not self._feed.ended:
                break
            self._feeds = self._source.feeds() if running is None else running
            self._feed = next(self._feeds, None)
        if self._feed is None or self._feed.ended:
            self._feed = self._feeds = None
            raise self._empty()
        return self._feed

    def epoch(self) -> Iterator[BatchCursor]:
        """Go through one epoch; with `steps_per_epoch`, on from where the last one ended, and around.

        Each feed is to be drawn from until nothing is left of what it allows.
        """
        left = self._steps_per_epoch
        done = False
        while left or (left is None and not done):
            feed = self.feed()
            feed.allow(left)
            before = feed.position
            yield feed
            if not feed.position:
                self.stop()
                raise self._empty()
            self._drawn += feed.position - before
            if left is not None:
                left -= feed.position - before
            elif feed.ended:
                assert self._feeds is not None
                self._feed = next(self._feeds, None)
                done = self._feed is None

    def check(self) -> None:
        """Find out, as far as it can be known without reading a dataset, whether there is a batch at all.

        Raises:
            DataError: There is none.
        """
        self.feed()

    def specs(self) -> Iterator[Any]:
        """Give signatures of batches of any size: what is declared, then what the first of a dataset is."""
        declared = self.feed().spec()
        yield open_spec_of(declared)
        source = self._source
        if isinstance(source, DatasetSource):
            for batch in source.data.take(1):
                yield open_spec_of(batch)

    def drawn(self) -> Iterator[Any]:
        """Go through one epoch batch by batch, on the host."""
        for feed in self.epoch():
            while feed.left != 0:
                try:
                    batch = feed.source.batch(tf.constant(feed.position, tf.int64))
                except tf.errors.OutOfRangeError:
                    feed.end()
                    break
                except tf.errors.OpError as error:
                    raise feed.cause_of(error) or error from None
                feed.drawn(1)
                yield batch

    def stop(self) -> None:
        """Leave the epoch: the next one begins at the start of the data."""
        self._feed = self._feeds = None

    def rewind(self) -> None:
        """Have the next epoch begin at the start of the data, where it can be gone through again."""
        if not (isinstance(self._source, IterableSource) and self._source.once):
            self.stop()

    def lasts(self, epochs: int) -> None:
        """Check that data which can be gone through once alone is not asked for more, and read no more than needed.

        Raises:
            DataError: It is.
        """
        source = self._source
        if not (isinstance(source, IterableSource) and source.once):
            return
        if self._steps_per_epoch is not None:
            source.limit(self._steps_per_epoch * epochs)
        elif epochs > 1:
            raise DataError(
                f"`{self.name}` is an iterator, which lasts one epoch, and {epochs} epochs were asked for. Pass "
                "something that can be gone through again, such as a list or a dataset, or `steps_per_epoch`."
            )

    def _empty(self) -> DataError:
        if self._drawn:
            return DataError(
                f"`{self.name}` ended after {self._drawn} batches, and more were asked for. Pass data that can be gone "
                "through again, or ask for fewer."
            )
        return DataError(
            f"`{self.name}` is empty: it was asked for a batch and has none. Pass a dataset with at least "
            "one batch; a generator that has been gone through cannot start again."
        )


def as_loader(
    data: Any,
    *,
    batch_size: int = 32,
    orders: Sampler | None = None,
    steps: tuple[str, int | None] = ("steps_per_epoch", None),
    class_weight: Mapping[int, float] | None = None,
    name: str = "data",
) -> DataLoader:
    """Make batches of what a user passes as data.

    Args:
        data: A `tf.data.Dataset` of batches, a `keras.utils.PyDataset`, any other iterable of batches (a list is one),
            or arrays: one array, a dict of inputs, or a tuple `(inputs[, targets[, sample_weight]])` whose members
            may be nested. Arrays are NumPy arrays, tensors (ragged and sparse ones too), data frames, sparse matrices
            of SciPy, or files that are read in slices, such as `np.memmap`.
        batch_size: Examples per batch, for arrays.
        orders: In which order arrays, and the batches of a `PyDataset`, come; by default as they are.
        steps: What the user calls the number of batches per epoch, and how many there are to be, for data without end.
        class_weight: The weights of examples by the class of their target.
        name: What the data is called in errors.

    Raises:
        DataError: The arrays do not have the same number of examples, or the data is of no known kind, empty, or
            without end.
        ValueError: `batch_size` or the number of batches is no whole number of 1 or more.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    steps_name, per_epoch = steps[0], None if steps[1] is None else whole_number(*steps, 1)
    orders = orders or Sampler(shuffle=False)
    weights = None if class_weight is None else class_weights_of(class_weight)
    if data is None:
        raise DataError(f"`{name}` is None. Pass a `tf.data.Dataset`, arrays `(x, y)`, or an iterable of batches.")
    if isinstance(data, tf.data.Dataset):
        if int(data.cardinality()) == tf.data.INFINITE_CARDINALITY and per_epoch is None:
            raise DataError(f"`{name}` never ends. Pass `{steps_name}`, or a dataset with an end, such as by `take`.")
        dataset = DatasetSource(data, None, weights)
        return DataLoader(dataset, dataset.size, per_epoch, name)
    if isinstance(data, keras.utils.PyDataset):
        pairs = PyDatasetBatches(data, orders.next)
        if data.num_batches is None and per_epoch is None:
            raise DataError(f"`{name}` never ends. Pass `{steps_name}`, or give it a `num_batches`.")
        return DataLoader(IterableSource(pairs, name, weights), len(pairs) or None, per_epoch, name)
    if is_arrays(data):
        return _of_arrays(data, batch_size, orders, per_epoch, weights, name)
    if isinstance(data, Iterable):
        length = len(data) if isinstance(data, Sized) else 0
        return DataLoader(IterableSource(data, name, weights), length or None, per_epoch, name)
    raise DataError(
        f"`{name}` must be a `tf.data.Dataset`, arrays `(x, y)`, a `keras.utils.PyDataset` or an iterable of "
        f"batches. Received: {data!r} of type {type(data).__name__}."
    )


def is_arrays(data: Any) -> bool:
    """Tell whether data is arrays, and not a dataset or an iterable of batches."""
    return isinstance(data, (tuple, Mapping, tf.RaggedTensor, tf.SparseTensor)) or (
        hasattr(data, "shape") and (hasattr(data, "__array__") or hasattr(data, "tocoo"))
    )


def _of_arrays(
    data: Any,
    batch_size: int,
    orders: Sampler,
    per_epoch: int | None,
    class_weights: ClassWeights | None,
    name: str,
) -> DataLoader:
    """Make batches of arrays, by where they lie and of what kind they are.

    Raises:
        DataError: They do not have the same number of examples, or none.
    """
    in_file = any(lies_in_file(array) for array in tf.nest.flatten(data))
    arrays = tf.nest.map_structure(lambda array: array if lies_in_file(array) else as_tensors(array, f"`{name}`"), data)
    given = [array for array in tf.nest.flatten(arrays) if array is not None]
    lengths = {array.shape[0] if len(array.shape) else None for array in given}
    if len(lengths) != 1 or None in lengths:
        raise DataError(
            f"The arrays of `{name}` must have the same number of examples, as their first dimension. "
            f"Received: {shapes(given[:6])}{' and more' * (len(given) > 6)}. Lists are taken for several arrays: "
            "make one of them with `np.asarray`."
        )
    (examples,) = lengths
    if not examples:
        raise DataError(f"`{name}` is empty: its arrays have no examples. Received: {shapes(given)}.")
    source: Source
    if in_file and any(isinstance(array, tf.SparseTensor) for array in given):
        raise DataError(f"`{name}` has arrays in files and sparse ones, which are not read in slices: make them dense.")
    if in_file:
        source = IterableSource(FileSlices(arrays, batch_size, examples, orders), name, class_weights)
    elif any(isinstance(array, tf.SparseTensor) for array in given):
        source = SparseSource(arrays, batch_size, examples, orders, class_weights)
    else:
        source = ArraySource(arrays, batch_size, examples, orders, class_weights)
    fewest = examples % batch_size or min(examples, batch_size)
    return DataLoader(source, math.ceil(examples / batch_size), per_epoch, name, fewest)
