"""The order in which the examples of arrays and the batches of a `PyDataset` come."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sampler:
    """The order of examples, epoch after epoch.

    The order of an epoch follows from the seed and the epoch's number alone, so that two fits see the orders of one.

    Attributes:
        shuffle: Whether each epoch has an order of its own.
        seed: The seed of the orders.
    """

    def __init__(self, shuffle: bool, seed: int | None = None, epoch: int = 0) -> None:
        """Choose the orders.

        Args:
            shuffle: Whether each epoch has an order of its own; otherwise, examples come as they lie.
            seed: The seed of the orders; None draws a seed from NumPy's global state, if there is anything to shuffle.
            epoch: The number of the first epoch, counted from 0.
        """
        self.shuffle = shuffle
        if seed is None:
            seed = int(np.random.randint(2**31)) if shuffle else 0
        self.seed = seed
        self._epoch = epoch

    def next_order(self, size: int) -> Any:
        """Return the indices of `size` examples in the order of the next epoch."""
        generator = self._next_generator()
        return generator.permutation(size) if self.shuffle else np.arange(size)

    def next_seed(self) -> int:
        """Return a seed for the next epoch, for `tf.data` to shuffle by."""
        return int(self._next_generator().integers(2**31))

    def skip(self, epochs: int) -> None:
        """Leave out the orders of the next epochs."""
        self._epoch += epochs

    def _next_generator(self) -> np.random.Generator:
        self._epoch += 1
        # A generator for each epoch, and not one for all: a run that goes on in a second fit must see the orders that
        # it would have seen in one.
        return np.random.default_rng([self.seed, self._epoch - 1])
