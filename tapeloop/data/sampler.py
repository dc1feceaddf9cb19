"""In which order examples and batches come."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sampler:
    """The order of examples in one epoch after the other.

    Attributes:
        shuffle: Whether each has an order of its own.
        seed: By what they are shuffled.
    """

    def __init__(self, shuffle: bool, seed: int | None = None, epoch: int = 0) -> None:
        """Shuffle by a seed from an epoch of this number on, or not; without a seed by one that NumPy draws."""
        self.shuffle = shuffle
        self.seed = int(np.random.randint(2**31)) if seed is None else seed
        self._epoch = epoch

    def next(self, size: int) -> Any:
        """Return the numbers of so many examples in the order of the next epoch."""
        generator = self._generator()
        return generator.permutation(size) if self.shuffle else np.arange(size)

    def next_seed(self) -> int:
        """Return a seed for the order of the next epoch, where another is to shuffle."""
        return int(self._generator().integers(2**31))

    def _generator(self) -> np.random.Generator:
        self._epoch += 1
        return np.random.default_rng([self.seed, self._epoch - 1])
