"""Digests that are kept from one fit to the next, as long as a quick look shows no change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._backend.fingerprint import fingerprint
from tapeloop.feature_cache.digests import of_arrays
from tapeloop.feature_cache.frontier import Cut

SAMPLED = 256  # rows of an array that are looked at


@dataclass(frozen=True)
class _Seen:
    """What was digested.

    Attributes:
        arrays: The arrays.
        sample: The digest of some of their rows.
        digest: The digest of all.
    """

    arrays: tuple[weakref.ref[Any], ...]
    sample: str
    digest: str

    def is_of(self, arrays: Sequence[Any]) -> bool:
        """Tell whether it is of these very arrays."""
        return len(arrays) == len(self.arrays) and all(ref() is one for ref, one in zip(self.arrays, arrays))


class KnownDigests:
    """The digests of data and of weights that a trainer's fits have found."""

    def __init__(self) -> None:
        self._data: dict[str, _Seen] = {}
        self._weights: weakref.WeakKeyDictionary[Cut, tuple[bytes, str]] = weakref.WeakKeyDictionary()

    def of_data(self, name: str, structure: Any) -> str:
        """Return the digest of a structure of arrays; of the same arrays in memory, that of the last time.

        An array that was changed in place is noticed if one of 256 rows, evenly spaced, has changed.

        Args:
            name: What the data is called.
            structure: The arrays.
        """
        arrays = [value for value in tf.nest.flatten(structure) if value is not None]
        # Of a subclass, such as an array in a file, nobody knows what it is by its identity.
        if not all(type(array) is np.ndarray or isinstance(array, tf.Tensor) for array in arrays):
            return of_arrays(structure)
        # A tensor cannot be changed.
        sample = of_arrays([_some_rows(array) for array in arrays if isinstance(array, np.ndarray)])
        known = self._data.get(name)
        if known is not None and known.sample == sample and known.is_of(arrays):
            return known.digest
        found = of_arrays(structure)
        self._data[name] = _Seen(tuple(map(weakref.ref, arrays)), sample, found)
        return found

    def of_weights(self, cut: Cut) -> tuple[bytes, str]:
        """Return the fingerprint of the weights before a cut, and their digest."""
        found = fingerprint(cut.weights)
        known = self._weights.get(cut)
        if known is None or known[0] != found:
            known = self._weights[cut] = found, of_arrays(cut.captured)
        return known


def _some_rows(array: np.ndarray) -> np.ndarray:
    return array[:: max(1, len(array) // SAMPLED)] if array.ndim else array
