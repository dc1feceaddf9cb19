"""Saving a fit while it runs: at the moments that the user chose, at a signal, and without holding up the steps."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._table import format_count
from tapeloop.checkpoint import files
from tapeloop.checkpoint.checkpoints import Checkpoints
from tapeloop.checkpoint.contents import RunContents, resumption_of
from tapeloop.checkpoint.lock import FolderLock
from tapeloop.checkpoint.saved import ITERATOR, SavedRun
from tapeloop.checkpoint.store import CheckpointStore
from tapeloop.checkpoint.writer import BackgroundWriter
from tapeloop.errors import CheckpointError
from tapeloop.loop.fit_data import FitData
from tapeloop.loop.interrupts import StopRequested, deferred_interrupt, stop_on_sigterm
from tapeloop.loop.listener import FitListener, ReadLogs
from tapeloop.loop.state import Resumption
from tapeloop.policies.base import VariablePolicy

_LOG = logging.getLogger("tapeloop")
OF_CALLBACKS = "callback"  # what the names of tensors begin with that callbacks hold


class CheckpointSession(FitListener):
    """One fit's use of a folder of checkpoints.

    Attributes:
        found: The checkpoint that the fit goes on from, or None.
    """

    def __init__(self, options: Checkpoints, contents: RunContents, *, is_chief: bool = True) -> None:
        """Choose the folder.

        Args:
            options: The user's options.
            contents: What the run is made of.
            is_chief: Whether this is the worker that writes; the others resume from what is there, and keep its times.
        """
        self.found: SavedRun | None = None
        self._options = options
        self._is_chief = is_chief
        # Once and for all: the program may change its working directory.
        self._folder = options.path.absolute()
        self._contents = contents
        self._store = CheckpointStore(self._folder)
        self._writer = BackgroundWriter(self._store, options)
        self._data: FitData | None = None
        self._saved_at, self._saved = 0.0, (0, 0)
        self._has_warned = self._changes_the_end = False
        self._beside = FitListener()

    @property
    def resumption(self) -> Resumption | None:
        """Where the fit goes on that was saved last."""
        return None if self.found is None else resumption_of(self.found)

    def resume(self, epochs: range) -> None:
        """Bring the run to where the checkpoint has it, and say so.

        Args:
            epochs: The epochs of the fit.
        """
        if self.found is None:
            return
        self._contents.restore(self.found)
        if not self._is_chief:
            return
        record = self.found.record
        step, epoch = record["step"], record["epoch"]
        drawn = record["epoch_under_way"]["drawn"] if record["epoch_under_way"] else None
        within = "" if drawn is None else f" and {format_count(drawn, 'batch', 'batches')}"
        trained = f"{format_count(epoch, 'epoch')}{within}"
        rest = "" if epoch < epochs.stop else f". All {len(epochs)} epochs of the fit are trained already"
        # A warning, since Python shows no others unless it is told to, and nobody should have to guess.
        _LOG.warning("Resuming from %s: step %s, after %s%s.", self.found.folder, step, trained, rest)

    def saved_beside(self, epochs: range) -> tuple[Any, Callable[[str], Any]] | None:
        """Return what was saved of who looked on as well, and what reads its arrays, if it looked on at this fit.

        Args:
            epochs: The epochs of the fit.
        """
        found = self.found
        if found is None or "fit" not in found.record or found.record["fit"]["first_epoch"] != epochs.start:
            return None

        def read(name: str) -> Any:
            return found.read(f"{OF_CALLBACKS}/{name}") if f"{OF_CALLBACKS}/{name}" in found.names else None

        return found.record["callbacks"], read

    def take_folder(self) -> FolderLock | None:
        """Take the folder, and look for a checkpoint to go on from.

        Raises:
            CheckpointError: The folder cannot be written, another run uses it, or `resume` forbids what is there.
        """
        folder, options, state = self._folder, self._options, self._contents.loop.state
        if (folder / files.SUMS).exists():
            raise CheckpointError(
                f"{folder} is a checkpoint, and no directory of a run. Give its parent to go on there, or call "
                "`trainer.load` with it and give `fit` a new directory."
            )
        lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._is_chief:
                lock = FolderLock(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written: {error.strerror}. Choose a directory that this process may write."
            ) from None
        try:
            if self._is_chief:
                files.remove_leftovers(folder)
            found = self._store.newest(self._contents.require_readable)
            if found is None and options.resume == "must":
                raise CheckpointError(f"`resume` is 'must', and there is no checkpoint in {folder}.")
            if found is not None and options.resume == "never":
                raise CheckpointError(
                    f"`resume` is 'never', and {folder} has checkpoints, the newest at step {found.record['step']}. "
                    "Choose another directory, or remove them."
                )
            if found is not None:
                self._store.take_up(found)
                there = found.record["step"], found.record["epoch"], found.record["epoch_under_way"] is not None
                here = state.step, state.epoch, state.resumption is not None
                # A second fit of one program begins where the first has ended.
                self.found = found if there > here or state.is_of_later_fit else None
                if self.found is not None and state.was_loaded:
                    raise CheckpointError(
                        f"The trainer was loaded at step {state.step}, and the newest checkpoint in {folder} is at "
                        f"step {there[0]}. Give `fit` a new directory to go on from step {state.step}, or load the "
                        "newest."
                    )
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return lock

    @contextlib.contextmanager
    def saving(
        self, data: FitData, *, beside: FitListener | None = None, changes_the_end: bool = False
    ) -> Iterator[None]:
        """Save the fit inside this context, and once more if a signal ends it.

        Args:
            data: The data of the fit.
            beside: Who looks on as well, and whose state is saved too.
            changes_the_end: Whether callbacks may move the model after the last epoch.

        Raises:
            CheckpointError: `keep_best` names a log that there will not be.
            SystemExit: The fit was ended by SIGTERM; the exit code is that of a process which the signal has ended.
        """
        best = self._options.keep_best
        if best is not None and best.startswith("val_") and data.validation_spec is None:
            raise CheckpointError(
                f"`keep_best` is {best!r}, and there is no validation data. Pass some, or another log."
            )
        _require_state(self._contents.loop.phases.policy)
        self._data, self._beside, self._changes_the_end = data, beside or FitListener(), changes_the_end
        self._saved_at, self._saved = time.monotonic(), self._now()
        try:
            with stop_on_sigterm():
                yield
        except StopRequested as stop:
            raise SystemExit(128 + stop.number) from None
        except Exception:
            self._writer.wait()
            raise

    # What the loop calls

    def steps_left(self) -> int:
        """Return after how many steps the loop must call `after_steps`, at the latest."""
        every = self._options.every_steps
        return sys.maxsize if every is None else every - self._contents.loop.state.step % every

    def after_steps(self, number: int, read_logs: ReadLogs) -> None:
        """Save the run, if so many steps or minutes have passed."""
        step, every, minutes = self._contents.loop.state.step, self._options.every_steps, self._options.every_minutes
        by_steps = every is not None and step % every == 0 and step != self._saved[0]
        by_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        if by_steps or (by_time and step != self._saved[0]):
            self._save()

    def after_epoch(self, logs: Mapping[str, Any]) -> None:
        """Save the run, if so many epochs have passed or this was the best one."""
        every, best = self._options.every_epochs, self._options.keep_best
        known = self._epoch_logs()
        if best is not None and not known:
            said = ", ".join(repr(name) for name in sorted(logs) if not np.ndim(logs[name]))
            _LOG.warning(
                "`keep_best` is %r, and the numbers that the epoch logged are %s: no best is kept.", best, said
            )
        is_best = self._is_chief and any(map(self._is_best, known.values()))
        if is_best or (every is not None and self._contents.loop.state.epoch % every == 0):
            self._save()

    def after_fit(self, logs: Mapping[str, Any]) -> None:
        """Save the run if it has gone on since, so that the same program, run again, finds that it is through."""
        # A fit that is stopped early is over, which the checkpoint of its last epoch does not say yet.
        if self._saved != self._now() or (logs and (self._changes_the_end or self._contents.loop.stop_training)):
            self._save()
        self._writer.wait()

    def on_stop(self, stop: BaseException) -> None:
        """Save the run before a signal ends it, and say so."""
        if not self._is_chief:
            return
        name = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else signal.Signals(stop.args[0]).name
        # A run that has not come to where it was yet stands on the disk as it is.
        if not self._contents.loop.is_resuming:
            self._save()
        self._writer.wait()
        step, names = self._contents.loop.state.step, self._store.names()
        newest = self._folder / names[-1] if names else None
        saved = f"Run the same program again to resume from {newest}" if newest else "Nothing is saved"
        _LOG.warning("Stopped by %s after step %s. %s.", name, step, saved)

    def _now(self) -> tuple[int, int]:
        state = self._contents.loop.state
        return state.step, state.epoch

    def _is_best(self, value: float) -> bool:
        self._writer.wait()  # the last one may be the best
        records = self._store.records()
        name, best = self._options.best_of(records), self._options.keep_best
        if name is None:
            return not math.isnan(value)
        before = records[name]["epoch_logs"][best]
        return value > before if self._options.is_more_better else value < before

    def _epoch_logs(self) -> dict[str, float]:
        """Return the log by which checkpoints are compared, at the end of an epoch that has it."""
        # Of the run and not of the call: Ctrl-C may come between the end of an epoch and `after_epoch`.
        state, best = self._contents.loop.state, self._options.keep_best
        if best is None or state.under_way is not None or np.ndim(state.logs.get(best, [])):
            return {}
        return {best: float(state.logs[best])}

    def _save(self) -> None:
        """Save the run as it is now; files are written while training goes on."""
        if not self._is_chief:
            self._saved_at, self._saved = time.monotonic(), self._now()
            return
        # One copy of the state at a time: a second would take as much memory as the first.
        self._writer.wait()
        contents = self._contents
        with deferred_interrupt():
            variables = {**contents.variables(), **contents.log_variables()}
            iterator_state = self._iterator_state()
            best = None if self._options.keep_best is None else "max" if self._options.is_more_better else "min"
            record = {**contents.record(variables), "epoch_logs": self._epoch_logs(), "best": best}
            record["data"]["has_iterator"] = iterator_state is not None
            record["callbacks"], arrays = self._beside.state()
            # TensorFlow copies a variable when it is next assigned to, as long as somebody holds its value.
            tensors = {name: variable.read_value() for name, variable in variables.items()}
            tensors |= {f"{OF_CALLBACKS}/{name}": tf.constant(array) for name, array in arrays.items()}
            self._writer.start(record, tensors, contents.still(), iterator_state)
            self._saved_at, self._saved = time.monotonic(), self._now()

    def _iterator_state(self) -> Callable[[pathlib.Path], None] | None:
        """Return what writes the position of the data's iterator, if there is one that TensorFlow can save."""
        iterator = None if self._data is None else self._data.iterator
        if iterator is None:
            return None
        # Now, and not while training goes on and draws from it.
        folder = self._folder / f"{files.ASIDE}iterator"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tf.train.Checkpoint(iterator=iterator).write(str(folder / ITERATOR))
        except (tf.errors.OpError, ValueError, TypeError) as error:
            if not self._has_warned:
                self._has_warned = True
                _LOG.warning(
                    "TensorFlow cannot save the position of the dataset (%s). A run that goes on leaves out the "
                    "batches that were read, which are the same ones only if the dataset comes in the same order.",
                    files.first_line(error),
                )
            files.remove(folder)
            return None

        def move(target: pathlib.Path) -> None:
            for path in folder.iterdir():
                path.rename(target / path.name)
            folder.rmdir()

        return move


