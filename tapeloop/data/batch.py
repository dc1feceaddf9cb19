"""Batches: structures of tensors with the examples as the first dimension, in which a missing member is None."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tapeloop._backend.assertions import require
from tapeloop.errors import DataError


def tensors_in(structure: Any, *, apart: bool = False) -> list[Any]:
    """List the tensors of a structure, without its missing members.

    Args:
        structure: The structure.
        apart: Whether ragged and sparse tensors are taken apart, as in the arguments of a traced function.
    """
    return [value for value in tf.nest.flatten(structure, expand_composites=apart) if value is not None]


def map_tensors(function: Callable[[Any], Any], structure: Any) -> Any:
    """Apply a function to each tensor of a structure; a missing member stays missing."""
    return tf.nest.map_structure(lambda value: None if value is None else function(value), structure)


def shapes(structure: Any) -> str:
    """Describe the shapes and dtypes of a structure of tensors: `(32, 10) float32`."""
    described = [f"{_shape(value)} {tf.as_dtype(value.dtype).name}" for value in tensors_in(structure)]
    if not described:
        return "missing"
    return described[0] if len(described) == 1 else f"[{', '.join(described)}]"


def _shape(value: Any) -> str:
    # Data may declare less than a shape: of such a tensor `tuple(shape)` would fail.
    known = not isinstance(value.shape, tf.TensorShape) or value.shape.rank is not None
    return str(tuple(value.shape)) if known else "of unknown shape,"


def spec_of(batch: Any) -> Any:
    """Return the signature of a batch, or of any structure of tensors."""
    return map_tensors(tf.type_spec_from_value, batch)


def open_spec_of(batch: Any) -> Any:
    """Return the signature of batches like this one with any number of examples; see `sized_spec_of`."""
    # A smaller last batch then costs no trace.
    return sized_spec_of(batch, None)


def sized_spec_of(batch: Any, examples: int | None) -> Any:
    """Return the signature of batches like this one with so many examples.

    Args:
        batch: A structure of tensors, or of their signatures.
        examples: The number of examples; None leaves it open.
    """

    def sized(value: Any) -> tf.TypeSpec:
        spec = value if isinstance(value, tf.TypeSpec) else tf.type_spec_from_value(value)
        # A scalar has no examples, whose number could be set.
        shape = [examples, *spec.shape[1:]] if spec.shape.rank else spec.shape
        # Without its ragged rank, the signature would be that of a tensor with another number of ragged dimensions.
        if isinstance(spec, tf.RaggedTensorSpec):
            return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
        return type(spec)(shape, spec.dtype)

    return map_tensors(sized, batch)


def rows_of(value: Any, start: Any, size: Any) -> Any:
    """Return some examples of a tensor that follow on one another.

    Args:
        value: A tensor, ragged or sparse ones too, with the examples first.
        start: The first of them: a number, or a tensor.
        size: How many, likewise.
    """
    # `tf.sparse` has no indexing, and wants its places in int64.
    if isinstance(value, tf.SparseTensor):
        rest = tf.shape(value, out_type=tf.int64)[1:]
        first = tf.concat([[tf.cast(start, tf.int64)], tf.zeros_like(rest)], 0)
        return tf.sparse.slice(value, first, tf.concat([[tf.cast(size, tf.int64)], rest], 0))
    if isinstance(value, tf.RaggedTensor):
        return value[start : start + size]
    # By size and not from start to stop: XLA slices from anywhere, but no other number than one that is known.
    rest = [tf.shape(value)[axis] if length is None else length for axis, length in enumerate(value.shape)][1:]
    return tf.slice(value, [start, *[0] * len(rest)], [size, *rest])


@dataclass(frozen=True)
class Share:
    """Which part of the examples of a batch one of several devices computes: they differ by one at most.

    Attributes:
        number: The number of the device, counted from 0.
        of: How many devices share the batch.
        least: How many examples the batch must have: each device computes on one or more.
    """

    number: int
    of: int
    least: int = 1

    def bounds(self, examples: Any) -> tuple[Any, Any]:
        """Return the first example of the share and the first behind it, of so many: a number, or a tensor."""
        # What is left over is for the first: where there are fewer examples than devices, the first has one.
        start, stop = (number * examples + self.of - 1 for number in (self.number, self.number + 1))
        return start // self.of, stop // self.of

    def rows(self, batch: Any) -> Any:
        """Return the share's examples of a batch; what has no dimensions is in every share."""
        if self.of == 1:
            return batch
        start, stop = self.bounds(self._checked(batch))

        def part_of(value: Any) -> Any:
            is_scalar = not isinstance(value, tf.SparseTensor) and not value.shape.rank
            return value if is_scalar else rows_of(value, start, stop - start)

        return map_tensors(part_of, batch)

    def _checked(self, batch: Any) -> Any:
        """Return how many examples a batch has that can be shared.

        Raises:
            DataError: It cannot; where that shows only when the step runs, the step fails.
        """
        tensors = [value for value in tensors_in(batch) if value.shape.rank]
        apart = "Examples must be the first dimension of each tensor of a batch that devices share. Received:"
        if len({value.shape[0] for value in tensors} - {None}) > 1:
            raise DataError(f"{apart} {shapes(tensors)}.")
        examples = examples_of(batch)
        if isinstance(examples, int) and examples < self.least:
            raise DataError(f"A batch of {examples} cannot be shared by {self.least} devices. Make it larger.")
        sizes = [tf.shape(value, out_type=tf.int64)[0] for value in tensors if value.shape[0] is None]
        checks = [require(tf.equal(size, sizes[0]), apart, sizes[0], "and", size) for size in sizes[1:]]
        if sizes:
            said = "A batch of", sizes[0], f"cannot be shared by {self.least} devices."
            checks.append(require(sizes[0] >= self.least, *said))
        with tf.control_dependencies(checks):
            return examples if isinstance(examples, int) else tf.identity(examples)


