"""Data as a user gave it, of which batches can be made again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tapeloop.data.class_weight import ClassWeights, class_weights_of
from tapeloop.data.loader import DataLoader, as_loader, is_arrays
from tapeloop.data.sampler import Sampler


@dataclass(frozen=True)
class DataSpec:
    """Data, and how it is to be gone through.

    Attributes:
        name: What it is called in errors.
        data: The data itself.
        batch_size: Examples per batch, for arrays.
        steps: What the user calls the number of batches per epoch, and how many there are to be.
        class_weight: The weights of examples by the class of their target.
        shuffle: Whether arrays, and the batches of a `PyDataset`, come in another order each epoch.
        seed: By what they are shuffled.
    """

    name: str
    data: Any
    batch_size: int
    steps: tuple[str, int | None]
    class_weight: Mapping[int, float] | None = None
    shuffle: bool = False
    seed: int | None = 0

    @property
    def is_arrays(self) -> bool:
        """Whether it is arrays, of which any example can be had."""
        return is_arrays(self.data)

    @property
    def is_sparse(self) -> bool:
        """Whether there are sparse ones among its arrays."""
        parts = tf.nest.flatten(self.data) if self.is_arrays else []
        return any(isinstance(part, tf.SparseTensor) or hasattr(part, "tocoo") for part in parts)

    @property
    def shuffles_batches(self) -> bool:
        """Whether its batches, and not its examples, come in another order each epoch."""
        return self.shuffle and isinstance(self.data, keras.utils.PyDataset)

    @property
    def class_weights(self) -> ClassWeights | None:
        """The weights of examples by class, as tensors."""
        return None if self.class_weight is None else class_weights_of(self.class_weight)

    def orders(self, epoch: int) -> Sampler:
        """Return the orders of epochs from this one on."""
        return Sampler(self.shuffle, self.seed, epoch)

    def batches(self, orders: Sampler | None = None) -> DataLoader:
        """Return batches of it, by default in the order in which it lies.

        Raises:
            DataError, ValueError: As `as_loader` does.
        """
        return as_loader(
            self.data,
            batch_size=self.batch_size,
            orders=orders,
            steps=self.steps,
            class_weight=self.class_weight,
            name=self.name,
        )
