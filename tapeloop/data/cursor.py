"""Where a compiled loop draws its batches from: tensors in memory, or an iterator of `tf.data`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tapeloop._backend.assertions import came_up_drawing
from tapeloop.data.batch import any_size, spec_of
from tapeloop.data.class_weight import ClassWeights, _weighted


class ArrayReader(NamedTuple):
    """Batches cut from tensors that lie in memory.

    Attributes:
        tensors: A structure of tensors with the examples first; None where something is missing.
        order: The examples' numbers, in the order in which they come: a row for each batch where all have as many, or
            one after the other.
        batch_size: Examples in a batch, where the last has fewer; None where all have as many.
        device: Where they lie, if that is not where the steps run.
        class_weights: Weights of examples by class, if there are any.
    """

    tensors: Any
    order: tf.Tensor
    batch_size: tf.Tensor | None
    device: str | None
    class_weights: ClassWeights | None

    def signature(self) -> ArrayReader:
        """Return the signature of such batches cut from any number of examples."""
        tensors = tf.nest.map_structure(lambda value: None if value is None else any_size(value), self.tensors)
        return self._replace(tensors=tensors, order=any_size(self.order))

    def batch(self, number: tf.Tensor) -> Any:
        """Return the batch of this number, counted from 0."""
        with tf.device(self.device):
            if self.batch_size is None:
                chosen = tf.gather(self.order, number)
            else:
                chosen = self.order[number * self.batch_size : (number + 1) * self.batch_size]
            batch = tf.nest.map_structure(
                lambda array: None if array is None else tf.gather(array, chosen), self.tensors
            )
        return _weighted(batch, self.class_weights)


class IteratorReader(NamedTuple):
    """Batches that an iterator gives.

    Attributes:
        iterator: A `tf.data` iterator.
        places: Where a batch is a structure with lists or with something missing, which `tf.data` does not carry: that
            structure, and in it for each of the iterator's tensors its place. None where its elements are the batches.
        class_weights: Weights of examples by class, if there are any.
    """

    iterator: Any
    places: Any
    class_weights: ClassWeights | None

    def signature(self) -> IteratorReader:
        """Return the signature of such batches."""
        return self

    def batch(self, number: tf.Tensor) -> Any:
        """Return the next batch; which one it is, is the iterator's to know.

        Raises:
            tf.errors.OutOfRangeError: There is none.
        """
        del number
        batch = self.iterator.get_next()
        if self.places is not None:
            flat = batch
            batch = tf.nest.map_structure(lambda place: None if place is None else flat[place], self.places)
        return _weighted(batch, self.class_weights)


class BatchCursor:
    """A source of batches, and how far it has been drawn.

    Attributes:
        source: What a compiled loop draws from.
        position: How many batches were drawn.
        left: How many may yet be drawn before the host has to look again, or None where nobody knows how many there
            are.
        ended: Whether there are no more.
    """

    def __init__(
        self,
        source: ArrayReader | IteratorReader,
        size: int | None,
        first: int = 0,
        cause: Callable[[], BaseException | None] = lambda: None,
    ) -> None:
        """Keep the source.

        Args:
            source: What a compiled loop draws from.
            size: How many batches it has, or None where nobody knows.
            first: The number of its first batch among those of the data, counted from 0.
            cause: Gives the exception that the user's own code ended it with, if it did.
        """
        self.source = source
        self.position = 0
        self.left = size
        self.ended = size == 0
        self._size = size
        self._first = first
        self._cause = cause

    @property
    def number(self) -> int:
        """The number of the next batch among those of the data, counted from 0."""
        return self._first + self.position

    def cause_of(self, failure: BaseException) -> BaseException | None:
        """Return the exception of the user's own code that a failure to draw is due to, if it is that."""
        return self._cause() if came_up_drawing(failure) else None

    def allow(self, most: int | None) -> None:
        """Let so many batches be drawn, if there are as many; None: all."""
        rest = None if self._size is None else self._size - self.position
        self.left = rest if most is None else most if rest is None else min(rest, most)

    def drawn(self, batches: int) -> None:
        """Note that so many batches were drawn."""
        self.position += batches
        if self.left is not None:
            self.left -= batches
        self.ended = self.position == self._size

    def has_ended(self, report: Exception) -> bool:
        """Tell whether the source has come to its end, which the report of an end says, or a step of its own."""
        if self._size is not None or not came_up_drawing(report):
            return False
        try:
            self.source.batch(tf.constant(self.position, tf.int64))
        except tf.errors.OutOfRangeError:
            self.end()
        return self.ended

    def end(self) -> None:
        """Note that there are no more."""
        self.ended, self.left = True, 0

    def spec(self) -> Any:
        """Return the signature of its batches."""
        get = tf.function(lambda source: self.source.__class__.batch(source, tf.constant(0, tf.int64)), autograph=False)
        return spec_of(get.get_concrete_function(self.source).structured_outputs)


def on_device(data: tf.data.Dataset) -> tf.data.Dataset:
    """Return a dataset whose next elements are on the device of the steps before they are asked for."""
    devices = tf.config.list_logical_devices("GPU")
    plain = all(
        isinstance(spec, tf.TensorSpec) and (spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool)
        for spec in tf.nest.flatten(data.element_spec)
    )
    if not devices or not plain:
        return data
    return data.apply(tf.data.experimental.prefetch_to_device(devices[0].name))


def places_of(batch: Any) -> Any:
    """Return a batch's structure with each tensor's place among all of them, and None where something is missing."""
    places = itertools.count()
    return tf.nest.map_structure(lambda value: None if value is None else next(places), batch)
