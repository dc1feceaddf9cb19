"""Trying out on one batch which tensors of a traced step hold a row for each example that depends on it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.data.batch import examples_of, map_tensors, rows_of, tensors_in

# How far a number may be off beside other examples, relative to the largest number of its column.
TOLERANCE = {tf.float64: 1e-6, tf.float32: 1e-4, tf.float16: 1e-2, tf.bfloat16: 5e-2}
# How many times as far in a batch of another size, for which a library may choose another algorithm: by oneDNN, 50
# layers were off by 3e-4. What depends on the number of examples is off by much more.
RESIZED = 10


class IndependenceProbe:
    """Computes tensors of a batch, of its parts, and of single examples among strange ones, and compares.

    The graph shows if several examples are made one, but not what mixes them and keeps their number: a running sum, a
    product with the transpose, a division by the number of examples, whatever happens within a loop.
    """

    def __init__(self, whole: TracedGraph, batch: Any) -> None:
        """Keep a step and a batch; a batch of one example is doubled."""
        self._whole = whole
        self._batch = _by_tensor(_doubled, batch) if int(examples_of(batch)) == 1 else batch
        self._examples = int(examples_of(self._batch))

    def without_rows(self, tensors: Iterable[tf.Tensor]) -> set[str]:
        """Return the names of the tensors whose first dimension is not the examples."""
        some = list(tensors)
        values = self._compute(some, [self._batch])[0] if some else []
        return {tensor.name for tensor, value in zip(some, values) if value.shape[:1] != (self._examples,)}

    def bytes(self, tensors: Mapping[str, tf.Tensor], *, compares: bool) -> dict[str, float]:
        """Return the bytes per example of each tensor; infinite if it has no row that depends on one example alone.

        Args:
            tensors: The tensors, by name.
            compares: Whether tensors that are computed twice must be equal, as they are unless something is random.
        """
        # Handles and strings have no bytes to keep.
        some = [tensor for tensor in tensors.values() if tensor.dtype not in (tf.variant, tf.resource, tf.string)]
        trials = list(self._trials())
        originals, *others = self._compute(some, [self._batch, *(trial.batch for trial in trials)])
        weights = dict.fromkeys(tensors, math.inf)
        for number, (tensor, value) in enumerate(zip(some, originals)):
            tried = [
                (trial, value[trial.there], each[number][trial.here]) for trial, each in zip(trials, others) if each
            ]
            if value.shape[:1] == (self._examples,) and all(
                one.shape == other.shape and (not compares or _is_alike(one, other, trial.patience))
                for trial, one, other in tried
            ):
                weights[tensor.name] = max(1.0, value.nbytes / self._examples)
        return weights

    def _trials(self) -> Iterator[_Trial]:
        """Give batches that have examples in common with the original."""
        n, batch = self._examples, self._batch
        # Halves show what depends on the number of examples or on later ones, single examples what depends on any.
        first, last = slice(1), slice(n - 1, n)
        for part in (slice(n // 2), slice(n // 2, n), first, last):
            yield _Trial(_by_tensor(_rows, batch, part), part, slice(None), RESIZED)
        if all(value is None or isinstance(value, tf.Tensor) for value in tf.nest.flatten(batch)):
            # Strangers show what few examples of the data bring about, such as a division by the largest number.
            for part in (first, last):
                yield _Trial(_by_tensor(_among_strangers, batch, part), part, part)

    def _compute(self, tensors: list[tf.Tensor], batches: list[Any]) -> list[list[np.ndarray]]:
        """Compute tensors of batches; none of a batch, beside the first, that is too strange for an op."""
        # Traced once with an open number of examples, as the features are, and called for batches of all sizes.
        compute = self._whole.subgraph(tensors, self._whole.inputs).function()
        computed: list[list[np.ndarray]] = []
        for batch in batches:
            try:
                computed.append([value.numpy() for value in compute(*tensors_in(batch, apart=True))])
            except tf.errors.OpError:  # a number that is drawn may be out of the range of a lookup
                if not computed:
                    raise
                computed.append([])
        return computed


@dataclass(frozen=True)
class _Trial:
    """A batch that has examples in common with the original.

    Attributes:
        batch: The batch.
        there: Which rows of the original these are.
        here: Which of its own.
        patience: How many times the tolerance their numbers may be off.
    """

    batch: Any
    there: slice
    here: slice
    patience: float = 1


def _is_alike(expected: np.ndarray, found: np.ndarray, patience: float = 1) -> bool:
    tolerance = TOLERANCE.get(tf.as_dtype(expected.dtype))
    if tolerance is None:  # integers and booleans
        return np.array_equal(expected, found)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    # A masked or overflowing number must be so in both.
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return False
    expected, found = np.where(finite, expected, 0.0), np.where(finite, found, 0.0)
    return bool((np.abs(expected - found) <= patience * tolerance * _scales(expected)).all())


def _scales(values: np.ndarray) -> np.ndarray:
    """Return how large the numbers of each column, the last dimension, are.

    Rounding is judged by column, since one column of large numbers would hide what mixes in the others. The rounding
    errors of a column that is all but zero are those of what it was computed of: it counts as a tenth of the smaller
    columns.
    """
    columns = np.abs(values.reshape(len(values), -1) if values.ndim < 2 else values.reshape(-1, values.shape[-1]))
    largest = columns.max(0, initial=0.0)
    filled = np.sort(largest[largest > 0])
    return np.maximum(largest, 0.1 * filled[len(filled) // 4]) if filled.size else largest


def _by_tensor(change: Callable[..., Any], batch: Any, *args: Any) -> Any:
    """Return a batch in which each tensor that has examples is changed."""
    return map_tensors(lambda value: change(value, *args) if value.shape.rank else value, batch)


def _doubled(value: Any) -> Any:
    return tf.sparse.concat(0, [value, value]) if isinstance(value, tf.SparseTensor) else tf.concat([value, value], 0)


def _rows(value: Any, part: slice) -> Any:
    start, stop, _ = part.indices(int(value.shape[0]))
    return rows_of(value, start, stop - start)


def _among_strangers(value: tf.Tensor, part: slice) -> tf.Tensor:
    """Return a tensor of which all rows but some are drawn from about the range of its numbers."""
    if value.dtype == tf.string:
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
