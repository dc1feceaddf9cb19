"""The errors that tapeloop raises, each before anything has moved, or with all of it put back.

Every message names what was asked, what was found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


def listed(paths: Sequence[str], most: int = 8) -> str:
    """Return paths as a message names them: the first of them, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"`{path}`" for path in paths[:most]) + more


class TapeloopError(Exception):
    """The base of every error of tapeloop.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> try:
        ...     tl.Trainer(model, tl.Freeze("backbone")).selection
        ... except tl.TapeloopError as error:
        ...     print(type(error).__name__)
        PolicyError
    """

    # AutoGraph keeps the type of an error only if it knows how to make another of it: by this very constructor.
    __init__ = Exception.__init__


class PolicyError(TapeloopError, ValueError):
    """A policy cannot be resolved for a model: no match, overlap, nothing left to train.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> try:
        ...     tl.Trainer(model, tl.Freeze("haed")).selection
        ... except tl.PolicyError as error:
        ...     print(error)
        glob('haed') in Freeze(glob('haed')) matches no variable of the model. The nearest paths are `head`.
    """


class DisconnectedError(TapeloopError, ValueError):
    """A variable that should train receives no gradient.

    Example:
        >>> class Constant(tl.Trainer):
        ...     def forward(self, inputs, training):
        ...         return 0.0 * inputs
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="head")])
        >>> try:
        ...     Constant(model, loss="mse").fit((np.ones((8, 4)), np.ones((8, 4))), verbose=0)
        ... except tl.DisconnectedError as error:
        ...     print(type(error).__name__)
        DisconnectedError
    """


class NonFiniteError(TapeloopError, ArithmeticError):
    """A loss or a gradient is Inf or NaN. The step that came to it has changed nothing.

    Attributes:
        step: How many steps were trained before.
        paths: The variables whose gradients are not finite.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> try:
        ...     tl.Trainer(model, loss="mse").fit((np.full((8, 4), np.nan), np.ones((8, 2))), verbose=0)
        ... except tl.NonFiniteError as error:
        ...     print(error.step, error.paths)
        0 ('head/kernel', 'head/bias')
    """

    step: int = 0
    paths: tuple[str, ...] = ()


class CacheError(TapeloopError):
    """Features cannot be cached: there are none, they would be wrong, or they do not fit.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> trainer = tl.Trainer(model, loss="mse")
        >>> try:
        ...     trainer.fit((np.ones((8, 4)), np.ones((8, 2))), feature_cache="memory", verbose=0)
        ... except tl.CacheError as error:
        ...     print(str(error).split(":")[0])
        Of the train step on `x` nothing can be cached
    """


class CheckpointError(TapeloopError):
    """A checkpoint cannot be written or read, or is not one of this model and trainer.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> try:
        ...     tl.Trainer(model, loss="mse").load("runs/none")
        ... except tl.CheckpointError as error:
        ...     print(str(error).split(".")[0])
        There is no checkpoint at runs/none
    """


class WorkerError(TapeloopError, ConnectionError):
    """Workers that train together do not agree on what they train, or one of them is gone.

    Example:
        >>> issubclass(tl.WorkerError, tl.TapeloopError)
        True
    """


class DataError(TapeloopError, ValueError):
    """The data is empty, or does not fit the model.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> try:
        ...     tl.Trainer(model, loss="mse").fit((np.ones((8, 4)), np.ones((6, 2))), verbose=0)
        ... except tl.DataError as error:
        ...     print(str(error).split(",")[0])
        The arrays of `x` must have the same number of examples
    """
