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
    """A batch, and the same with its examples in other places."""

    def __init__(self, whole: Traced, batch: Any) -> None:
        """Keep the step and make the batches: the second has no first example, and one more of the second."""
        self._whole = whole
        if int(examples_of(batch)) == 1 and whole.batch[0].shape[:1] != [1]:
            batch = tf.nest.map_structure(lambda value: None if value is None else _concat([value, value]), batch)
        self._examples = int(examples_of(batch))
        moved = tf.nest.map_structure(lambda value: None if value is None else self._moved(value), batch)
        self._batches = [flat(batch), flat(moved)]

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
            if one.shape[:1] == (self._examples,) and (not compares or self._is_alike(tensor.dtype, one, other)):
                weights[tensor.name] = max(1.0, one.nbytes / self._examples)
        return weights

    def _run(self, tensors: list[tf.Tensor], batch: list[tf.Tensor]) -> list[np.ndarray]:
        part = self._whole.part(tensors, self._whole.batch, ())
        run = tf.function(lambda *values: part(values), autograph=False)
        return [value.numpy() for value in run(*batch)] if tensors else []

    def _is_alike(self, dtype: tf.DType, one: np.ndarray, other: np.ndarray) -> bool:
        expected = np.concatenate([one[1:], one[1:2]]) if self._examples > 1 else one
        if dtype not in TOLERANCE:
            return np.array_equal(expected, other)
        expected, found = expected.astype(np.float64), other.astype(np.float64)
        finite = np.abs(expected[np.isfinite(expected)])
        return np.allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * finite.max(initial=0.0), equal_nan=True)

    def _moved(self, value: Any) -> Any:
        if self._examples == 1:
            return value
        if isinstance(value, tf.SparseTensor):
            length, *rest = map(int, value.dense_shape)
            sides = [
                tf.sparse.slice(value, [start, *[0] * len(rest)], [n, *rest]) for start, n in ((1, length - 1), (1, 1))
            ]
            return tf.sparse.concat(0, sides)
        return _concat([value[1:], value[1:2]]) if value.shape.rank else value


def flat(batch: Any) -> list[tf.Tensor]:
    """Return the tensors of a batch, as a traced function takes them."""
    return [value for value in tf.nest.flatten(batch, expand_composites=True) if value is not None]


def _concat(values: list[Any]) -> Any:
    return tf.sparse.concat(0, values) if isinstance(values[0], tf.SparseTensor) else tf.concat(values, 0)
