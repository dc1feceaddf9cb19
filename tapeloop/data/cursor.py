"""How a compiled loop gets its batches: it gathers them from tensors in memory, or takes them from an iterator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from tapeloop._backend.assertions import came_up_drawing
from tapeloop.data.batch import Share, map_tensors, spec_of
from tapeloop.data.class_weight import ClassWeights, with_class_weights


class Reader(Protocol):
    """Gives a compiled loop its batches."""

    def signature(self) -> Any:
        """Return the signature of readers of any number of examples."""

    def read(self, number: tf.Tensor, share: Share | None = None) -> Any:
        """Return a batch, whose number counts from 0, or the share of one device of it."""


class IteratorReader(NamedTuple):
    """Takes batches from an iterator.

    Attributes:
        iterator: A `tf.data` iterator.
        layout: The layout of a batch, by which the tensors of an element become a batch; None if elements are batches.
            Elements of `tf.data` carry neither lists nor missing members.
        class_weights: Weights of examples by class, if there are any.
    """

    iterator: Any
    layout: Any
    class_weights: ClassWeights | None

    @classmethod
    def over(cls, dataset: tf.data.Dataset, layout: Any, class_weights: ClassWeights | None) -> IteratorReader:
        """Return a reader of a dataset, which has its next elements on the device of the steps before they are read."""
        devices = tf.config.list_logical_devices("GPU")
        fits = all(  # strings, ragged and sparse tensors stay with the host
            isinstance(spec, tf.TensorSpec) and (spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool)
            for spec in tf.nest.flatten(dataset.element_spec)
        )
        # The last of the pipeline, as `tf.data` wants it: nothing can follow on batches that lie on a device.
        if devices and fits:
            dataset = dataset.apply(tf.data.experimental.prefetch_to_device(devices[0].name))
        return cls(iter(dataset), layout, class_weights)

    def signature(self) -> IteratorReader:
        """Return the signature of such readers."""
        return self

    def read(self, number: tf.Tensor, share: Share | None = None) -> Any:
        """Return the next batch, whatever its number is, or the share of one device of it.

        Raises:
            tf.errors.OutOfRangeError: There is none.
        """
        del number
        batch = self.iterator.get_next()
        if self.layout is not None:
            batch = map_tensors(batch.__getitem__, self.layout)
        return with_class_weights(batch if share is None else share.rows(batch), self.class_weights)


# Compared by identity: a compiled loop remembers the cursor that it was traced for.
@dataclass(eq=False)
class BatchCursor:
    """A reader of batches, and how far it has been read.

    Attributes:
        reader: Gives a compiled loop its batches.
        size: How many batches the reader has, or None if that is not known.
        first_number: The number of its first batch in the data, counted from 0.
        user_error: Returns the exception by which the user's own code ended the reader, if it did.
        key: The key of its reader, if that is known; see `reader_key`.
        position: How many batches were read.
        remaining: How many batches may be read before the loader is asked again; None if that is not known.
        exhausted: Whether there are no more batches.
    """

    reader: Reader
    size: int | None
    first_number: int = 0
    user_error: Callable[[], BaseException | None] = lambda: None
    key: str = ""
    position: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.remaining, self.exhausted = self.size, self.size == 0
        self.key = self.key or reader_key(self.reader)

    @property
    def number(self) -> int:
        """The number of the next batch in the data, counted from 0."""
        return self.first_number + self.position

    def limit(self, batches: int | None) -> None:
        """Let at most this many batches be read from here; None: all."""
        rest = None if self.size is None else self.size - self.position
        self.remaining = min((count for count in (rest, batches) if count is not None), default=None)

    def advance(self, batches: int) -> None:
        """Note that this many batches were read."""
        self.position += batches
        if self.remaining is not None:
            self.remaining -= batches
        # If the size is not known, only a read that fails can tell that there are no more; see `error_behind`.
        self.exhausted = self.position == self.size

    def error_behind(self, error: BaseException) -> BaseException | None:
        """Return why the steps on this cursor ended, if they ended with an error.

        Returns:
            None if the reader has no more batches, the exception of the user's own code if that ended the reader, and
            otherwise the error itself.
        """
        if not came_up_drawing(error):
            return error
        if isinstance(error, tf.errors.OutOfRangeError) and self.size is None:
            # A step may run an iterator of its own to its end, which raises the same error: reading on tells which.
            try:
                self.reader.read(tf.constant(self.position, tf.int64))
            except tf.errors.OutOfRangeError:
                self.exhausted, self.remaining = True, 0
                return None
        return self.user_error() or error

    def spec(self) -> Any:
        """Return the signature of the next batch."""
        # Traced and not run: to read the batch would take it away from an iterator.
        read = tf.function(lambda reader: reader.read(tf.constant(0, tf.int64)), autograph=False)
        return spec_of(read.get_concrete_function(self.reader).structured_outputs)


def reader_key(reader: Reader) -> str:
    """Return what a compiled loop is kept by: readers of one key run in one trace."""
    return str(tf.nest.map_structure(_described, reader.signature()))


def _described(value: Any) -> Any:
    """Return what a reader's part is to a trace: the signature of a tensor or iterator, anything else itself."""
    if value is None or isinstance(value, (bool, int, str, tf.TypeSpec)):
        return value
    return tf.type_spec_from_value(value)


def layout_of(batch: Any) -> Any:
    """Return the nesting of a batch, with the index of each tensor among all of them."""
    indices = itertools.count()
    return map_tensors(lambda value: next(indices), batch)
