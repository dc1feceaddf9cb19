"""Telling by a number whether the values of arrays are the same."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np


def checksum(value: Any) -> int:
    """Return a number that changes with the bytes of an array, nearly always: NaN and -0.0 count too.

    Compiled into a graph, checksums of the weights of a MobileNetV2 took 2.8 s of tracing; `crc32` takes 20 ms.
    """
    return zlib.crc32(_bytes_of(value))


def digest(value: Any) -> str:
    """Return the SHA-256 of an array's dtype, shape and content; nobody has found two values with the same."""
    array = np.asarray(value)
    found = hashlib.sha256(f"{array.dtype} {array.shape}".encode(), usedforsecurity=False)
    found.update(_bytes_of(array))
    return found.hexdigest()


def _bytes_of(value: Any) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
