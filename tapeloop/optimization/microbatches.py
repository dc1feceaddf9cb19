"""In how many pieces batches are cut, and how far the updates of a step have come."""

from __future__ import annotations

import logging

import tensorflow as tf

from tapeloop._validation import whole_number

_LOG = logging.getLogger("tapeloop")


class Microbatches:
    """In how many pieces batches are cut; with `"auto"`, in twice as many whenever a step runs out of memory.

    Attributes:
        count: In how many.
        adapts: Whether the number grows.
    """

    def __init__(self, count: int | str) -> None:
        """Check and keep the number.

        Raises:
            ValueError: It is neither a whole number of 1 or more nor `"auto"`.
        """
        self.adapts = isinstance(count, str) and count == "auto"
        self.count = 1 if self.adapts else whole_number("microbatches", count, 1)
        self._begun: tf.Variable | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """What it keeps."""
        return [] if self._begun is None else [self._begun]

    def prepare(self) -> None:
        """Make what is needed to note how far a step has come, before the first is traced."""
        if self.adapts and self._begun is None:
            self._begun = tf.Variable(0, trainable=False, name="begun")

    def begin(self) -> None:
        """Note that a step begins, of which nothing has moved."""
        if self._begun is not None:
            self._begun.assign(0)

    def mark(self, number: int) -> list[tf.Operation | tf.Tensor]:
        """Note, when the step runs, that its update of this number begins."""
        return [] if self._begun is None else [self._begun.assign(number)]

    def double(self, examples: int, updates: int, error: Exception) -> None:
        """Cut batches in twice as many pieces, after a step of so many updates ran out of memory.

        Raises:
            RuntimeError: Pieces of one example were too large, or the last update had begun.
        """
        if self._begun is not None and 0 < updates <= int(self._begun):
            raise RuntimeError(
                "The step ran out of memory while the last of its updates was being made: some variables have moved, "
                "others have not. Start again from what was saved, with `microbatches=2` or more from the beginning."
            ) from error
        if self.count >= examples:
            raise RuntimeError(
                f"The step ran out of memory with one example at a time, {self.count} micro-batches of a batch of "
                f"{examples}. Make the model or its inputs smaller, freeze more of it, or use `remat`."
            ) from error
        before, self.count = self.count, min(2 * self.count, examples)
        _LOG.warning("Out of memory with microbatches=%d: going on with microbatches=%d.", before, self.count)
