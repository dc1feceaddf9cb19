"""Where features are kept: in memory, or in files that are there wholly or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tapeloop.errors import CacheError
from tapeloop.feature_cache import fingerprint

FORMAT = "1"
SHARE = 0.5  # of the memory that is free, which features may take
_DESCRIPTION = "description.json"
_WORKING = ".writing-"  # what the names of folders begin with that are not complete
ATTEMPTS = 5
ABANDONED_AFTER_S = 24 * 3600  # after which a folder that nothing was written to is nobody's
_LOG = logging.getLogger("tapeloop")
Ingredients = Mapping[str, str]


@dataclass(frozen=True)
class CachedFeatures:
    """The features of some data.

    Attributes:
        arrays: Tensors or arrays with the examples first, those of one pass over the data after the other.
        sizes: How many examples each batch of a pass had.
        examples: The digests of the examples of the data, in the order of the first pass; empty for arrays.
        shuffled: Whether the data came in another order when it was gone through again.
    """

    arrays: tuple[Any, ...]
    sizes: tuple[int, ...]
    examples: tuple[str, ...]
    shuffled: bool

    def passed(self, number: int) -> tuple[Any, ...]:
        """Return the features of one pass over the data, counted from 0 and around."""
        rows = sum(self.sizes)
        start = rows * (number % max(1, len(self.arrays[0]) // rows))
        return self.arrays if len(self.arrays[0]) == rows else tuple(part[start : start + rows] for part in self.arrays)


class Writer(Protocol):
    """What takes features in, batch by batch."""

    def add(self, rows: list[np.ndarray]) -> None:
        """Take in the features of a batch."""

    def finish(self, ingredients: Ingredients, sizes: list[int], examples: list[str], shuffled: bool) -> CachedFeatures:
        """Keep them, and return them."""

    def abandon(self) -> None:
        """Leave nothing behind of what was taken in."""


class Memory:
    """Features in memory, the last of each data; names are `DATA-COMPUTATION-CONTENT`."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Ingredients, CachedFeatures]] = {}

    def find(self, name: str) -> tuple[Ingredients, CachedFeatures] | None:
        """Return what is kept under a name, with what went into it."""
        return self._kept.get(name)

    def check(self, features: int, said: str) -> None:
        """Check that so many bytes of features may be kept.

        Raises:
            CacheError: They do not fit.
        """
        free = free_memory()
        if free is not None and features > SHARE * free:
            raise CacheError(
                f"{said} come to {features:,} bytes, and of memory {free:,} bytes are free, of which the cache takes "
                f"{SHARE:.0%} at most. Give `feature_cache` a path to keep them in files, or leave it out."
            )

    def write(self, name: str) -> Writer:
        """Return what takes in features to be kept under a name; what was kept of the same data goes now."""
        of_the_same_data = name.partition("-")[0]
        for other in [other for other in self._kept if other.partition("-")[0] == of_the_same_data]:
            del self._kept[other]
        return _InMemory(self._kept, name)


class _InMemory:
    def __init__(self, kept: dict[str, tuple[Ingredients, CachedFeatures]], name: str) -> None:
        self._kept = kept
        self._name = name
        self._rows: list[list[np.ndarray]] = []

    def add(self, rows: list[np.ndarray]) -> None:
        self._rows.append(rows)

    def finish(self, ingredients: Ingredients, sizes: list[int], examples: list[str], shuffled: bool) -> CachedFeatures:
        arrays = []
        for place in range(len(self._rows[0])):
            arrays.append(tf.constant(np.concatenate([rows[place] for rows in self._rows])))
            for rows in self._rows:
                rows[place] = rows[place][:0]
        kept = CachedFeatures(tuple(arrays), tuple(sizes), tuple(examples), shuffled)
        self._kept[self._name] = ingredients, kept
        return kept

    def abandon(self) -> None:
        self._rows.clear()


