"""From whatever a user passes as data to a loader, which gives its batches epoch by epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import keras
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.data.arguments import is_array
from tapeloop.data.array_source import ArraySource, DatasetSource, FileSlices, SparseSource, lies_in_file
from tapeloop.data.batch import as_tensors, check_examples, open_spec_of, tensors_in
from tapeloop.data.class_weight import ClassWeights, class_weights_of
from tapeloop.data.cursor import BatchCursor, IteratorReader
from tapeloop.data.iterable_source import IterableSource
from tapeloop.data.pydataset import PyDatasetBatches
from tapeloop.data.sampler import Sampler
from tapeloop.errors import DataError

_LOG = logging.getLogger("tapeloop")
BATCH_SIZE = 32  # by default, as in Keras
Source: TypeAlias = ArraySource | SparseSource | DatasetSource | IterableSource


@dataclass(frozen=True)
class DataPosition:
    """How far data has been read.

    Attributes:
        passes: How many passes over the data were begun.
        batch: How many batches of the last pass were read; None if it is over, and another comes next.
    """

    passes: int
    batch: int | None


@dataclass(eq=False)
class DataLoader:
    """Batches of data, epoch by epoch. Iterating over it gives the batches of one epoch, on the host.

    Attributes:
        source: Gives the batches.
        steps_per_epoch: After how many batches an epoch ends; None if it ends with the data.
        name: What the data is called in errors.
        smallest_batch: How many examples the smallest batch has, or None if that is not known.
        is_once: Whether an epoch ends with the data if that has fewer batches, as an evaluation does.
        batches_per_epoch: How many batches an epoch has, or None if that is not known before its end.
    """

    source: Source
    steps_per_epoch: int | None
    name: str
    smallest_batch: int | None = None
    is_once: bool = False

    def __post_init__(self) -> None:
        self.batches_per_epoch = self.source.size if self.steps_per_epoch is None else self.steps_per_epoch
        self.is_once = self.is_once and self.steps_per_epoch is not None and self._iterator is None
        if self.is_once and self.source.size is not None and self.source.size < (self.steps_per_epoch or 0):
            self._warn_end(self.source.size)
            self.steps_per_epoch, self.batches_per_epoch = None, self.source.size
        self._cursors: Iterator[BatchCursor] | None = None
        self._cursor: BatchCursor | None = None
        self._batches_read = 0
        self._passes = 0
        self._sought: DataPosition | None = None  # where this loader was told to begin
        self._began_at: DataPosition | None = None  # the same, also once something was read

    def cursor(self) -> BatchCursor:
        """Return the cursor at the next batch; after the last batch, the data begins again.

        Raises:
            DataError: There is no batch.
        """
        for cursors in (self._cursors, None):  # the rest of the data, then all of it from the start
            if self._cursor is None or self._cursor.exhausted:
                if cursors is None:
                    cursors, self._passes, self._sought = self.source.cursors(), self._passes + 1, None
                self._cursors, self._cursor = cursors, next(cursors, None)
        if self._cursor is None or self._cursor.exhausted:
            self._raise_end()
        return self._cursor

    def has_more(self, drawn: int) -> bool:
        """Tell whether an epoch goes on, of which so many batches were drawn before the data was sought."""
        if self.steps_per_epoch is not None or not drawn:
            return drawn != self.steps_per_epoch
        began, self._began_at = self._began_at, None
        # An epoch begins with a pass: one of which batches were drawn is over where the pass is at its start.
        if began is None or not began.batch:
            return False
        # A model that had to be built has looked at the next batch already, perhaps at that of the next pass.
        if self._sought is not None:
            self._cursors, self._passes, self._sought = self.source.cursors(), self._passes + 1, None
            self._cursor = next(self._cursors, None)
        return self._passes == began.passes and self._cursor is not None and not self._cursor.exhausted

    def epoch(self, drawn: int = 0) -> Iterator[BatchCursor]:
        """Go through one epoch by its cursors, each of which is to be read until none of its batches remain.

        With `steps_per_epoch`, an epoch begins where the last one ended, and goes on from the start of the data.

        Args:
            drawn: How many batches of the epoch were drawn before.
        """
        remaining = None if self.steps_per_epoch is None else self.steps_per_epoch - drawn
        while remaining is None or remaining > 0:
            cursor = self.cursor()
            cursor.limit(remaining)
            before = cursor.position
            yield cursor
            # Only the first read tells that a dataset of unknown size is empty.
            if not cursor.number:
                self._raise_end()
            self._batches_read += cursor.position - before
            if remaining is not None:
                remaining -= cursor.position - before
                if self.is_once and remaining and cursor.exhausted:
                    self._go_on_in_pass()
                    if self._cursor is None:
                        self._warn_end((self.steps_per_epoch or 0) - remaining)
                        return
            # An iterable whose batches change their shape goes on in another cursor.
            elif cursor.exhausted:
                self._go_on_in_pass()
                if self._cursor is None:
                    return

    def position(self) -> DataPosition:
        """Return how far the data has been read."""
        self._go_on_in_pass()
        if self._sought is not None:  # and nothing was read since
            return self._sought
        return DataPosition(self._passes, None if self._cursor is None else self._cursor.number)

    def _go_on_in_pass(self) -> None:
        """Take the next cursor of a pass over the data, where one is at its end."""
        if self._cursor is not None and self._cursor.exhausted and self._cursors is not None:
            self._cursor = next(self._cursors, None)

    @property
    def iterator(self) -> Any:
        """The `tf.data` iterator of the user's own dataset that is being read, or None."""
        reader = None if self._cursor is None else self._cursor.reader
        return (
            reader.iterator if isinstance(self.source, DatasetSource) and isinstance(reader, IteratorReader) else None
        )

    def seek(self, position: DataPosition, restore: Callable[[Any], None] | None = None) -> None:
        """Have the next epoch begin where the data was read to in another run, before anything is read in this one.

        Args:
            position: What `position` returned there.
            restore: Brings an iterator of `tf.data` to where it was; if None, batches are left out.
        """
        self.close()
        self._sought = self._began_at = position
        if position.batch is None:
            self._passes = position.passes
            self.source.skip(position.passes, 0)
            return
        self._passes = position.passes - 1
        if isinstance(self.source, DatasetSource):
            self.source.skip(self._passes, position.batch, restore)
        else:
            self.source.skip(self._passes, position.batch)

    def pass_over(self, epochs: int) -> None:
        """Leave the user's data as it is after so many epochs."""
        if self._iterator is not None:
            for _ in self._iterator.iterable:  # which `require_epochs` has limited
                pass
            return
        per_pass, steps = self.source.size, self.steps_per_epoch
        passes = epochs if steps is None else -(-steps * epochs // per_pass) if per_pass else 1
        self.source.skip(passes, 0)

    def __iter__(self) -> Iterator[Any]:
        for cursor in self.epoch():
            while cursor.remaining != 0:
                try:
                    batch = cursor.reader.read(tf.constant(cursor.position, tf.int64))
                except tf.errors.OpError as error:
                    cause = cursor.error_behind(error)
                    if cause is None:
                        break
                    raise cause from None
                cursor.advance(1)
                yield batch

    def specs(self) -> Iterator[Any]:
        """Yield signatures of batches of any size: the declared one, then that of the first batch of a dataset.

        A dataset may declare less than a layer needs to be built.
        """
        yield open_spec_of(self.cursor().spec())
        # `take` opens an iterator of its own, so that the epoch does not miss the batch.
        if isinstance(self.source, DatasetSource):
            yield from map(open_spec_of, self.source.dataset.take(1))

    def close(self) -> None:
        """Leave the epoch and let go of the data: the next epoch begins at its start."""
        # Dropping the generator closes the user's own, whose `finally` then runs.
        self._cursor = self._cursors = None

    def rewind(self) -> None:
        """Have the next epoch begin at the start of the data; an iterator goes on instead, and loses no batch."""
        if self._iterator is None:
            self.close()

    def require_epochs(self, epochs: int) -> None:
        """Check that the data lasts, and take no more batches from an iterator than that many epochs need.

        Raises:
            DataError: The data is an iterator, which lasts one epoch, and more epochs are asked for.
        """
        if self._iterator is None:
            return
        # Batches are made ahead: without the limit, the user's iterator would be missing some after the fit.
        if self.steps_per_epoch is not None:
            self._iterator.limit(self.steps_per_epoch * epochs)
        elif epochs > 1:
            raise DataError(
                f"`{self.name}` is an iterator, which lasts one epoch, and {epochs} epochs were asked for. Pass "
                "something that can be gone through again, such as a list or a dataset, or `steps_per_epoch`."
            )

    @property
    def is_one_shot(self) -> bool:
        """Whether the data is an iterator, which can be gone through only once."""
        return self._iterator is not None

    @property
    def _iterator(self) -> IterableSource | None:
        """The source, if it is an iterator and can be gone through only once."""
        source = self.source
        return source if isinstance(source, IterableSource) and source.is_one_shot else None

    def _warn_end(self, batches: int) -> None:
        _LOG.warning("`%s` ends after %d batches, and %d were asked for.", self.name, batches, self.steps_per_epoch)

    def _raise_end(self) -> NoReturn:
        self.close()
        if self._batches_read:
            raise DataError(
                f"`{self.name}` ended after {self._batches_read} batches, and more were asked for. Pass data that can "
                "be gone through again, or ask for fewer."
            )
        raise DataError(
            f"`{self.name}` is empty: it was asked for a batch and has none. Pass a dataset with at least "
            "one batch; a generator that has been gone through cannot start again."
        )


@dataclass(frozen=True)
class DataSpec:
    """What a user passes as data, and how it is cut in batches.

    Attributes:
        name: What the data is called in errors.
        data: A `tf.data.Dataset` of batches, a `keras.utils.PyDataset`, any other iterable of batches (a list is one),
            or arrays: one array, a dict of inputs, or a tuple `(inputs[, targets[, sample_weight]])` whose members
            may be nested. Arrays are NumPy arrays, tensors (ragged and sparse ones too), data frames, sparse matrices
            of SciPy, or files that are read in slices, such as `np.memmap`.
        batch_size: Examples per batch, for arrays; None: as many as by default.
        steps: The name of the user's argument for the number of batches per epoch, and its value.
        class_weight: The weights of examples by the class of their target.
        shuffle: Whether arrays, and the batches of a `PyDataset`, come in another order each epoch.
        seed: The seed of the orders.
        is_once: Whether no example counts twice: an epoch ends with the data, though more batches were asked for.
    """

    name: str
    data: Any
    batch_size: int | None = None
    steps: tuple[str, int | None] = ("steps_per_epoch", None)
    class_weight: Mapping[int, float] | None = None
    shuffle: bool = False
    seed: int | None = 0
    is_once: bool = False

    @property
    def examples_per_batch(self) -> int:
        """The number of examples in a batch of arrays."""
        return BATCH_SIZE if self.batch_size is None else self.batch_size

    @property
    def is_arrays(self) -> bool:
        """Whether the data is arrays, of which any example can be had, and no iterable of batches."""
        # A tuple is `(inputs, targets)`, a list is a list of batches.
        return isinstance(self.data, (tuple, Mapping)) or is_array(self.data)

    @property
    def is_sparse(self) -> bool:
        """Whether the data is arrays some of which are sparse."""
        arrays = tf.nest.flatten(self.data) if self.is_arrays else []
        return any(isinstance(array, tf.SparseTensor) or hasattr(array, "tocoo") for array in arrays)

    @property
    def shuffles_batches(self) -> bool:
        """Whether the batches, and not the examples, come in another order each epoch."""
        return self.shuffle and isinstance(self.data, keras.utils.PyDataset)

    @property
    def class_weights(self) -> ClassWeights | None:
        """The weights of examples by class, as tensors."""
        return None if self.class_weight is None else class_weights_of(self.class_weight)

    def sampler(self, epoch: int) -> Sampler:
        """Return the orders of the epochs from this one on."""
        return Sampler(self.shuffle, self.seed, epoch)

    def loader(self, sampler: Sampler | None = None) -> DataLoader:
        """Return a loader of the data, by default in the order in which the data lies.

        Raises:
            DataError: The arrays do not have the same number of examples, or the data is of no known kind, empty, or
                without end.
            ValueError: `batch_size` or the number of batches is no whole number of 1 or more.
        """
        batch_size = whole_number("batch_size", self.examples_per_batch, 1)
        steps = None if self.steps[1] is None else whole_number(*self.steps, 1)
        # Validation data and predictions come in the order in which the user has them.
        sampler = sampler or Sampler(shuffle=False)
        data, name, weights = self.data, self.name, self.class_weights
        is_dataset, is_pydataset = isinstance(data, tf.data.Dataset), isinstance(data, keras.utils.PyDataset)
        endless = is_dataset and int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
        if steps is None and (endless or (is_pydataset and data.num_batches is None)):
            end = "a dataset with an end, as by `take` or `num_batches`"
            raise DataError(f"`{name}` never ends. Pass `{self.steps[0]}`, or {end}.")
        if is_dataset:
            return DataLoader(DatasetSource(data, None, weights), steps, name, is_once=self.is_once)
        if is_pydataset:
            source: Source = IterableSource(PyDatasetBatches(data, sampler), name, weights)
            return DataLoader(source, steps, name, is_once=self.is_once)
        if self.is_arrays:
            arrays = self._array_source(batch_size, sampler)
            source = IterableSource(arrays, name, weights) if isinstance(arrays, FileSlices) else arrays
            return DataLoader(source, steps, name, arrays.smallest_batch, self.is_once)
        if isinstance(data, Iterable):
            return DataLoader(IterableSource(data, name, weights), steps, name, is_once=self.is_once)
        raise DataError(
            f"`{name}` must be a `tf.data.Dataset`, arrays `(x, y)`, a `keras.utils.PyDataset` or an iterable of "
            f"batches. Received: {data!r} of type {type(data).__name__}."
        )

    def _array_source(self, batch_size: int, sampler: Sampler) -> ArraySource | SparseSource | FileSlices:
        """Return the source of batches of arrays, by their kind and whether they lie in memory or in a file.

        Raises:
            DataError: The arrays do not have the same number of examples, or none, or do not go together.
        """
        name = self.name

        def convert(array: Any) -> Any:
            return array if lies_in_file(array) else as_tensors(array, f"`{name}`")

        arrays = tf.nest.map_structure(convert, self.data)
        present = tensors_in(arrays)
        check_examples(present, f"`{name}`")
        in_file, sparse = any(map(lies_in_file, present)), any(isinstance(a, tf.SparseTensor) for a in present)
        if in_file and sparse:
            raise DataError(f"`{name}` has arrays in files and sparse ones, which cannot be sliced: make them dense.")
        kind = FileSlices if in_file else SparseSource if sparse else ArraySource
        return kind(arrays, batch_size, sampler, self.class_weights)
