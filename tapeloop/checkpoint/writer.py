"""Writing checkpoints while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import tensorflow as tf

from tapeloop.checkpoint import files
from tapeloop.checkpoint.checkpoints import Checkpoints
from tapeloop.checkpoint.store import CheckpointStore

NICENESS = 10  # of the thread that writes, of 0 to 19
_LOG = logging.getLogger("tapeloop")


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, and removes those that are not to be kept."""

    def __init__(self, store: CheckpointStore, options: Checkpoints) -> None:
        """Keep where checkpoints are written, and which are kept."""
        self._store = store
        self._options = options
        # Not `Thread.join`: one that a signal interrupts takes the thread for ended (bpo-45274).
        self._is_done = threading.Event()
        self._is_done.set()
        self._failure: BaseException | None = None

    def start(
        self,
        record: dict[str, Any],
        tensors: Mapping[str, tf.Tensor],
        still: Collection[str],
        write_more: Callable[[pathlib.Path], None] | None,
    ) -> None:
        """Begin to write a checkpoint; see `CheckpointStore.write`."""

        def write() -> None:
            # Steps come first: what is left of the processors is enough to write with. Linux has priorities by thread.
            with contextlib.suppress(AttributeError, OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            try:
                self._store.write(record, tensors, still=still, write_more=write_more or (lambda folder: None))
                best = self._options.best_of(self._store.records()) if self._options.keep_best else None
                newest = self._store.names()[-self._options.keep :]
                self._store.remove_all_but({*newest, *([best] if best is not None else [])})
            except BaseException as error:
                self._failure = error
            finally:
                self._is_done.set()

        # The program may end without waiting: what is half written is no checkpoint.
        self._is_done.clear()
        threading.Thread(target=write, name="tapeloop-checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written, and warn if it could not be."""
        self._is_done.wait()
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if not isinstance(failure, (OSError, tf.errors.OpError)):
            raise failure
        names = self._store.names()
        last = f"the last one is {self._store.folder / names[-1]}" if names else "there is none yet"
        _LOG.warning(
            "A checkpoint could not be written (%s): training goes on, and %s.", files.first_line(failure), last
        )