class Files:
    """Features in files: a folder for each name, put in place when it is complete.

    Processes and threads may share the folder: each writes in one of its own, and the first to be complete is taken.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the folder, which is made when there is something to keep."""
        self._folder = pathlib.Path(folder).expanduser()

    def find(self, name: str) -> tuple[Ingredients, CachedFeatures] | None:
        """Return what is kept under a name, with what went into it; what is damaged is named and not returned."""
        place = self._folder / name
        if not place.is_dir():
            return None
        try:
            said = json.loads((place / _DESCRIPTION).read_text())
            if said.pop("digest") != _digest(said):
                raise ValueError("its description is not as it was written")
            rows = sum(said["sizes"]) * int(said["ingredients"]["views"])
            if not rows or not said["arrays"] or any(one["shape"][0] != rows for one in said["arrays"]):
                raise ValueError(f"its arrays have not the {rows} rows of its batches")
            arrays = tuple(_opened(place / one["file"], one) for one in said["arrays"])
            return said["ingredients"], CachedFeatures(
                arrays, tuple(said["sizes"]), tuple(said["examples"]), said["shuffled"]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("The feature cache in %s is damaged (%s): it is computed anew.", place, error)
            return None

    def check(self, features: int, said: str) -> None:
        """Check that so many bytes of features may be kept.

        Raises:
            CacheError: They do not fit.
        """
        there = next(place for place in (self._folder, *self._folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if features > free:
            raise CacheError(
                f"{said} come to {features:,} bytes, and on the disk of {self._folder} {free:,} bytes are free. Give "
                "`feature_cache` a path on another, or leave it out."
            )

    def write(self, name: str) -> Writer:
        """Return what takes in features to be kept under a name; what was kept under it goes when they are there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{_WORKING}*"):  # by a process that was stopped, here or on another host
            with contextlib.suppress(OSError):
                touched = max(each.stat().st_mtime for each in (left, *left.iterdir()))
                if time.time() - touched > ABANDONED_AFTER_S:
                    shutil.rmtree(left, ignore_errors=True)
        return _InFiles(self, self._folder, name)


class _InFiles:
    """Features on their way into files, in a folder that is nobody else's until it is complete."""

    def __init__(self, files: Files, folder: pathlib.Path, name: str) -> None:
        self._files = files
        self._folder = folder
        self._name = name
        self._making = pathlib.Path(tempfile.mkdtemp(prefix=_WORKING, dir=folder))
        self._making.chmod(0o755)
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[str] = []
        self._digests: list[Any] = []
        self._count = 0

    def add(self, rows: list[np.ndarray]) -> None:
        self._shapes = [row.shape[1:] for row in rows]
        self._dtypes = [tf.as_dtype(row.dtype).name for row in rows]
        self._digests = self._digests or [fingerprint.new() for _ in rows]
        self._count += len(rows[0])
        for number, (row, digested) in enumerate(zip(rows, self._digests)):
            content = row.tobytes()
            digested.update(content)
            with open(self._making / f"{number}.bin", "ab") as file:
                file.write(content)

    def abandon(self) -> None:
        shutil.rmtree(self._making, ignore_errors=True)

    def finish(self, ingredients: Ingredients, sizes: list[int], examples: list[str], shuffled: bool) -> CachedFeatures:
        arrays: list[dict[str, Any]] = []
        for number, (shape, dtype, digested) in enumerate(zip(self._shapes, self._dtypes, self._digests)):
            path = self._making / f"{number}.bin"
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            arrays.append(
                {"file": path.name, "shape": [self._count, *shape], "dtype": dtype, "digest": digested.hexdigest()}
            )
        said: dict[str, Any] = {
            "ingredients": dict(ingredients),
            "arrays": arrays,
            "sizes": sizes,
            "examples": examples,
        }
        said["shuffled"] = shuffled
        with open(self._making / _DESCRIPTION, "w") as file:
            json.dump({**said, "digest": _digest(said)}, file)
            file.flush()
            os.fsync(file.fileno())
        for _ in range(ATTEMPTS):
            if self._put_in_place(ingredients):
                break
        else:
            raise CacheError(
                f"The features could not be put at {self._folder / self._name}: others are put there all the time."
            )
        found = self._files.find(self._name)
        if found is None or changed(found[0], ingredients):
            raise CacheError(
                f"The features at {self._folder / self._name} were replaced as soon as they were written, by another "
                "process with other weights. Give each process a `feature_cache` of its own."
            )
        return found[1]

    def _put_in_place(self, ingredients: Ingredients) -> bool:
        """Move the folder to its place, unless another process has put the same there; False if it has put others."""
        place = self._folder / self._name
        with contextlib.suppress(OSError):
            os.rename(self._making, place)
            return True
        found = self._files.find(self._name)
        if found is not None and not changed(found[0], ingredients):
            self.abandon()
            return True
        aside = pathlib.Path(tempfile.mkdtemp(prefix=_WORKING, dir=self._folder))
        with contextlib.suppress(OSError):  # another process may have moved it
            os.rename(place, aside / self._name)
        shutil.rmtree(aside, ignore_errors=True)
        return False


def _opened(path: pathlib.Path, said: Mapping[str, Any]) -> Any:
    """Return an array that lies in a file: read where there is memory for it, else left there.

    Raises:
        ValueError: It is not as it was written.
    """
    if fingerprint.of_file(str(path)) != said["digest"]:
        raise ValueError(f"{path.name} is not as it was written")
    dtype, shape = tf.as_dtype(said["dtype"]).as_numpy_dtype, tuple(said["shape"])
    free = free_memory()
    if free is not None and path.stat().st_size > SHARE / 2 * free:
        return np.memmap(path, dtype, "r", shape=shape)
    return tf.constant(np.fromfile(path, dtype).reshape(shape))


def _digest(said: Mapping[str, Any]) -> str:
    return fingerprint.of_texts([json.dumps(said, sort_keys=True)])


def free_memory() -> int | None:
    """Return how many bytes of memory are free, or None where the system does not say."""
    try:
        said = pathlib.Path("/proc/meminfo").read_text()
        return 1024 * int(said.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def changed(one: Ingredients, other: Ingredients) -> list[str]:
    """Return the names of what went into one and not in the same way into another."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
