"""Trying out, on one batch, which tensors of a traced step hold a row for each example that is that example's alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.data.batch import examples_of

# By how much, relative to the largest number of a column, an example may come to something else beside others.
TOLERANCE = {tf.float64: 1e-6, tf.float32: 1e-4, tf.float16: 1e-2, tf.bfloat16: 5e-2}


class IndependenceProbe:
    """A batch, and others in which some of its examples stand beside others, or beside none."""

    def __init__(self, whole: TracedGraph, batch: Any) -> None:
        """Keep the step and the batch, twice over where it has one example."""
        self._whole = whole
        doubled = int(examples_of(batch)) == 1
        self._batch = tf.nest.map_structure(_doubled, batch) if doubled else batch
        self._examples = int(examples_of(self._batch))

    def unlike(self, tensors: Iterable[tf.Tensor]) -> set[str]:
        """Return the names of those whose first dimension is not the examples."""
        some = list(tensors)
        values = self._run(some, [self._batch])[0] if some else []
        return {tensor.name for tensor, value in zip(some, values) if value.shape[:1] != (self._examples,)}

    def bytes(self, tensors: Mapping[str, tf.Tensor], *, compares: bool) -> dict[str, float]:
        """Return how many bytes an example has in each, infinite where it has no row that is its alone.

        Args:
            tensors: By name.
            compares: Whether what is computed twice must be the same.
        """
        some = [tensor for tensor in tensors.values() if tensor.dtype not in (tf.variant, tf.resource, tf.string)]
        trials = list(self._trials())
        whole, *others = self._run(some, [self._batch, *(trial.batch for trial in trials)])
        weights = dict.fromkeys(tensors, math.inf)
        for number, tensor in enumerate(some):
            value = whole[number]
            has_rows = value.shape[:1] == (self._examples,)
            tried = [(trial, other[number]) for trial, other in zip(trials, others) if other]
            if has_rows and all(trial.confirms(value, other, compares=compares) for trial, other in tried):
                weights[tensor.name] = max(1.0, value.nbytes / self._examples)
        return weights

    def _trials(self) -> Iterator[_Trial]:
        n, batch = self._examples, self._batch
        for part in (slice(n // 2), slice(n // 2, n), slice(1), slice(n - 1, n)):
            yield _Trial(tf.nest.map_structure(functools.partial(_cut, part=part), batch), part, slice(None))
        if all(value is None or isinstance(value, tf.Tensor) for value in tf.nest.flatten(batch)):
            for part in (slice(1), slice(n - 1, n)):
                yield _Trial(tf.nest.map_structure(functools.partial(_strange_but, part=part), batch), part, part)

    def _run(self, tensors: list[tf.Tensor], batches: list[Any]) -> list[list[np.ndarray]]:
        """Compute tensors of batches; nothing of one, but the first, that is too strange for an op."""
        run = self._whole.part(tensors, self._whole.batch, ()).function()
        found: list[list[np.ndarray]] = []
        for batch in batches:
            try:
                found.append([value.numpy() for value in run(*flat(batch))])
            except tf.errors.OpError:
                if not found:
                    raise
                found.append([])
        return found


@dataclass(frozen=True)
class _Trial:
    """A batch of which some rows are those of another.

    Attributes:
        batch: The batch.
        rows: Which rows of the other.
        here: Which rows of its own.
    """

    batch: Any
    rows: slice
    here: slice

    def confirms(self, one: np.ndarray, other: np.ndarray, *, compares: bool) -> bool:
        """Tell whether a tensor is the same for the same rows, of the other batch and of this."""
        expected, found = one[self.rows], other[self.here]
        return expected.shape == found.shape and (not compares or _is_alike(expected, found))


def flat(batch: Any) -> list[tf.Tensor]:
    """Return the tensors of a batch, as a traced function takes them."""
    return [value for value in tf.nest.flatten(batch, expand_composites=True) if value is not None]


def _is_alike(expected: np.ndarray, found: np.ndarray) -> bool:
    tolerance = TOLERANCE.get(tf.as_dtype(expected.dtype))
    if tolerance is None:
        return np.array_equal(expected, found)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return False
    expected, found = np.where(finite, expected, 0.0), np.where(finite, found, 0.0)
    return bool((np.abs(expected - found) <= tolerance * _scales(expected)).all())


def _scales(values: np.ndarray) -> np.ndarray:
    """Return how large the numbers of each column, the last dimension, are: a large one hides nothing in the others.

    Where a column is all but zero, its rounding errors are those of what it was computed of: it is taken to be a tenth
    as large as the smaller ones of the others.
    """
    columns = np.abs(values.reshape(len(values), -1) if values.ndim < 2 else values.reshape(-1, values.shape[-1]))
    largest = columns.max(0, initial=0.0)
    filled = np.sort(largest[largest > 0])
    return np.maximum(largest, 0.1 * filled[len(filled) // 4]) if filled.size else largest


def _doubled(value: Any) -> Any:
    if value is None or not value.shape.rank:
        return value
    return tf.sparse.concat(0, [value, value]) if isinstance(value, tf.SparseTensor) else tf.concat([value, value], 0)


def _cut(value: Any, part: slice) -> Any:
    if value is None or not value.shape.rank:
        return value
    if isinstance(value, tf.SparseTensor):
        length, *rest = map(int, value.dense_shape)
        start, stop, _ = part.indices(length)
        return tf.sparse.slice(value, [start, *[0] * len(rest)], [stop - start, *rest])
    return value[part]


def _strange_but(value: Any, part: slice) -> Any:
    """Return a tensor of which all rows but some are drawn from about the range of its numbers."""
    if value is None or not value.shape.rank or value.dtype == tf.string:
        return value
    array, generator = value.numpy(), np.random.default_rng(0)
    if value.dtype.is_floating:
        finite = array[np.isfinite(array)].astype(np.float64)
        middle, spread = (finite.mean(), finite.std()) if finite.size else (0.0, 0.0)
        strange = generator.normal(middle, 3 * spread + 1, array.shape)
    else:
        strange = generator.integers(int(array.min(initial=0)), int(array.max(initial=0)) + 1, array.shape)
    strange = strange.astype(array.dtype)
    strange[part] = array[part]
    return tf.constant(strange, value.dtype)
