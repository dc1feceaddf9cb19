"""The state of Keras' callbacks, so that they resume with a run that was saved."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

PLAIN = bool, int, float, str, type(None)
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
) -> None:
    """Restore the state of callbacks, if they are of the classes that it was saved of.

    Args:
        callbacks: The callbacks, after `on_train_begin`.
        state: The first part of what `state_of` returned.
        read: Returns an array of the second part by its name, or None where there is none of that name.
    """
    if [type(callback).__name__ for callback in callbacks] != [entry["class"] for entry in state]:
        return
    for number, (callback, entry) in enumerate(zip(callbacks, state)):
        # A `CSVLogger` has read by now what there is in its file.
        if not isinstance(callback, keras.callbacks.CSVLogger):
            for name, value in entry["attributes"].items():
                setattr(callback, name, value)
        found = (read(f"{number}/{BEST}/{place}") for place in itertools.count())
        best = list(itertools.takewhile(lambda value: value is not None, found))
        if best:
            callback.best_weights = best


def append_to_files(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Have each `CSVLogger` append to its file, which it would begin anew."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0
