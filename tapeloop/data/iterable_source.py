"""Python iterables as streams of `tf.data`, so that a compiled loop can draw from them while Python makes the next."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from tapeloop.data.batch import any_size, as_tensors, shapes, spec_of
from tapeloop.data.class_weight import ClassWeights
from tapeloop.data.cursor import BatchCursor, IteratorReader, on_device, places_of
from tapeloop.errors import DataError

AHEAD = 2  # batches that Python makes before they are drawn


class IterableSource:
    """Feeds of what a Python iterable gives, one after the other.

    The shape of the first batch, its number of examples left open, is that of a feed. A batch of another shape ends it,
    and begins one in which the lengths that differ are left open too: each such change costs a trace.
    """

    def __init__(self, source: Iterable[Any], name: str, class_weights: ClassWeights | None) -> None:
        """Keep the source.

        Args:
            source: What gives batches.
            name: What it is called in errors.
            class_weights: Weights of examples by class, if there are any.
        """
        self._source = source
        self._name = name
        self._class_weights = class_weights
        self._places: Any = None
        self._specs: tuple[Any, ...] = ()
        self._cause: BaseException | None = None

    @property
    def once(self) -> bool:
        """Whether the source can be gone through once alone."""
        return iter(self._source) is self._source

    def limit(self, batches: int) -> None:
        """Take so many batches at most from the source, though more are made ahead than are asked for."""
        self._source = itertools.islice(self._source, batches)

    def feeds(self) -> Iterator[BatchCursor]:
        """Go through the source once.

        Raises:
            DataError: A batch has not the structure of the first, or no array that can be a tensor.
        """
        batches = enumerate(self._source)
        following = next(batches, None)
        while following is not None:
            number, batch = following
            first = self._flat(batch, number)
            self._open(first)
            rest: list[tuple[int, Any]] = []
            waiting = [self._segment(batches, first, rest)]
            data = tf.data.Dataset.from_generator(functools.partial(_once, waiting), output_signature=self._specs)
            self._cause = None
            source = IteratorReader(iter(on_device(data.prefetch(AHEAD))), self._places, self._class_weights)
            yield BatchCursor(source, None, number, lambda: self._cause)
            following = rest[0] if rest else None

    def _segment(
        self, batches: Iterator[tuple[int, Any]], first: tuple[Any, ...], rest: list[tuple[int, Any]]
    ) -> Iterator[tuple[Any, ...]]:
        """Give batches while they have the shapes that are expected; the one that has not is the rest."""
        try:
            yield first
            del first
            for number, batch in batches:
                flat = self._flat(batch, number)
                if not all(spec.is_compatible_with(value) for spec, value in zip(self._specs, flat)):
                    rest.append((number, batch))
                    return
                yield flat
        except GeneratorExit:
            raise
        except BaseException as error:
            self._cause = error
            raise

    def _flat(self, batch: Any, number: int) -> tuple[Any, ...]:
        """Return the tensors of a batch.

        Raises:
            DataError: It has not the structure of those before it.
        """
        batch = as_tensors(batch, f"batch {number} of `{self._name}`")
        leaves = tf.nest.flatten(batch)
        places = places_of(batch)
        if self._places is None:
            self._places = places
        elif not _alike(places, self._places) or tf.nest.flatten(places) != tf.nest.flatten(self._places):
            raise DataError(
                f"The structure changes at batch {number} of `{self._name}` (the first is 0): it is {_said(batch)}, "
                f"those before it are {_said(self._places)}. Give all batches the same nesting of tuples and dicts, "
                "with the same members missing."
            )
        flat = tuple(value for value in leaves if value is not None)
        for value, spec in zip(flat, self._specs):
            if type(spec_of(value)) is not type(spec) or value.dtype != spec.dtype:
                raise DataError(
                    f"The types change at batch {number} of `{self._name}` (the first is 0): {shapes(value)} where "
                    f"those before it have {spec.dtype.name} in a {type(spec).__name__}. Give all batches the same."
                )
        return flat

    def _open(self, flat: tuple[Any, ...]) -> None:
        """Leave open what differs from one batch to another, and the number of examples."""
        specs = [any_size(value) for value in flat]
        if self._specs:
            specs = [_common(before, now) for before, now in zip(self._specs, specs)]
        self._specs = tuple(specs)


def _once(waiting: list[Iterator[Any]]) -> Iterator[Any]:
    """Give what the one iterator in a list gives, and leave it to nobody: TensorFlow keeps this function for good."""
    yield from waiting.pop()


def _common(one: Any, other: Any) -> Any:
    """Return the signature of what fits either of two."""
    found = one.most_specific_common_supertype([other])
    return other if found is None or found.shape.rank is None else found  # of another number of dimensions


def _alike(one: Any, other: Any) -> bool:
    try:
        tf.nest.assert_same_structure(one, other)
    except (ValueError, TypeError):
        return False
    return True


def _said(structure: Any) -> str:
    """Say a structure without its values: `({'a': *, 'b': *}, *, None)`."""
    leaves = tf.nest.map_structure(lambda value: None if value is None else _Star(), structure)
    return repr(leaves)


class _Star:
    def __repr__(self) -> str:
        return "*"
