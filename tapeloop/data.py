"""Data: whatever holds batches becomes something that can be gone through once per epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.batch import shapes
from tapeloop.checks import whole_number
from tapeloop.errors import DataError


class Batches:
    """Batches of data, gone through epoch by epoch.

    Attributes:
        per_epoch: How many batches an epoch has, or None where nobody can say before its end.
        fewest: How many examples the smallest batch has, or None likewise.
    """

    def __init__(self, source: Iterable[Any], steps_per_epoch: int | None = None, name: str = "data") -> None:
        self._source = source
        self._name = name
        self._steps_per_epoch = steps_per_epoch
        self._running: Iterator[Any] | None = None
        self._first: list[Any] = []
        self.fewest = source.fewest if isinstance(source, _ArrayBatches) else None
        self.per_epoch = steps_per_epoch if steps_per_epoch is not None else _length(source)

    def peek(self) -> Any:
        """Return the first batch of the next epoch, which will still be part of it.

        Raises:
            DataError: There is none.
        """
        if not self._first:
            self._first = [self._next()]
        return self._first[0]

    def epoch(self) -> Iterator[Any]:
        """Go through one epoch; with `steps_per_epoch`, on from where the last one ended, and around."""
        if self._steps_per_epoch is not None:
            for _ in range(self._steps_per_epoch):
                self.peek()
                yield self._first.pop()
            return
        self.peek()
        yield self._first.pop()
        assert self._running is not None
        yield from map(_as_tensors, self._running)
        self._running = None

    def check_lasts(self, epochs: int) -> None:
        """Check that data which can be gone through once alone is not asked for more.

        Raises:
            DataError: It is.
        """
        if epochs > 1 and self._steps_per_epoch is None and iter(self._source) is self._source:
            raise DataError(
                f"`{self._name}` is an iterator, which lasts one epoch, and {epochs} epochs were asked for. Pass "
                "something that can be gone through again, such as a list or a dataset, or `steps_per_epoch`."
            )

    def _next(self) -> Any:
        for running in (self._running, None):  # what is left of the last epoch, then from the start
            self._running = iter(self._source) if running is None else running
            batch = next(self._running, None)
            if batch is not None:
                return _as_tensors(batch)
        raise DataError(
            f"`{self._name}` is empty: it was asked for a batch and has none. Pass a dataset with at least "
            "one batch; a generator that has been gone through cannot start again."
        )


def as_batches(
    data: Any,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int | None = None,
    steps_per_epoch: int | None = None,
    name: str = "data",
) -> Batches:
    """Make batches of what a user passes as data.

    Args:
        data: A `tf.data.Dataset` of batches, a `keras.utils.PyDataset`, any other iterable of batches (a list is one),
            or arrays: one array, a dict of inputs, or a tuple `(inputs[, targets[, sample_weight]])` whose members
            may be nested in dicts and lists.
        batch_size: Examples per batch, for arrays.
        shuffle: Whether arrays are shuffled anew each epoch.
        seed: The seed of the shuffling.
        steps_per_epoch: Batches per epoch, for data without end.
        name: What the caller calls the data, for errors.

    Raises:
        DataError: Arrays of different lengths, or no data at all.
        ValueError: `batch_size` or `steps_per_epoch` is no whole number of 1 or more.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    if steps_per_epoch is not None:
        steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch, 1)
    if data is None:
        raise DataError(f"`{name}` is None. Pass a `tf.data.Dataset`, arrays `(x, y)`, or an iterable of batches.")
    if _is_arrays(data):
        source: Iterable[Any] = _ArrayBatches(data, batch_size, shuffle, seed, name)
    elif isinstance(data, keras.utils.PyDataset):
        source = _PyDatasetBatches(data)
    elif isinstance(data, Iterable):
        source = data
    else:
        raise DataError(
            f"`{name}` must be a `tf.data.Dataset`, arrays `(x, y)`, a `keras.utils.PyDataset` or an iterable of "
            f"batches. Received: {data!r} of type {type(data).__name__}."
        )
    return Batches(source, steps_per_epoch, name)


def _is_arrays(data: Any) -> bool:
    return isinstance(data, (np.ndarray, tf.Tensor, Mapping, tuple))


class _ArrayBatches:
    """One epoch of batches cut from arrays after the other."""

    def __init__(self, data: Any, batch_size: int, shuffle: bool, seed: int | None, name: str) -> None:
        self._arrays = _as_tensors(data)
        given = [array for array in tf.nest.flatten(self._arrays) if array is not None]
        lengths = {array.shape[0] if array.shape.rank else None for array in given}
        if len(lengths) != 1 or None in lengths:
            raise DataError(
                f"The arrays of `{name}` must have the same number of examples, as their first dimension. "
                f"Received: {shapes(given[:6])}{' and more' * (len(given) > 6)}. Lists are taken for several arrays: "
                "make one of them with `np.asarray`."
            )
        (length,) = lengths
        if not length:
            raise DataError(f"`{name}` is empty: its arrays have no examples. Received: {shapes(given)}.")
        self.fewest = length % batch_size or min(length, batch_size)
        indices = tf.data.Dataset.range(length)
        if shuffle:
            indices = indices.shuffle(length, seed=seed, reshuffle_each_iteration=True)
        # A dataset would make one tensor of the arrays in a list: they go through it flat.
        self._batches = (
            indices.batch(batch_size)
            .map(lambda batch: tuple(tf.gather(array, batch) for array in given))
            .prefetch(tf.data.AUTOTUNE)
        )

    def __len__(self) -> int:
        return int(self._batches.cardinality())

    def __iter__(self) -> Iterator[Any]:
        for flat in self._batches:
            tensors = iter(flat)
            yield tf.nest.map_structure(lambda array: None if array is None else next(tensors), self._arrays)  # noqa: B023


class _PyDatasetBatches:
    """One epoch of a PyDataset after the other."""

    def __init__(self, data: keras.utils.PyDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return int(self._data.num_batches or 0)

    def __iter__(self) -> Iterator[Any]:
        self._data.on_epoch_begin()
        for index in itertools.count() if self._data.num_batches is None else range(self._data.num_batches):
            yield self._data[index]
        self._data.on_epoch_end()


def _length(source: Iterable[Any]) -> int | None:
    if isinstance(source, tf.data.Dataset):
        cardinality = int(source.cardinality())
        return cardinality if cardinality >= 0 else None
    try:
        return len(source) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def _as_tensors(batch: Any) -> Any:
    """Turn a batch's arrays into tensors, floating ones in Keras' float type. None stays, where weights are missing."""

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
            return value
        array = np.asarray(value)
        return tf.convert_to_tensor(array.astype(keras.config.floatx()) if array.dtype == np.float64 else array)

    return tf.nest.map_structure(convert, batch)
