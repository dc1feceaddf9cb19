"""One run at a time in a folder."""

from __future__ import annotations

import datetime
import importlib
import os
import pathlib
import socket
from typing import Any

from tapeloop.errors import CheckpointError

# Windows has no such locks: there, two runs in one folder are not noticed.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
LOCK = "lock"


class FolderLock:
    """A lock on a folder, which the system gives back when the process ends, however it ends."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Take the lock.

        Raises:
            CheckpointError: Another run has it.
        """
        # Open as long as the lock is held.
        self._file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.seek(0)
                holder = self._file.read().strip() or "another run"
                self._file.close()
                raise CheckpointError(
                    f"{holder} saves in {folder} already, and two runs would delete each other's checkpoints. Wait "
                    "for its end, or choose another directory."
                ) from None
        self._file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, started {now},")
        self._file.flush()

    def release(self) -> None:
        """Give the lock back."""
        self._file.close()
