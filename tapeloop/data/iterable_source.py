"""Python iterables as streams of `tf.data`, so that a compiled loop can draw from them while Python makes the next."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop.data.array_source import FileSlices
from tapeloop.data.batch import as_tensors, map_tensors, open_spec_of, shapes, spec_of, tensors_in
from tapeloop.data.class_weight import ClassWeights
from tapeloop.data.cursor import BatchCursor, IteratorReader, layout_of
from tapeloop.data.pydataset import PyDatasetBatches
from tapeloop.errors import DataError

PREFETCHED = 2  # batches that Python makes before they are drawn
SEEKABLE = FileSlices, PyDatasetBatches  # which find a batch by its number, and need not make those before it


@dataclass
class IterableSource:
    """The batches of a Python iterable.

    The batches of a cursor share one signature, which leaves the number of examples open. A batch that does not fit
    ends the cursor and begins another, whose signature leaves open every length that differed: this costs a trace.

    Attributes:
        iterable: Gives batches.
        name: What the data is called in errors.
        class_weights: Weights of examples by class, if there are any.
    """

    iterable: Iterable[Any]
    name: str
    class_weights: ClassWeights | None

    def __post_init__(self) -> None:
        # A length of 0 may mean that it is not known, as `PyDatasetBatches` says it of data without end.
        self.size = (len(self.iterable) or None) if isinstance(self.iterable, Sized) else None
        self._layout: Any = None
        self._specs: tuple[Any, ...] = ()
        self._error: BaseException | None = None
        self._read = 0

    @property
    def is_one_shot(self) -> bool:
        """Whether it is an iterator, which can be gone through only once."""
        return iter(self.iterable) is self.iterable

    def limit(self, batches: int) -> None:
        """Take at most this many batches from the iterable, though batches are made ahead."""
        self.iterable = itertools.islice(self.iterable, batches)

    def skip(self, passes: int, batches: int) -> None:
        """Have the next pass begin after so many passes more, and after so many of its batches."""
        self._read = batches
        # Any other iterable is read from its start, and each pass over it is taken to be like the first.
        if isinstance(self.iterable, SEEKABLE):
            self.iterable.skip(passes, batches)

    def cursors(self) -> Iterator[BatchCursor]:
        """Go through the iterable once.

        Raises:
            DataError: A batch has another structure than the first, or an array that cannot be a tensor.
        """
        read, self._read = self._read, 0
        is_seekable = isinstance(self.iterable, SEEKABLE)
        batches = itertools.islice(enumerate(self.iterable, read * is_seekable), read * (not is_seekable), None)
        rest = list(itertools.islice(batches, 1))
        while rest:
            number, batch = rest.pop()
            first = self._flatten(batch, number)
            # What differed once stays open for good: data of many lengths costs one more trace, and not one for each.
            self._widen_specs(first)
            # Python runs two batches ahead in a thread of `tf.data`, while the compiled loop trains.
            segment = [self._segment(batches, first, rest)]
            dataset = tf.data.Dataset.from_generator(functools.partial(_drain, segment), output_signature=self._specs)
            self._error = None
            reader = IteratorReader.over(dataset.prefetch(PREFETCHED), self._layout, self.class_weights)
            yield BatchCursor(reader, None, number, lambda: self._error)

    def _segment(
        self, batches: Iterator[tuple[int, Any]], first: tuple[Any, ...], rest: list[tuple[int, Any]]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the flat batches that fit the signature; the batch that does not fit becomes the `rest`."""
        try:
            yield first
            del first  # or it would stay in memory as long as the segment lasts
            for number, batch in batches:
                flat = self._flatten(batch, number)
                if not all(spec.is_compatible_with(value) for spec, value in zip(self._specs, flat)):
                    rest.append((number, batch))
                    return
                yield flat
        except BaseException as error:
            # TensorFlow hands on the text alone, in an error of its own. After `GeneratorExit` nobody reads on.
            if not isinstance(error, GeneratorExit):
                self._error = error
            raise

    def _flatten(self, batch: Any, number: int) -> tuple[Any, ...]:
        """Return the tensors of a batch.

        Raises:
            DataError: It has another structure or other dtypes than the batches before it.
        """
        batch = as_tensors(batch, f"batch {number} of `{self.name}`")
        layout = layout_of(batch)
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise DataError(
                f"The structure changes at batch {number} of `{self.name}` (the first is 0): it is "
                f"{_nesting(layout)}, those before it are {_nesting(self._layout)}. Give all batches the same nesting "
                "of tuples and dicts, with the same members missing."
            )
        flat = tuple(tensors_in(batch))
        for value, spec in zip(flat, self._specs):
            # `from_generator` would cast in silence, or fail with a text that does not name the batch.
            if type(spec_of(value)) is not type(spec) or value.dtype != spec.dtype:
                raise DataError(
                    f"The types change at batch {number} of `{self.name}` (the first is 0): {shapes(value)} where "
                    f"those before it have {spec.dtype.name} in a {type(spec).__name__}. Give all batches the same."
                )
        return flat

    def _widen_specs(self, flat: tuple[Any, ...]) -> None:
        """Leave open every length that differs between these tensors and the signature so far."""
        specs = open_spec_of(flat)
        self._specs = tuple(map(_common_spec, self._specs, specs)) if self._specs else specs


def _drain(segment: list[Iterator[Any]]) -> Iterator[Any]:
    """Yield the elements of the only iterator in a list, and empty the list.

    TensorFlow keeps this function for good, which must not keep the user's data with it.
    """
    yield from segment.pop()


def _common_spec(before: Any, now: Any) -> Any:
    """Return the signature of tensors that fit either; that of `now` if they have another number of dimensions."""
    common = before.most_specific_common_supertype([now])
    return now if common is None or common.shape.rank is None else common


def _nesting(layout: Any) -> str:
    """Describe a layout: `({'a': *, 'b': *}, *, None)`."""
    return repr(map_tensors(lambda _: "*", layout)).replace("'*'", "*")
