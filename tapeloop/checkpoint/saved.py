"""One checkpoint on the disk, read."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tapeloop._digest import digest
from tapeloop.checkpoint.files import TENSORS, DamagedError, verify
from tapeloop.checkpoint.records import read_record, require_shared

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
        self.record = read_record(folder)
        self._readers: dict[str, Any] = {}
        self.damaged: dict[str, str] = {}
        self._place = dict.fromkeys(self.record["tensors"], "")
        for shared, kept in self.record["shared_tensors"].items():
            self._place |= dict.fromkeys(kept["tensors"], shared)
            try:
                require_shared(folder.parent / shared, kept["digest"])
            except (DamagedError, OSError) as error:
                self.damaged[shared] = str(error)

    @property
    def names(self) -> frozenset[str]:
        """The names of its tensors."""
        return frozenset(self._place)

    def shape(self, name: str) -> list[int | None] | None:
        """Return the shape of a variable that was saved; None where it was unknown."""
        found: list[int | None] | None = self.record["shapes"][name]
        return found

    def require_readable(self, live: Callable[[str], Any]) -> None:
        """Check that every tensor can be read, or is what the model has already.

        Args:
            live: Returns the value of the variable of a name, or None.

        Raises:
            DamagedError: A file of weights that did not train is damaged, and the model has others.
        """
        for shared, why in self.damaged.items():
            for name, kept in self.record["shared_tensors"][shared]["tensors"].items():
                if live(name) is None or digest(live(name)) != kept:
                    raise DamagedError(f"{shared}, which holds the weights that did not train, is damaged: {why}")

    def read(self, name: str) -> Any:
        """Return a tensor as a NumPy array; None if the model is known to have it already."""
        place = self._place[name]
        if place in self.damaged:
            return None
        if place not in self._readers:
            folder = self.folder.parent / place if place else self.folder
            self._readers[place] = tf.train.load_checkpoint(str(folder / TENSORS))
        return self._readers[place].get_tensor(name)

    def restore_iterator(self, iterator: Any) -> None:
        """Bring an iterator of `tf.data` to where it was."""
        tf.train.Checkpoint(iterator=iterator).read(str(self.folder / ITERATOR)).assert_consumed()