def examples_of(batch: Any) -> Any:
    """Return how many examples a batch has: a number, or a tensor if it is known only when the step runs.

    Raises:
        DataError: No tensor of the batch has a first dimension.
    """
    for value in tensors_in(batch):
        # A scalar among the inputs, such as a temperature, has no examples to count.
        if value.shape.rank:
            return tf.shape(value)[0] if value.shape[0] is None else value.shape[0]
    raise DataError(f"A batch must hold a tensor with the batch as its first dimension. Received: {shapes(batch)}.")


def check_examples(arrays: Sequence[Any], name: str) -> None:
    """Check that arrays have the same number of examples, and at least one.

    Args:
        arrays: The arrays.
        name: What they are called in errors.

    Raises:
        DataError: They have not.
    """
    lengths = {array.shape[0] if len(array.shape) else None for array in arrays}
    if len(lengths) != 1 or None in lengths:
        raise DataError(
            f"The arrays of {name} must have the same number of examples, as their first dimension. "
            f"Received: {shapes(arrays[:6])}{' and more' * (len(arrays) > 6)}. Lists are taken for several "
            "arrays: make one of them with `np.asarray`."
        )
    if lengths == {0}:
        raise DataError(
            f"{name[:1].upper()}{name[1:]} is empty: its arrays have no examples. Received: {shapes(arrays)}."
        )


def after(batch: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no op of a graph runs before a batch is there.

    When an iterator comes to its end, no batch comes, but an op that takes nothing of the batch, such as
    `counter.assign_add(1)`, would still run: once too often.
    """
    # TensorFlow drops a control edge from a tensor that the op takes anyway, and functions that the op calls would then
    # not wait: an op between them keeps the edge.
    return tf.control_dependencies([tf.group(*tensors_in(batch, apart=True))])


def as_tensors(batch: Any, name: str) -> Any:
    """Return a structure with its arrays as tensors; those of float64 get Keras' float type.

    Args:
        batch: A structure of arrays, tensors, or sparse matrices of SciPy.
        name: What the batch is called in errors.

    Raises:
        DataError: An array cannot be a tensor.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
            return value
        if hasattr(value, "tocoo"):  # a sparse matrix of SciPy
            # TensorFlow's sparse ops take int64 indices in row-major order, which SciPy does not promise.
            coo = value.tocoo()
            entries = coo.astype(keras.config.floatx()) if coo.dtype == np.float64 else coo
            indices = np.stack([entries.row, entries.col], 1).astype(np.int64)
            return tf.sparse.reorder(tf.SparseTensor(indices, entries.data, entries.shape))
        # float64 is NumPy's default and no choice of the user's: TensorFlow refuses to mix it with float32.
        array = np.asarray(value)
        try:
            return tf.convert_to_tensor(array.astype(keras.config.floatx()) if array.dtype == np.float64 else array)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"In {name}, {type(value).__name__} of the dtype `{array.dtype}` and the shape {array.shape} cannot be "
                f"a tensor: {error}. Give its numbers one dtype, as by `.astype('float32')`, and its rows one length."
            ) from error

    return map_tensors(convert, batch)


class Features(NamedTuple):
    """A batch of precomputed features, which a step takes instead of a batch of the data.

    Attributes:
        tensors: The tensors at which the step was cut.
    """

    tensors: tuple[Any, ...]
