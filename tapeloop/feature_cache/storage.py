"""Where features are kept: in memory, or in files that are there wholly or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf

from tapeloop.feature_cache import digests
from tapeloop.feature_cache.digests import CacheKey
from tapeloop.feature_cache.known_digests import KnownDigests

SHARE = 0.5  # of the free memory, which features may take
ABANDONED_AFTER_S = 24 * 3600  # after which a partial file that nothing was written to is nobody's
_SUFFIX = ".features"
_WORKING = ".writing-"  # what the names of partial files begin with
_LENGTH_BYTES, _DIGEST_BYTES = 8, 64
_LOG = logging.getLogger("tapeloop")


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """The features of some data.

    Attributes:
        arrays: Tensors or arrays with the examples first, those of one pass over the data after the other.
        key: What they depend on.
        sizes: How many examples each batch of a pass had.
        examples: The digests of the examples in the order of the features; empty for arrays.
        shuffled: Whether the data came in another order when it was gone through again.
    """

    arrays: tuple[Any, ...]
    key: CacheKey
    sizes: tuple[int, ...]
    examples: tuple[str, ...]
    shuffled: bool

    def in_pass(self, number: int) -> tuple[Any, ...]:
        """Return the features of one pass over the data, counted from 0 and around."""
        rows = sum(self.sizes)
        start = rows * (number % self.key.views)
        return self.arrays if self.key.views == 1 else tuple(part[start : start + rows] for part in self.arrays)


class Writer:
    """Takes features in batch by batch, and writes all tensors of an example side by side."""

    def __init__(self, file: BinaryIO, keep: Callable[[BinaryIO, dict[str, Any]], CachedFeatures]) -> None:
        """Write to a file, which `keep` makes features of when all are there."""
        self._file = file
        self._keep = keep
        self._tensors: list[tuple[str, tuple[int, ...]]] = []

    def add(self, rows: Sequence[np.ndarray]) -> None:
        """Write the features of a batch, the examples first."""
        # Rows of records rather than an array for each tensor: any order of examples reads each from one place, and
        # batches can be appended to a single file. `tf.data`'s `save` could only be read as a stream.
        self._tensors = [(tf.as_dtype(row.dtype).name, row.shape[1:]) for row in rows]
        records = np.empty(len(rows[0]), _record(self._tensors))
        for number, row in enumerate(rows):
            records[str(number)] = row
        self._file.write(records.tobytes())

    def finish(self, key: CacheKey, sizes: Sequence[int], examples: Sequence[str], shuffled: bool) -> CachedFeatures:
        """Keep what was written, and return it; see `CachedFeatures`."""
        description = {"sizes": sizes, "examples": examples, "shuffled": shuffled, "tensors": self._tensors}
        return self._keep(self._file, {**description, "key": dataclasses.asdict(key)})


class Memory:
    """Features in memory: the latest of each data set. Names are `DATA-COMPUTATION-CONTENT`.

    Attributes:
        digests: What is known of data and weights, also if features are kept in files.
    """

    def __init__(self) -> None:
        self.digests = KnownDigests()
        self._kept: dict[str, CachedFeatures] = {}

    def find(self, name: str) -> CachedFeatures | None:
        """Return the features that are kept under a name."""
        return self._kept.get(name)

    def room(self) -> tuple[float, str]:
        """Return how many bytes of features may be kept, and what to say if there are more."""
        free = free_memory()
        return SHARE * free, (
            f"of memory {free:,} bytes are free, of which the cache takes {SHARE:.0%} at most. Give `feature_cache` a "
            "path to keep them in files, or leave it out."
        )

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """Give a writer of features to be kept under a name. Those of the same data go now, to make room."""
        of_the_same_data = name.partition("-")[0]
        # Only the latest: a fit with other weights or another phase would otherwise keep twice the memory.
        for other in [other for other in self._kept if other.partition("-")[0] == of_the_same_data]:
            del self._kept[other]
        yield Writer(io.BytesIO(), functools.partial(self._keep, name))

    def _keep(self, name: str, file: BinaryIO, description: dict[str, Any]) -> CachedFeatures:
        file.seek(0)
        records = np.frombuffer(file.read(), _record(description["tensors"]))
        self._kept[name] = _features(records, description)
        return self._kept[name]


class Files:
    """Features in files, one for each name. Processes and threads may share the folder.

    Each writes a partial file of its own and renames it when it is complete, which replaces the file of that name at
    once. Who has opened that file goes on reading it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the folder, which is made when there is something to keep."""
        self._folder = pathlib.Path(folder).expanduser()

    def find(self, name: str) -> CachedFeatures | None:
        """Return the features that are kept under a name; a damaged file is named in a warning and not returned."""
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            return _read(path) if path.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("The feature cache in %s is damaged (%s): it is computed anew.", path, error)
            return None

    def room(self) -> tuple[float, str]:
        """Return how many bytes of features may be kept, and what to say if there are more."""
        # The folder may not be there yet; the disk is that of the nearest parent.
        there = next(place for place in (self._folder, *self._folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        return free, (
            f"on the disk of {self._folder} {free:,} bytes are free. Give `feature_cache` a path on another, or leave "
            "it out."
        )

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """Give a writer of features to be kept under a name. If it is not finished, nothing is left of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{_WORKING}*"):  # by a process that was killed, here or on another host
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER_S:
                    left.unlink()
        partial = self._folder / f"{_WORKING}{uuid.uuid4().hex}"
        try:
            with open(partial, "wb") as file:
                yield Writer(file, functools.partial(self._keep, name))
        finally:
            partial.unlink(missing_ok=True)

    def _keep(self, name: str, file: BinaryIO, description: dict[str, Any]) -> CachedFeatures:
        seal(file, description)
        # Read before it is renamed: afterwards another process may have put its own file there.
        features = _read(pathlib.Path(file.name))
        os.replace(file.name, self._folder / f"{name}{_SUFFIX}")
        return features


