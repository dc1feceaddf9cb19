"""Cutting a batch in pieces that are computed one after the other, and averaging what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tapeloop._backend.assertions import require
from tapeloop.data.batch import examples_of, shapes, spec_of
from tapeloop.errors import DataError
from tapeloop.optimization.microbatches import Microbatches

SEVERAL = (
    "A batch whose tensors have different first dimensions cannot be cut in micro-batches:",
    ". Make the examples the first dimension of each, or set `microbatches=1`.",
)


@dataclass(frozen=True)
class Pieces:
    """Some pieces of a batch of one size, which follow on one another.

    Attributes:
        count: How many.
        size: How many examples each has: a number, or None where it is known only when the step runs.
        start: The first example of the first.
    """

    count: int
    size: int | None
    start: int


def check_alike(batch: Any) -> None:
    """Check that every tensor of a batch has the examples as its first dimension, as far as that is known.

    Raises:
        DataError: Their numbers differ, and it cannot be said how they are cut.
    """
    tensors = _cuttable(batch)
    if len({value.shape[0] for value in tensors} - {None}) > 1:
        raise DataError(f"{SEVERAL[0]} {shapes(tensors)}{SEVERAL[1]}")


def checked(batch: Any, count: int) -> Any:
    """Return a batch whose size is known only when the step runs, which then finds out whether it can be cut.

    Where it cannot, the step fails before anything has moved.
    """
    sizes = [tf.shape(value, out_type=tf.int64)[0] for value in _cuttable(batch)]
    checks = [require(tf.equal(size, sizes[0]), SEVERAL[0], sizes[0], "and", size, SEVERAL[1]) for size in sizes[1:]]
    checks.append(require(sizes[0] >= count, "A batch of", sizes[0], _too_few(count)))
    with tf.control_dependencies(checks):
        return tf.nest.map_structure(lambda value: None if value is None else tf.identity(value), batch)


def _cuttable(batch: Any) -> list[Any]:
    return [value for value in tf.nest.flatten(batch) if value is not None and value.shape.rank]


def _too_few(count: int) -> str:
    return (
        f"examples cannot be cut in {count} micro-batches. Make the batches larger, drop the remainder, or set "
        "`microbatches` to their number or less."
    )


def check_pieces(microbatches: Microbatches, fewest: int | None) -> None:
    """Check that the smallest of the batches to come, where it is known, is large enough to be cut.

    Raises:
        DataError: It is not.
    """
    if fewest is not None and not microbatches.adapts:
        plan(fewest, microbatches.count)


def plan(examples: int | None, count: int) -> list[Pieces]:
    """Say how a batch is cut: the pieces differ in size by one example at most, larger ones first.

    Args:
        examples: How many examples it has, or None where that is known only when the step runs.
        count: In how many pieces.

    Raises:
        DataError: It has fewer examples than pieces.
    """
    if examples is None:
        return [Pieces(count, None, 0)]
    size, larger = divmod(examples, count)
    if not size:
        raise DataError(f"A batch of {examples} {_too_few(count)}")
    pieces = [Pieces(larger, size + 1, 0), Pieces(count - larger, size, larger * (size + 1))]
    return [some for some in pieces if some.count]


def piece(batch: Any, pieces: Pieces, index: Any, examples: tf.Tensor) -> Any:
    """Return one piece of a batch.

    Args:
        batch: A structure of tensors, with the examples first; what has no dimensions is in every piece.
        pieces: Of which pieces.
        index: Which of them.
        examples: How many examples the batch has.
    """
    if pieces.size is None:
        each, larger = examples // pieces.count, examples % pieces.count
        start, size = index * each + tf.minimum(index, larger), each + tf.cast(index < larger, examples.dtype)
    else:
        start, size = pieces.start + index * pieces.size, pieces.size

    def cut(value: Any) -> Any:
        if isinstance(value, tf.SparseTensor):
            rest = tf.shape(value, out_type=tf.int64)[1:]
            first = tf.concat([[tf.cast(start, tf.int64)], tf.zeros_like(rest)], 0)
            return tf.sparse.slice(value, first, tf.concat([[tf.cast(size, tf.int64)], rest], 0))
        if value is None or not value.shape.rank:
            return value
        if isinstance(value, tf.RaggedTensor):
            return value[start : start + size]
        # XLA slices from anywhere, but no other number of examples than one that is known.
        rest = [tf.shape(value)[axis] if length is None else length for axis, length in enumerate(value.shape)][1:]
        part = tf.slice(value, [start, *[0] * len(rest)], [size, *rest])
        return tf.ensure_shape(part, [pieces.size, *value.shape[1:]])

    return tf.nest.map_structure(cut, batch)


def piece_spec(batch: Any, size: int | None) -> Any:
    """Return the signature of a piece of a batch, of so many examples."""

    def spec(value: Any) -> Any:
        if value is None or not value.shape.rank:
            return spec_of(value)
        shape = [size, *value.shape[1:]]
        if isinstance(value, tf.RaggedTensor):
            return tf.RaggedTensorSpec(shape, value.dtype, value.ragged_rank, value.row_splits.dtype)
        kind = tf.SparseTensorSpec if isinstance(value, tf.SparseTensor) else tf.TensorSpec
        return kind(shape, value.dtype)

    return tf.nest.map_structure(spec, batch)


def zeros_of(shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
    """Return zeros to add to in a traced loop.

    TensorFlow would keep constant zeros in memory for as long as the step lives, and copy them to add to them; whatever
    comes of a placeholder with a default is made anew.
    """
    return tf.fill(shape, tf.compat.v1.placeholder_with_default(tf.zeros((), dtype), ()))


class Computed(NamedTuple):
    """What comes of a batch, or of a piece of one.

    Attributes:
        mean: A structure of tensors that are means over examples.
        largest: A structure of tensors of which the largest of all pieces counts.
    """

    mean: Any
    largest: Any


def averaged(
    run: Callable[[Any, Pieces], Computed], batch: Any, examples: tf.Tensor, cuts: list[Pieces], zeros: Computed | None
) -> Computed:
    """Run a function on each piece of a batch, one after the other, and average what it returns by examples.

    Args:
        run: Takes a piece and how it was cut, and returns a structure of tensors.
        batch: The batch.
        examples: How many examples it has.
        cuts: How it is cut.
        zeros: Zeros of what `run` returns, to begin with in a graph; None where nothing is traced.
    """
    total = zeros
    for pieces in cuts:

        def add(index: Any, total: Any, pieces: Pieces = pieces) -> tuple[Any, Any]:
            part = piece(batch, pieces, index, examples)
            # The quotient of two whole numbers, exact to the precision of what it is multiplied with.
            share = tf.cast(examples_of(part), tf.float64) / tf.cast(examples, tf.float64)
            mean, largest = run(part, pieces)
            mean = tf.nest.map_structure(lambda value: value * tf.cast(share, value.dtype), mean)
            if total is not None:
                mean = tf.nest.map_structure(tf.add, total.mean, mean)
                largest = tf.nest.map_structure(tf.maximum, total.largest, largest)
            return index + 1, Computed(mean, largest)

        if zeros is None:
            for index in range(pieces.count):
                _, total = add(tf.constant(index), total)
        else:
            _, total = tf.while_loop(
                lambda index, _, pieces=pieces: index < pieces.count,
                add,
                (tf.constant(0), total),
                parallel_iterations=1,
                maximum_iterations=pieces.count,
            )
    assert total is not None
    return total