def _require_state(policy: VariablePolicy) -> None:
    """Check that a policy's state can be saved and set.

    Raises:
        CheckpointError: It cannot.
    """
    name, kind = type(policy).__name__, type(policy)
    if (kind.get_state is VariablePolicy.get_state) != (kind.set_state is VariablePolicy.set_state):
        raise CheckpointError(f"`{name}` writes one of `get_state` and `set_state`. Write both, or neither.")
    try:
        json.dumps(policy.get_state())
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The state of the policy `{name}` cannot be saved: {error}") from None


@contextlib.contextmanager
def opened(
    options: Checkpoints | str | os.PathLike[str] | None, contents: RunContents, *, is_chief: bool = True
) -> Iterator[CheckpointSession | None]:
    """Hold a folder of checkpoints inside this context, for a fit to go on from and to save itself in.

    Args:
        options: The user's options, or the folder alone; None: the fit is not saved.
        contents: What the run is made of.
        is_chief: Whether this is the worker that writes.

    Raises:
        CheckpointError: The folder cannot be written, another run uses it, or `resume` forbids what is there.
    """
    if options is None:
        yield None
        return
    if not isinstance(options, (Checkpoints, str, os.PathLike)):
        raise TypeError(f"`checkpoint` must be a directory or `tl.Checkpoints(...)`. Received: {options!r}.")
    given = options if isinstance(options, Checkpoints) else Checkpoints(options)
    session = CheckpointSession(given, contents, is_chief=is_chief)
    lock = session.take_folder()
    try:
        yield session
    finally:
        if lock is not None:
            lock.release()
