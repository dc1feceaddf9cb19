"""Keras' callbacks as they are: told of a fit as Keras' own `fit` tells them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tapeloop._backend import keras_internals
from tapeloop.callbacks.model_view import ModelView
from tapeloop.callbacks.state import append_to_files, plain_attributes, restore, state_of
from tapeloop.data.loader import DataLoader
from tapeloop.errors import PolicyError
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.listener import FitListener, ReadLogs
from tapeloop.model.tree import Model
from tapeloop.optimization.optimizers import LearningRates
from tapeloop.step.objective import Objective

# Keras' callbacks that save the optimizer of a compiled model, which a trainer's model has not.
REFUSED = "BackupAndRestore", "OrbaxCheckpoint"
# Keras' callbacks that write files, of which the chief's are enough.
WRITING = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
OF_TRAIN_BATCHES = "on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"
OF_TEST_BATCHES = "on_test_batch_begin", "on_test_batch_end"


class ForGroup:
    """A Keras callback that sees one group alone: its `self.model.optimizer` is that group's.

    Attributes:
        group: The name of the group.
        callback: The callback.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Groups({"base": "base", "head": "head"}), loss="mse", optimizer="sgd")
        >>> slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        >>> x, y = np.ones((8, 4)), np.ones((8, 2))
        >>> history = trainer.fit(x, y, epochs=2, verbose=0, callbacks=[tl.ForGroup("head", slower)])
        >>> {group: round(rate, 4) for group, rate in trainer.learning_rates.items()}
        {'base': 0.01, 'head': 0.0025}
    """

    def __init__(self, group: str, callback: keras.callbacks.Callback) -> None:
        """Keep both.

        Args:
            group: The name of the group.
            callback: The callback, such as `keras.callbacks.ReduceLROnPlateau()`.

        Raises:
            TypeError: `callback` is no Keras callback.
        """
        _check_callback(callback)
        self.group = group
        self.callback = callback

    def __repr__(self) -> str:
        return f"ForGroup({self.group!r}, {type(self.callback).__name__})"


class KerasCallbacks(FitListener):
    """Tells Keras' callbacks how a fit, an evaluation or a prediction goes."""

    def __init__(self, given: Any, model: Model, loop: EpochLoop, objective: Objective) -> None:
        """Check the callbacks.

        Args:
            given: Callbacks, `ForGroup`s, or `keras.callbacks.CallbackList`s: one of them or several.
            model: The user's model.
            loop: The trainer's loop.
            objective: The loss and the metrics that the trainer was made with.

        Raises:
            TypeError: One of them is no Keras callback.
            ValueError: One of them does not go with a trainer.
        """
        pairs = [(one.group, one.callback) if isinstance(one, ForGroup) else (None, one) for one in _flat(given)]
        for _, callback in pairs:
            _check_callback(callback)
            _check_suitable(callback, model)
        # Keras' own averages are those of its optimizers; the trainer swaps its own.
        self.swaps_averages = any(isinstance(each, keras.callbacks.SwapEMAWeights) for _, each in pairs)
        pairs = [pair for pair in pairs if not isinstance(pair[1], keras.callbacks.SwapEMAWeights)]
        # What all workers go by is the same on all, those included that one worker alone runs.
        self._looks_at_steps = any(keras_internals.needs_batches(each, OF_TRAIN_BATCHES) for _, each in pairs)
        self._looks_at_tests = any(keras_internals.needs_batches(each, OF_TEST_BATCHES) for _, each in pairs)
        if not loop.steps.parts.replicas.is_chief:
            pairs = [pair for pair in pairs if not isinstance(pair[1], WRITING)]
        self._loop = loop
        self._callbacks = [callback for _, callback in pairs]
        self._groups = [group for group, _ in pairs]
        self._views = [ModelView(model, loop, objective, group) for group, _ in pairs]
        self._is_testing = False
        self._at_start: list[dict[str, Any]] = []
        self._saved: tuple[Any, Callable[[str], Any]] | None = None
        self._logs: dict[str, Any] = {}  # of the last epoch, without what callbacks have added

    @property
    def changes_the_end(self) -> bool:
        """Whether one of them may move the model after the last epoch, as one that restores the best weights does."""
        return any(keras_internals.is_overridden(each, "on_train_end") for each in self._callbacks)

    def set_params(self, *, epochs: int, steps: int | None, verbose: Any) -> None:
        """Have each callback know the model and how long the fit is."""
        for callback, view in zip(self._callbacks, self._views):
            callback.set_params({"verbose": verbose, "epochs": epochs, "steps": steps})
            callback.set_model(view)

    def check_groups(self, groups_to_come: Callable[[], Collection[str] | None]) -> None:
        """Check that there will be a group for each `ForGroup`.

        Args:
            groups_to_come: Returns the groups that may train; None if nobody knows.

        Raises:
            PolicyError: There will be none.
        """
        groups = groups_to_come() if any(group is not None for group in self._groups) else None
        for callback, group in zip(self._callbacks, self._groups):
            if groups is not None and group is not None and group not in groups:
                raise PolicyError(
                    f"`ForGroup({group!r}, {type(callback).__name__})`: there is no group {group!r}. The groups are "
                    f"{sorted(groups)}."
                )

    def resume(self, epochs: int, saved: Any, read: Callable[[str], Any]) -> None:
        """Have the callbacks resume from a checkpoint when the fit begins.

        Args:
            epochs: The number of epochs of the fit that are trained already.
            saved: The first part of what `state` returned when the run was saved.
            read: Returns an array of the second part by its name, or None.
        """
        self._saved = saved, read
        append_to_files(self._callbacks, epochs)

    def state(self) -> tuple[Any, Mapping[str, np.ndarray]]:
        """Return the state of the callbacks."""
        return state_of(self._callbacks, self._at_start)

    # What the loop calls

    def steps_left(self) -> int:
        """Return 1 if a callback looks at each batch."""
        return 1 if (self._looks_at_tests if self._is_testing else self._looks_at_steps) else sys.maxsize

    def before_fit(self) -> None:
        """Have a fit begin."""
        self._call("on_train_begin", {})
        self._at_start = list(map(plain_attributes, self._callbacks))
        if self._saved is not None and not restore(self._callbacks, *self._saved):
            self._saved = None

    def before_epoch(self, number: int) -> None:
        """Have an epoch begin."""
        state, saved, self._saved = self._loop.state, self._saved, None
        goes_on = saved is not None and state.resumption is not None and state.resumption.progress is not None
        rates = LearningRates(state.optimizers, self._loop.phases.current())
        before = dict(rates) if goes_on else {}
        self._call("on_epoch_begin", number, {})
        if saved is not None and goes_on:
            # The epoch began before the run was saved: what has moved once more goes back to where it was.
            restore(self._callbacks, *saved)
            for group in before:
                if rates[group] != before[group]:
                    rates[group] = before[group]

    def before_steps(self, number: int) -> None:
        """Have a batch begin, if a callback looks at each."""
        if self._looks_at_steps:
            self._call("on_train_batch_begin", number, {})

    def after_steps(self, number: int, read_logs: ReadLogs) -> None:
        """Have a batch end, if a callback looks at each."""
        if self._looks_at_steps:
            self._call("on_train_batch_end", number, dict(read_logs()[0]))

    def before_evaluation(self, loader: DataLoader) -> None:
        """Have an evaluation begin."""
        self._is_testing = True
        self._call("on_test_begin", {})

    def before_evaluating(self, number: int) -> None:
        """Have a batch of an evaluation begin, if a callback looks at each."""
        if self._looks_at_tests:
            self._call("on_test_batch_begin", number, {})

    def after_evaluating(self, number: int, read_logs: ReadLogs) -> None:
        """Have a batch of an evaluation end, if a callback looks at each."""
        if self._looks_at_tests:
            self._call("on_test_batch_end", number, dict(read_logs()[0]))

    def after_evaluation(self, logs: Mapping[str, Any]) -> None:
        """Have an evaluation end."""
        self._is_testing = False
        self._call("on_test_end", dict(logs))

    def end_epoch(self, number: int, logs: dict[str, Any]) -> None:
        """Have an epoch end; what a callback adds to the logs is recorded with them, as Keras does."""
        self._logs = dict(logs)
        self._call("on_epoch_end", number, logs)

    def after_fit(self, logs: Mapping[str, Any]) -> None:
        """Have the fit end."""
        self._call("on_train_end", self._logs)

    # What a prediction calls

    def predicting(self, outputs: Iterable[Any]) -> Iterator[Any]:
        """Yield the outputs of the batches of a prediction, and have it begin and end around them."""
        self._call("on_predict_begin", {})
        for number, output in enumerate(outputs):
            # Only the batch itself tells that there is one.
            self._call("on_predict_batch_begin", number, {})
            self._call("on_predict_batch_end", number, {"outputs": output})
            yield output
        self._call("on_predict_end", {})

    def _call(self, name: str, *args: Any) -> None:
        # As `keras.callbacks.CallbackList` does, which would give each of them the same model.
        for callback in self._callbacks:
            getattr(callback, name)(*args)
            if keras_internals.is_overridden(callback, name):
                self._loop.steps.parts.interventions.note()


