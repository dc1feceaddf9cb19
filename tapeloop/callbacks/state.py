"""The state of Keras' callbacks, so that they resume with a run that was saved."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

PLAIN = bool, int, float, str, type(None)
_LOG = logging.getLogger("tapeloop")

BEST = "best_weights"  # of `EarlyStopping`


def plain_attributes(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Return the attributes of a callback that are numbers or texts, without the arguments of its constructor."""
    # The program passes those again.
    passed = inspect.signature(type(callback).__init__).parameters
    found = {name: value.item() if _is_scalar(value) else value for name, value in vars(callback).items()}
    return {name: value for name, value in found.items() if isinstance(value, PLAIN) and name not in passed}


def state_of(
    callbacks: Sequence[keras.callbacks.Callback], at_start: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return the state of callbacks, as JSON has it, and the arrays of it by name.

    The state is the plain attributes that have changed since the fit began: how long `EarlyStopping` has waited, the
    best value of `ModelCheckpoint`; and the weights that `EarlyStopping` restores.

    Args:
        callbacks: The callbacks.
        at_start: The plain attributes of each when the fit began.
    """
    state, arrays = [], dict[str, np.ndarray]()
    for number, (callback, before) in enumerate(zip(callbacks, at_start)):
        now = plain_attributes(callback)
        changed = {name: value for name, value in now.items() if name not in before or before[name] != value}
        state.append({"class": type(callback).__name__, "attributes": changed})
        best = getattr(callback, BEST, None) if isinstance(callback, keras.callbacks.EarlyStopping) else None
        arrays |= {f"{number}/{BEST}/{place}": np.asarray(value) for place, value in enumerate(best or ())}
    return state, arrays


def restore(
    callbacks: Sequence[keras.callbacks.Callback], state: Sequence[Mapping[str, Any]], read: Callable[[str], Any]
) -> bool:
    """Restore the state of callbacks, if they are of the classes that it was saved of, and return whether they are.

    Args:
        callbacks: The callbacks, after `on_train_begin`.
        state: The first part of what `state_of` returned.
        read: Returns an array of the second part by its name, or None where there is none of that name.
    """
    mine, saved = [type(callback).__name__ for callback in callbacks], [entry["class"] for entry in state]
    if mine != saved:
        _LOG.warning(
            "The callbacks begin anew: they are %s, and were %s in the checkpoint. Pass the same in the same order.",
            ", ".join(mine) or "none",
            ", ".join(saved) or "none",
        )
        return False
    for number, (callback, entry) in enumerate(zip(callbacks, state)):
        # A `CSVLogger` has read by now what there is in its file.
        if not isinstance(callback, keras.callbacks.CSVLogger):
            for name, value in entry["attributes"].items():
                setattr(callback, name, value)
        found = (read(f"{number}/{BEST}/{place}") for place in itertools.count())
        best = list(itertools.takewhile(lambda value: value is not None, found))
        if best:
            callback.best_weights = best
    return True


def append_to_files(callbacks: Sequence[keras.callbacks.Callback], epochs: int) -> None:
    """Have each `CSVLogger` append to its file, which it would begin anew.

    Args:
        callbacks: The callbacks.
        epochs: The number of epochs that the run has trained. Later ones, which came after the run was last saved, are
            trained again: their rows at the end of the file are removed.
    """
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True
            _remove_rows(callback.filename, callback.sep, epochs)


def _remove_rows(filename: str, separator: str, epochs: int) -> None:
    """Remove the last rows of a `CSVLogger`'s file, up to one of an earlier epoch than this."""
    if not tf.io.gfile.exists(filename):
        return
    with tf.io.gfile.GFile(filename, "r") as file:
        lines = file.read().splitlines(keepends=True)
    kept = len(lines)
    while kept and (first := lines[kept - 1].split(separator)[0]).isdecimal() and int(first) >= epochs:
        kept -= 1
    if kept < len(lines):
        with tf.io.gfile.GFile(filename, "w") as file:
            file.write("".join(lines[:kept]))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0
