"""A folder of checkpoints: writing them, finding the newest, removing the old."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._digest import checksum, digest
from tapeloop.checkpoint import files
from tapeloop.checkpoint.records import RECORD, names_in, records_in
from tapeloop.checkpoint.saved import SavedRun
from tapeloop.errors import CheckpointError

LEAST_SHARED_BYTES = 2**16  # below this, a file of its own for what did not move is not worth its while
_SHARED = re.compile(r"shared-(\d+)")
_LOG = logging.getLogger("tapeloop")


class CheckpointStore:
    """Checkpoints in a folder, numbered as they were written.

    Tensors that do not move between two checkpoints are written once, in a folder of their own to which both refer.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._shared: dict[str, tuple[str, str]] = {}  # for each tensor, the folder that has it and its digest
        self._last: dict[str, int] = {}  # a number for each tensor of the last checkpoint that changes with its value

    def names(self) -> list[str]:
        """Return the names of the checkpoints, the oldest first."""
        return names_in(self.folder)

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what each checkpoint says of its run, the oldest first; those that cannot be read are left out."""
        return records_in(self.folder)

    def newest(self, is_readable: Callable[[SavedRun], None]) -> SavedRun | None:
        """Return the newest checkpoint that is as it was written; what is newer and damaged is named in a warning.

        Args:
            is_readable: Raises `DamagedError` if a checkpoint refers to what cannot be read.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
        """
        names = self.names()
        for name in reversed(names):
            try:
                saved = SavedRun(self.folder / name)
                is_readable(saved)
                return saved
            except (files.DamagedError, OSError, ValueError, KeyError) as error:
                _LOG.warning("The checkpoint %s is damaged (%s). Using the one before.", self.folder / name, error)
        if names:
            raise CheckpointError(
                f"None of the {len(names)} checkpoints in {self.folder} is as it was written; the log names what is "
                "wrong with each. Restore the folder from a copy, or choose another directory to start anew."
            )
        return None

    def write(
        self,
        record: dict[str, Any],
        tensors: Mapping[str, tf.Tensor],
        *,
        still: Collection[str] = (),
        write_more: Callable[[pathlib.Path], None] = lambda folder: None,
    ) -> pathlib.Path:
        """Write a checkpoint, and return its folder.

        Args:
            record: What it says of the run.
            tensors: Its tensors, by name.
            still: The names of tensors that are not expected to move.
            write_more: Writes more files into its folder.

        Raises:
            OSError, tf.errors.OpError: The disk is full, or cannot be written.
        """
        values = {name: tensor.numpy() for name, tensor in tensors.items()}
        own, shared = self._shares(values, still)
        numbers = [int(name.split("-")[0]) for name in self.names()]
        final = self.folder / f"{max(numbers, default=0) + 1:06d}-step-{record['step']}"
        with files.written_aside(final) as folder:
            write_more(folder)
            write_checkpoint(folder, record, {name: tensors[name] for name in own}, shared)
        return final

    def take_up(self, saved: SavedRun) -> None:
        """Go on from a checkpoint: what it refers to need not be written again."""
        for folder, kept in saved.record["shared_tensors"].items():
            if folder in saved.damaged:  # the model has what it held: it is written anew
                _LOG.warning(
                    "%s is damaged (%s): the model has the same weights, which are written anew.",
                    self.folder / folder,
                    saved.damaged[folder],
                )
                continue
            self._shared |= {name: (folder, digest) for name, digest in kept["tensors"].items()}

    def remove_all_but(self, kept: Collection[str]) -> None:
        """Remove the checkpoints that are not to be kept, and what none of the others refers to."""
        for name in set(self.names()) - set(kept):
            files.remove(self.folder / name)
        records = self.records()
        # A record that cannot be read may refer to any of them.
        if len(records) == len(self.names()):
            used = {shared for record in records.values() for shared in record["shared_tensors"]}
            for path in self._shared_folders():
                if path.name not in used:
                    files.remove(path)
                    self._shared = {name: kept for name, kept in self._shared.items() if kept[0] != path.name}

    def _shared_folders(self) -> Iterator[pathlib.Path]:
        return (path for path in self.folder.glob("shared-*") if _SHARED.fullmatch(path.name))

    def _shares(self, values: Mapping[str, np.ndarray], still: Collection[str]) -> tuple[list[str], dict[str, Any]]:
        """Return the names of the tensors that a checkpoint writes itself, and the folders that have the others."""
        # A folder that somebody removed is written anew.
        folders = {path.name for path in self._shared_folders() if (path / files.SUMS).exists()}
        self._shared = {name: kept for name, kept in self._shared.items() if kept[0] in folders}
        # Two numbers for each tensor: a quick one that tells most of what moved, and a digest where that one agrees.
        checksums = {name: checksum(value) for name, value in values.items()}
        unmoved = [name for name in values if name in still or checksums[name] == self._last.get(name)]
        digests = {name: digest(values[name]) for name in values if name in self._shared or name in unmoved}
        kept = {name for name in digests if name in self._shared and self._shared[name][1] == digests[name]}
        new = {name: values[name] for name in unmoved if name not in kept}
        if sum(value.nbytes for value in new.values()) >= LEAST_SHARED_BYTES:
            self._write_shared(new, digests)
            kept |= new.keys()
        self._last = checksums
        shared: dict[str, Any] = {}
        for name in sorted(kept):
            folder, _ = self._shared[name]
            if folder not in shared:
                shared[folder] = {"digest": files.digest_of(self.folder / folder), "tensors": {}}
            shared[folder]["tensors"][name] = digests[name]
        return [name for name in values if name not in kept], shared

    def _write_shared(self, values: Mapping[str, np.ndarray], digests: Mapping[str, str]) -> None:
        numbers = [int(path.name.partition("-")[2]) for path in self._shared_folders()]
        name = f"shared-{max(numbers, default=0) + 1:06d}"
        with files.written_aside(self.folder / name) as folder:
            write_tensors(folder, {each: tf.constant(value) for each, value in values.items()})
        self._shared |= {each: (name, digests[each]) for each in values}


def write_checkpoint(
    folder: pathlib.Path, record: dict[str, Any], tensors: Mapping[str, tf.Tensor], shared: Mapping[str, Any]
) -> None:
    """Write what a checkpoint says of its run, and its own tensors."""
    if tensors:
        write_tensors(folder, tensors)
    said = {**record, "tensors": list(tensors), "shared_tensors": dict(shared)}
    # A line for each entry, so that people can read it.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value, default=asdict)}" for name, value in said.items())
    (folder / RECORD).write_text(f"{{\n{lines}\n}}\n")


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, tf.Tensor]) -> None:
    """Write tensors by their names, in the format of TensorFlow's checkpoints.

    Source: https://www.tensorflow.org/api_docs/python/tf/raw_ops/SaveV2
    """
    # Not `tf.train.Checkpoint`, which names tensors by the objects that hold them, and slots by their positions.
    names = list(tensors)
    with tf.device("CPU:0"):
        values = [tf.identity(tensors[name]) for name in names]
        tf.raw_ops.SaveV2(
            prefix=str(folder / files.TENSORS), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
        )