def _flat(given: Any) -> Sequence[Any]:
    if given is None:
        return []
    if isinstance(given, keras.callbacks.CallbackList):
        return _flat(given.callbacks)
    return [each for one in given for each in _flat(one)] if isinstance(given, (list, tuple)) else [given]


def _check_callback(callback: Any) -> None:
    if not isinstance(callback, keras.callbacks.Callback):
        hint = f" Make an object of it: `{callback.__name__}()`." if isinstance(callback, type) else ""
        raise TypeError(
            f"`callbacks` must be objects of `keras.callbacks.Callback`. Received: {callback!r} of type "
            f"{type(callback).__name__}.{hint}"
        )


def _check_suitable(callback: keras.callbacks.Callback, model: Model) -> None:
    restores = isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights
    if isinstance(model, Mapping) and (restores or isinstance(callback, keras.callbacks.ModelCheckpoint)):
        raise ValueError(
            f"`{type(callback).__name__}` keeps the weights of one model, and the trainer's is a mapping of "
            f"{', '.join(map(repr, model))}. Pass `checkpoint=tl.Checkpoints(directory, keep_best=...)` to `fit`."
        )
    for kind in type(callback).__mro__:
        if kind.__name__ in REFUSED and kind.__module__.startswith("keras."):
            raise ValueError(
                f"`{kind.__name__}` does not go with a trainer: it saves the optimizer of a compiled model. Pass "
                "`checkpoint=tl.Checkpoints(directory)` to `fit`, which resumes in the middle of an epoch too."
            )
    if isinstance(callback, keras.callbacks.SwapEMAWeights) and callback.swap_on_epoch:
        raise ValueError(
            "`SwapEMAWeights(swap_on_epoch=True)` leaves the averages in the model between epochs, where a trainer "
            "saves its own weights. Leave `swap_on_epoch` out; `with trainer.ema_weights():` saves the averages."
        )
