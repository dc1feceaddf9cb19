"""Cutting a batch in pieces that are computed one after the other, and averaging what they give."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend.assertions import require
from tapeloop._validation import whole_number
from tapeloop.data.batch import after, examples_of, map_tensors, rows_of, shapes, sized_spec_of, tensors_in
from tapeloop.errors import DataError
from tapeloop.step.context import Computed
from tapeloop.step.plan import StepPlan

_LOG = logging.getLogger("tapeloop")

SEVERAL = (
    "A batch whose tensors have different first dimensions cannot be cut in micro-batches:",
    ". Make the examples the first dimension of each, or set `microbatches=1`.",
)


class Microbatches:
    """In how many pieces batches are cut; with `"auto"`, in twice as many whenever a step on trial runs out of memory.

    Attributes:
        count: The number of pieces.
        adapts: Whether the number is found by trial.
    """

    def __init__(self, count: int | str) -> None:
        """Check and keep the number.

        Raises:
            ValueError: `count` is neither a whole number of 1 or more nor `"auto"`.
        """
        self.adapts = isinstance(count, str) and count == "auto"
        self.count = 1 if self.adapts else whole_number("microbatches", count, 1)

    def require_examples(self, examples: int | None) -> None:
        """Check that a batch of so many examples, if that is known, can be cut in so many pieces.

        Raises:
            DataError: It has fewer examples.
        """
        if examples is not None and not self.adapts:
            cut(examples, self.count)

    def double(self, examples: int, error: Exception) -> None:
        """Cut batches in twice as many pieces, after a step on so many examples ran out of memory.

        Raises:
            RuntimeError: Pieces of one example were too large.
        """
        if self.count >= examples:
            raise RuntimeError(
                f"The step ran out of memory with one example at a time, {self.count} micro-batches of a batch of "
                f"{examples}. Make the model or its inputs smaller, freeze more of it, or use `remat`."
            ) from error
        # A piece holds one example at least.
        before, self.count = self.count, min(2 * self.count, examples)
        _LOG.warning("Out of memory with microbatches=%d: going on with microbatches=%d.", before, self.count)


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
    # Lengths that are open are compared when the step runs; see `checked`.
    tensors = _cuttable(batch)
    if len({value.shape[0] for value in tensors} - {None}) > 1:
        raise DataError(f"{SEVERAL[0]} {shapes(tensors)}{SEVERAL[1]}")


def checked(batch: Any, count: int) -> Any:
    """Return a batch whose size is known only when the step runs, which then finds out whether it can be cut.

    Where it cannot, the step fails before anything has moved.
    """
    # Before anything is computed: in the middle of the pieces something might have moved.
    sizes = [tf.shape(value, out_type=tf.int64)[0] for value in _cuttable(batch)]
    checks = [require(tf.equal(size, sizes[0]), SEVERAL[0], sizes[0], "and", size, SEVERAL[1]) for size in sizes[1:]]
    checks.append(require(sizes[0] >= count, "A batch of", sizes[0], _too_few(count)))
    with tf.control_dependencies(checks):
        return map_tensors(tf.identity, batch)


def _cuttable(batch: Any) -> list[Any]:
    return [value for value in tensors_in(batch) if value.shape.rank]


def _too_few(count: int) -> str:
    return (
        f"examples cannot be cut in {count} micro-batches. Make the batches larger, drop the remainder, or set "
        "`microbatches` to their number or less."
    )


def cut(examples: int | None, count: int) -> list[Pieces]:
    """Say how a batch is cut: the pieces differ in size by one example at most, larger ones first.

    Args:
        examples: How many examples it has, or None where that is known only when the step runs.
        count: In how many pieces.

    Raises:
        DataError: It has fewer examples than pieces.
    """
    if examples is None:
        return [Pieces(count, None, 0)]
    # Uneven pieces differ by one example: a last piece of a few would make its gradient noisy and its trace another.
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
        # The sizes that `cut` gives, in tensors; of fewer examples than pieces, each is a piece.
        count = tf.minimum(pieces.count, examples)
        each, larger = examples // count, examples % count
        start, size = index * each + tf.minimum(index, larger), each + tf.cast(index < larger, examples.dtype)
    else:
        start, size = pieces.start + index * pieces.size, pieces.size

    def part_of(value: Any) -> Any:
        if not isinstance(value, tf.SparseTensor) and not value.shape.rank:
            return value
        part = rows_of(value, start, size)
        # The plan of a piece was made for its signature, with static lengths.
        return tf.ensure_shape(part, [pieces.size, *value.shape[1:]]) if isinstance(part, tf.Tensor) else part

    return map_tensors(part_of, batch)


def zeros_of(shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
    """Return zeros to add to in a traced loop.

    TensorFlow would keep constant zeros in memory for as long as the step lives, and copy them to add to them; whatever
    comes of a placeholder with a default is made anew.
    """
    return tf.fill(shape, tf.compat.v1.placeholder_with_default(tf.zeros((), dtype), ()))


def accumulate(plan_piece: Callable[[Any], StepPlan], spec: Any, count: int, *, at_most: bool = False) -> StepPlan:
    """Return a plan that computes a batch in pieces, one after the other, and averages what they give by examples.

    Args:
        plan_piece: Plans the step for pieces of a signature.
        spec: The signature of the batch.
        count: The number of pieces.
        at_most: Whether a batch with fewer examples is cut in pieces of one example.

    Raises:
        DataError: The batch has fewer examples than pieces, or cannot be cut.
    """
    check_alike(spec)
    examples = next(value.shape[0] for value in _cuttable(spec))
    cuts = cut(examples, count if examples is None or not at_most else min(count, examples))
    # Pieces have static shapes, of two sizes at most, so that XLA compiles them too.
    plans = {pieces.size: plan_piece(sized_spec_of(spec, pieces.size)) for pieces in cuts}
    # Both sizes compute the same, so that the zeros to begin with may be those of either.
    functions = tuple(function for plan in plans.values() for function in plan.functions)

    def compute(batch: Any) -> Computed:
        batch = batch if examples is not None else checked(batch, 1 if at_most else count)
        with after(batch):  # or what depends on nothing in it would run before it is found that it cannot be cut
            outputs = functions[-1].structured_outputs[:2]
            zeros = tf.nest.map_structure(lambda output: zeros_of(output.shape, _mean_dtype(output.dtype)), outputs)
            return _averaged(lambda part, size: plans[size].compute(part), batch, cuts, zeros)

    return dataclasses.replace(plans[cuts[-1].size], compute=compute, functions=functions)


def compute_in_pieces(compute: Callable[[Any], Computed], batch: Any, count: int) -> Computed:
    """Run a function eagerly on each piece of a batch, and average what it returns by examples."""
    check_alike(batch)
    return _averaged(lambda part, _: compute(part), batch, cut(examples_of(batch), count), None)


def _averaged(
    run: Callable[[Any, int | None], Computed], batch: Any, cuts: list[Pieces], zeros: tuple[Any, Any] | None
) -> Computed:
    """Run a function on each piece of a batch, and average what it returns by examples.

    Args:
        run: Takes a piece and its size.
        batch: The batch.
        cuts: How the batch is cut.
        zeros: Zeros of what `run` returns, to add to in a traced loop; None if nothing is traced.
    """
    total, examples = zeros, examples_of(batch)
    for pieces in cuts:

        def add(index: Any, total: Any, pieces: Pieces = pieces) -> tuple[Any, Any]:
            part = piece(batch, pieces, index, examples)
            # The quotient of two whole numbers, exact to the precision of what it is multiplied with.
            share = tf.cast(examples_of(part), tf.float64) / tf.cast(examples, tf.float64)
            mean, largest, _ = run(part, pieces.size)
            mean = tf.nest.map_structure(lambda value: _weighted(value, share), mean)
            if total is not None:
                mean = tf.nest.map_structure(tf.add, total[0], mean)
                # A float8 scale must cover the largest number of all pieces, which a mean of scales would not.
                largest = tf.nest.map_structure(tf.maximum, total[1], largest)
            return index + 1, (mean, largest)

        if zeros is None:
            for index in range(pieces.count):
                _, total = add(tf.constant(index), total)
        else:
            # One piece at a time: with two under way, a batch would take the memory that pieces are to save.
            _, total = tf.while_loop(
                lambda index, _, pieces=pieces: index < tf.minimum(pieces.count, examples),
                add,
                (tf.constant(0), total),
                parallel_iterations=1,
                maximum_iterations=pieces.count,
            )
    assert total is not None
    return Computed(*total, None)


def _weighted(value: Any, share: tf.Tensor) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    value = tf.cast(value, _mean_dtype(value.dtype))
    return value * tf.cast(share, value.dtype)


def _mean_dtype(dtype: tf.DType) -> tf.DType:
    """Return the type in which means over pieces are taken: of whole numbers, Keras' float type."""
    return dtype if dtype.is_floating else tf.as_dtype(keras.config.floatx())
