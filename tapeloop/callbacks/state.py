"""What Keras' callbacks have come to, so that they go on with a run that was saved."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

PLAIN = bool, int, float, str, type(None)
BEST = "best_weights"  # of `EarlyStopping`


def state_of(callbacks: Sequence[keras.callbacks.Callback]) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return what callbacks have come to, as JSON has it, and the arrays of it by name.

    These are the numbers and texts among the attributes that the constructor does not take: how long `EarlyStopping`
    has waited, the best of `ModelCheckpoint`; and the weights that `EarlyStopping` puts back.

    Args:
        callbacks: The callbacks.
    """
    said, arrays = [], dict[str, np.ndarray]()
    for number, callback in enumerate(callbacks):
        plain = {name: _plain(value) for name, value in vars(callback).items() if _is_state(callback, name, value)}
        said.append({"class": type(callback).__name__, "attributes": plain})
        best = getattr(callback, BEST, None) if isinstance(callback, keras.callbacks.EarlyStopping) else None
        arrays |= {f"{number}/{BEST}/{place}": np.asarray(value) for place, value in enumerate(best or ())}
    return said, arrays


def restore(
    callbacks: Sequence[keras.callbacks.Callback], said: Sequence[Mapping[str, Any]], read: Callable[[str], Any]
) -> None:
    """Give callbacks what they had come to when `state_of` was called, if they are of the same classes.

    Args:
        callbacks: The callbacks, of whose fit the beginning was told.
        said: What `state_of` returned first.
        read: Returns an array by its name, or None where there is none of that name.
    """
    if [type(callback).__name__ for callback in callbacks] != [entry["class"] for entry in said]:
        return
    for number, (callback, entry) in enumerate(zip(callbacks, said)):
        for name, value in entry["attributes"].items():
            setattr(callback, name, value)
        found = (read(f"{number}/{BEST}/{place}") for place in itertools.count())
        best = list(itertools.takewhile(lambda value: value is not None, found))
        if best:
            callback.best_weights = best


def keep_files(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Have those that write to a file go on with it: Keras' `CSVLogger` would begin a new one."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True


def _is_state(callback: keras.callbacks.Callback, name: str, value: Any) -> bool:
    # What the program passes, it passes again; a file that is open is opened again.
    passed = inspect.signature(type(callback).__init__).parameters
    is_plain = isinstance(value, (*PLAIN, np.generic)) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return is_plain and name not in passed and not isinstance(callback, keras.callbacks.CSVLogger)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value