def seal(file: BinaryIO, description: dict[str, Any]) -> None:
    """Complete a file of rows: append their description, its length, and the digest of all before it."""
    content = json.dumps(description).encode()
    file.write(content + len(content).to_bytes(_LENGTH_BYTES, "little"))
    file.flush()
    # Over the features too: a flipped bit in them would go into training unseen.
    file.write(digests.of_arrays(np.memmap(file.name, np.uint8, "r")).encode())
    file.flush()
    # On the disk before the file gets its name, or a crash could leave a name for half a file.
    os.fsync(file.fileno())


def _read(path: pathlib.Path) -> CachedFeatures:
    """Return the features in a file: read if there is memory for them, else left there.

    Raises:
        ValueError: The file is not as it was written.
    """
    content = np.memmap(path, np.uint8, "r")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:].tobytes()
    if digests.of_arrays(body).encode() != digest:
        raise ValueError("it is not as it was written")
    # What follows trusts the file: the digest is that of all before it.
    length = int.from_bytes(body[-_LENGTH_BYTES:].tobytes(), "little")
    description = json.loads(body[-_LENGTH_BYTES - length : -_LENGTH_BYTES].tobytes())
    record, rows = _record(description["tensors"]), sum(description["sizes"]) * description["key"]["views"]
    if not rows or rows * record.itemsize != len(body) - _LENGTH_BYTES - length:
        raise ValueError(f"it has not the {rows} rows of its batches")
    records = np.memmap(path, record, "r", shape=(rows,))
    return _features(records, description, stay=records.nbytes > SHARE / 2 * free_memory())


def _record(tensors: Sequence[tuple[str, Sequence[int]]]) -> np.dtype[Any]:
    """Return the dtype of one example's features, given the dtype and shape of each."""
    return np.dtype(
        [(str(n), tf.as_dtype(name).as_numpy_dtype, tuple(shape)) for n, (name, shape) in enumerate(tensors)]
    )


def _features(records: np.ndarray, description: Mapping[str, Any], *, stay: bool = False) -> CachedFeatures:
    arrays = tuple(records[name] if stay else tf.constant(records[name]) for name in records.dtype.names or ())
    sizes, examples = tuple(description["sizes"]), tuple(description["examples"])
    return CachedFeatures(arrays, CacheKey(**description["key"]), sizes, examples, description["shuffled"])


def free_memory() -> float:
    """Return how many bytes of memory are free, or infinity if the system does not say."""
    try:
        # Not what is unused: the system gives back what it uses for caching files.
        said = pathlib.Path("/proc/meminfo").read_text()
        return 1024 * int(said.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return math.inf
