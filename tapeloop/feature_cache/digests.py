"""What features depend on, as digests: of arrays, of the examples of a batch, of texts."""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.data.array_source import lies_in_file

CHUNK_BYTES = 2**24
FORMAT = "3"  # of the files; features in another format are computed anew


@dataclass(frozen=True)
class CacheKey:
    """All that features depend on: they may be used if each of these is the same.

    Attributes:
        data: The digest of the data.
        computation: The digest of the graph before the cut.
        weights: The digest of the values that it captures.
        versions: The versions of the libraries, the kind of device and its precision.
        class_weight: The weights of classes, which become sample weights.
        views: How many passes over the data are kept.
        format: The format of the files.
    """

    data: str
    computation: str
    weights: str
    versions: str
    class_weight: str
    views: int
    format: str = FORMAT

    def differences(self, other: CacheKey) -> list[str]:
        """Return the names of the attributes that differ."""
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name)]


def of_texts(texts: Iterable[str]) -> str:
    """Return the digest of some texts."""
    return of_bytes(b"".join(f"{len(text)}:".encode() + text.encode() for text in texts))


def of_arrays(structure: Any) -> str:
    """Return the digest of a structure of arrays: of their dtypes, shapes and contents, read in slices."""
    kinds, slices = list[str](), list[tuple[Any, Any]]()
    for array in _parts(structure):
        shape, dtype = tuple(array.shape), tf.as_dtype(array.dtype)
        kinds.append(f"{dtype.name} {shape}")
        # Arrays in files may be larger than memory, so they are read in slices.
        rows = max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * max(1, dtype.size)))
        is_small = not shape or shape[0] <= rows
        slices += [(array, ...)] if is_small else [(array, slice(n, n + rows)) for n in range(0, shape[0], rows)]

    def digest(part: tuple[Any, Any]) -> str:
        return of_bytes(_bytes(part[0][part[1]]))

    # Hashing releases the lock of the interpreter; for the 260 small weights of a MobileNetV2, handing them to threads
    # takes longer than hashing them.
    large = [part for part in slices if part[1] is not ...]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(digest, large)
        small = [digest(part) for part in slices if part[1] is ...]
        return of_texts([*kinds, *small, *found])


def of_examples(batch: Any) -> list[str]:
    """Return a digest for each example of a batch; a single one if its examples do not stand apart."""
    values = [value for value in tf.nest.flatten(batch) if value is not None]
    have_rows = all(isinstance(value, (tf.Tensor, np.ndarray)) and value.shape for value in values)
    if not have_rows or len({value.shape[0] for value in values}) != 1:
        return [of_arrays(batch)]
    arrays = [np.asarray(value) for value in values]
    # Equal bytes of another dtype or shape are another example.
    kinds = " ".join(f"{array.dtype} {array.shape[1:]}" for array in arrays).encode()
    return [of_bytes(kinds + b"".join(map(_bytes, row))) for row in zip(*arrays)]


def of_bytes(content: bytes) -> str:
    """Return the digest of some bytes. Processors have instructions for SHA-256."""
    return hashlib.sha256(content, usedforsecurity=False).hexdigest()


def _parts(structure: Any) -> Iterator[Any]:
    """Give the arrays of a structure, composite ones in their parts; an empty array for what is missing."""
    for value in tf.nest.flatten(structure, expand_composites=True):
        if hasattr(value, "tocoo"):  # a sparse matrix of SciPy
            coo = value.tocoo()
            yield from (coo.row, coo.col, coo.data, np.asarray(coo.shape))
        elif isinstance(value, (tf.Tensor, tf.Variable)) or lies_in_file(value):
            yield value  # read slice by slice, never as a whole
        else:
            yield np.zeros(0) if value is None else np.asarray(value)


def _bytes(value: Any) -> bytes:
    array = np.asarray(value)
    # The bytes of strings and objects are pointers.
    return repr(array.tolist()).encode() if array.dtype.kind in "OSU" else array.tobytes()
