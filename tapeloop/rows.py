"""Trying out, on one batch, which tensors of a traced step hold a row for each example that is that example's alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.batch import examples_of
from tapeloop.graph import Traced

# By how much, relative to the largest number, an example may come to something else beside others.
TOLERANCE = {tf.float64: 1e-6, tf.float32: 1e-4, tf.float16: 2e-2, tf.bfloat16: 1e-1}


class Rows:
    """A batch, and the same without its first example."""

    def __init__(self, whole: Traced, batch: Any) -> None:
        """Keep the step and make the batches."""
        self._whole = whole
        if int(examples_of(batch)) == 1:
            batch = tf.nest.map_structure(_doubled, batch)
        self._examples = int(examples_of(batch))
        self._batches = [flat(batch), flat(tf.nest.map_structure(_without_first, batch))]

    def unlike(self, tensors: Iterable[tf.Tensor]) -> set[str]:
        """Return the names of those whose first dimension is not the examples."""
        some = list(tensors)
        values = self._run(some, self._batches[0])
        return {tensor.name for tensor, value in zip(some, values) if value.shape[:1] != (self._examples,)}

    def bytes(self, tensors: Mapping[str, tf.Tensor], *, compares: bool) -> dict[str, float]:
        """Return how many bytes an example has in each, infinite where it has no row that is its alone.

        Args:
            tensors: By name.
            compares: Whether what is computed twice must be the same.
        """
        some = [tensor for tensor in tensors.values() if tensor.dtype not in (tf.variant, tf.resource, tf.string)]
        first, second = (self._run(some, batch) for batch in self._batches)
        weights = dict.fromkeys(tensors, math.inf)
        for tensor, one, other in zip(some, first, second):
            has_rows = one.shape[:1] == (self._examples,) and other.shape == (self._examples - 1, *one.shape[1:])
            if has_rows and (not compares or _is_alike(tensor.dtype, one[1:], other)):
                weights[tensor.name] = max(1.0, one.nbytes / self._examples)
        return weights

    def _run(self, tensors: list[tf.Tensor], batch: list[tf.Tensor]) -> list[np.ndarray]:
        part = self._whole.part(tensors, self._whole.batch, ())
        run = tf.function(lambda *values: part(values), autograph=False)
        return [value.numpy() for value in run(*batch)] if tensors else []


def flat(batch: Any) -> list[tf.Tensor]:
    """Return the tensors of a batch, as a traced function takes them."""
    return [value for value in tf.nest.flatten(batch, expand_composites=True) if value is not None]


def _is_alike(dtype: tf.DType, expected: np.ndarray, found: np.ndarray) -> bool:
    if dtype not in TOLERANCE:
        return np.array_equal(expected, found)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    return np.allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * finite.max(initial=0.0), equal_nan=True)


def _doubled(value: Any) -> Any:
    if value is None or not value.shape.rank:
        return value
    return tf.sparse.concat(0, [value, value]) if isinstance(value, tf.SparseTensor) else tf.concat([value, value], 0)


def _without_first(value: Any) -> Any:
    if value is None or not value.shape.rank:
        return value
    if isinstance(value, tf.SparseTensor):
        length, *rest = map(int, value.dense_shape)
        return tf.sparse.slice(value, [1, *[0] * len(rest)], [length - 1, *rest])
    return value[1:]
