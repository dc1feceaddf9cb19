"""A folder of checkpoints, looked at from outside while a run may be writing there.

No lock is taken and nothing is written. What is removed or replaced while it is looked at is not taken for damaged.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from tapeloop.checkpoint import files
from tapeloop.checkpoint.records import RECORD, names_in, read_record, require_shared
from tapeloop.cli.answer import BadUsage
from tapeloop.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint, or tensors that several share, as it was found.

    Attributes:
        path: Where it is.
        bytes: The size of its files.
        record: What a checkpoint says of its run; None if that cannot be read, and for shared tensors.
        fault: What is wrong with it; None if nothing is.
    """

    path: pathlib.Path
    bytes: int = 0
    record: dict[str, Any] | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def needs(self) -> dict[str, str]:
        """The digests of the shared tensors that a checkpoint refers to, by the names of their folders."""
        return (
            {}
            if self.record is None
            else {name: kept["digest"] for name, kept in self.record["shared_tensors"].items()}
        )


class Visit:
    """One look at a folder of checkpoints, or at a single checkpoint.

    Attributes:
        checkpoints: The checkpoints, the oldest first: one or more.
    """

    def __init__(self, place: pathlib.Path, *, every_byte: bool) -> None:
        """Look at all checkpoints.

        Args:
            place: A folder of checkpoints, or a checkpoint.
            every_byte: Whether all files are read, and not only the lists of files and what checkpoints say.

        Raises:
            BadUsage: There is no such folder.
            CheckpointError: There is no checkpoint.
        """
        # What it shares stands beside the checkpoint itself, and not beside a link to it.
        given, place = place, files.present(place.expanduser().resolve())
        if not place.is_dir():
            raise BadUsage(f"There is no folder {given}.")
        self._every_byte = every_byte
        self._seen: dict[tuple[str, str], Folder] = {}
        self.checkpoints: list[Folder] = []
        # A run that keeps few may remove all that were listed before they are read; newer ones are there then.
        while not self.checkpoints and (paths := _paths(place)):
            found = [_steady(path, self._checkpoint) for path in paths]
            self.checkpoints = [each for each in found if each is not None]
        if not self.checkpoints:
            raise CheckpointError(
                f"There is no checkpoint in {given}. Give the directory of `fit(checkpoint=...)`, or the path of "
                "`trainer.save(path)`."
            )

    @property
    def shared(self) -> dict[tuple[str, str], Folder]:
        """The folders of tensors that the checkpoints share, by name and digest."""
        # A name may stand twice: a checkpoint that was copied here may refer to another folder of that name.
        return {
            key: self._seen[key] for key in sorted({key for each in self.checkpoints for key in each.needs.items()})
        }

    @property
    def folders(self) -> list[Folder]:
        """The checkpoints, and the folders that they share."""
        return [*self.checkpoints, *self.shared.values()]

    def _checkpoint(self, path: pathlib.Path) -> Folder:
        record, faults = None, []
        try:
            files.verify(path, (RECORD,))
            record = read_record(path)
            if self._every_byte:
                files.verify(path)
        except (files.DamagedError, CheckpointError, OSError) as error:
            faults.append(_fault(error))
        found = Folder(path, _size(path), record)
        for name, digest in found.needs.items():
            if (name, digest) not in self._seen:  # each is read once for all checkpoints
                self._seen[name, digest] = self._shared(path.parent / name, digest)
            fault = self._seen[name, digest].fault
            faults += [] if fault is None else [f"{name}: {fault}"]
        return dataclasses.replace(found, fault="; ".join(faults) or None)

    def _shared(self, path: pathlib.Path, digest: str) -> Folder:
        def look(path: pathlib.Path) -> Folder:
            try:
                require_shared(path, digest, every_byte=self._every_byte)
            except (files.DamagedError, OSError) as error:
                return Folder(path, _size(path), fault=_fault(error))
            return Folder(path, _size(path))

        return _steady(path, look) or Folder(path, fault="it is missing")


def _paths(place: pathlib.Path) -> list[pathlib.Path]:
    """Return the checkpoints in a folder, or the folder if it is one itself."""
    is_one = (place / RECORD).exists() or (place / files.SUMS).exists()
    return [place] if is_one else [place / name for name in names_in(place)]


def _steady(path: pathlib.Path, look: Callable[[pathlib.Path], Folder]) -> Folder | None:
    """Return what is found in a folder that is the same before and after; None if it is removed meanwhile."""
    while (before := _identity(path)) is not None:
        found = look(path)
        if _identity(path) == before:
            return found
    return None


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """Return what tells a folder from one that takes its place."""
    try:
        status = path.lstat()  # of a link that leads nowhere, too: that is damaged, and not removed
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _size(path: pathlib.Path) -> int:
    """Return the size of a folder's files; what was removed meanwhile has none."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except OSError:
        return 0


def _fault(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{pathlib.Path(error.filename or '').name or 'it'} cannot be read ({error.strerror})"
    return str(error)
