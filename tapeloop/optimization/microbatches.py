"""In how many pieces batches are cut."""

from __future__ import annotations

import logging

from tapeloop._validation import whole_number

_LOG = logging.getLogger("tapeloop")


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
        before, self.count = self.count, min(2 * self.count, examples)
        _LOG.warning("Out of memory with microbatches=%d: going on with microbatches=%d.", before, self.count)
