"""One checkpoint on the disk, read."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.checkpoint.files import DamagedError, TensorFile, digest_of, verify
from tapeloop.errors import CheckpointError

FORMAT = 1  # of what a checkpoint says; an older tapeloop refuses a newer one
RECORD = "checkpoint.json"
ITERATOR = "iterator"  # the prefix of what TensorFlow says of an iterator's position


class SavedRun:
    """What a checkpoint holds.

    Attributes:
        folder: Where it is.
        record: What it says of the run, as its `checkpoint.json` shows it.
        damaged: The folders of weights that did not train which cannot be read, and why.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Read a checkpoint, all of whose bytes are looked at first.

        Raises:
            CheckpointError: It was written by a newer tapeloop.
            DamagedError: It is not as it was written.
        """
        verify(folder)
        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if self.record["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} was written by tapeloop {self.record['written_by']['tapeloop']}, in format "
                f"{self.record['format']}; this tapeloop reads formats up to {FORMAT}. Update tapeloop."
            )
        self._files: dict[str, TensorFile] = {}
        self.damaged: dict[str, str] = {}
        self._place = dict.fromkeys(self.record["own"], "")
        for shared, kept in self.record["shared"].items():
            self._place |= dict.fromkeys(kept["tensors"], shared)
            try:
                # Digests that agree in themselves may be those of another folder that took the name.
                verify(folder.parent / shared)
                if digest_of(folder.parent / shared) != kept["digest"]:
                    raise DamagedError("it is not the one that was referred to")
            except (DamagedError, OSError) as error:
                self.damaged[shared] = str(error)

    @property
    def names(self) -> frozenset[str]:
        """The names of its tensors."""
        return frozenset(self._place)

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor."""
        return list(self.record["shapes"][name])

    def require_readable(self, live: Callable[[str], Any]) -> None:
        """Check that every tensor can be read, or is what the model has already.

        Args:
            live: Returns the value of the variable of a name, or None.

        Raises:
            DamagedError: A file of weights that did not train is damaged, and the model has others.
        """
        for shared, why in self.damaged.items():
            for name, digest in self.record["shared"][shared]["tensors"].items():
                if tensor_digest(live(name)) != digest:
                    raise DamagedError(f"{shared}, which holds the weights that did not train, is damaged: {why}")

    def read(self, name: str) -> Any:
        """Return a tensor as a NumPy array; None if the model is known to have it already."""
        place = self._place[name]
        if place in self.damaged:
            return None
        if place not in self._files:
            self._files[place] = TensorFile(self.folder.parent / place if place else self.folder)
        return self._files[place].read(name)

    def restore_iterator(self, iterator: Any) -> None:
        """Bring an iterator of `tf.data` to where it was."""
        tf.train.Checkpoint(iterator=iterator).read(str(self.folder / ITERATOR)).assert_consumed()


def tensor_digest(value: Any) -> str:
    """Return the digest of a tensor's dtype, shape and content."""
    if value is None:
        return ""
    array = np.ascontiguousarray(value)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode(), usedforsecurity=False)
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def bytes_of(values: Mapping[str, Any]) -> int:
    """Return how many bytes some arrays have."""
    return sum(int(np.asarray(value).nbytes) for value in values.values())
