"""What a Keras callback finds as `self.model`: the user's model, with the optimizer and the flags of a trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tapeloop.loop.epochs import EpochLoop
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model
from tapeloop.optimization.optimizers import LearningRates
from tapeloop.step.objective import Objective

# What callbacks set on a model, and no trainer writes to the user's.
OWN_NAMES = "history", "_initial_epoch"


class Rate(float):
    """A learning rate, which callbacks read and set as the variable that Keras has there."""

    assign: Callable[[Any], None]

    @classmethod
    def of(cls, value: float, assign: Callable[[Any], None]) -> Rate:
        """Return a rate that is set by `assign`."""
        rate = cls(value)
        rate.assign = assign
        return rate

    def numpy(self) -> np.float32:
        """Return the rate as NumPy has it."""
        return np.float32(self)


class Count(int):
    """A number of steps, which callbacks read as the variable that Keras has there."""

    def numpy(self) -> np.int64:
        """Return the number as NumPy has it."""
        return np.int64(self)


class OptimizerView:
    """What a callback finds as `self.model.optimizer`: the learning rate of one group, or of each of several.

    Attributes:
        name: The name of the group; of all together, `"optimizer"`.
    """

    def __init__(self, rates: Callable[[], LearningRates], loop: EpochLoop, group: str | None = None) -> None:
        """Keep where the learning rates are.

        Args:
            rates: Returns the learning rates of what trains.
            loop: The loop whose steps are counted.
            group: The group; None: all together.
        """
        self.name = group or "optimizer"
        self._rates = rates
        self._loop = loop
        self._group = group

    # Keras' own callbacks ask whether it is an optimizer before they log its learning rate.
    __class__ = property(lambda self: keras.optimizers.Optimizer)

    @property
    def learning_rate(self) -> Rate:
        """The learning rate of the group, as a number."""
        return Rate.of(self._rates()[self._one_group()], functools.partial(setattr, self, "learning_rate"))

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._rates()[self._one_group()] = float(keras.ops.convert_to_numpy(value))

    @property
    def iterations(self) -> Count:
        """The number of steps trained."""
        return Count(self._loop.state.step)

    def __getattr__(self, name: str) -> Any:
        # Keras' callbacks go through the optimizers one by one where there is such a list.
        if name == "optimizers" and self._group is None and len(self._rates()) > 1:
            return [OptimizerView(self._rates, self._loop, group) for group in self._rates()]
        raise AttributeError(
            f"`self.model.optimizer` has no {name!r}: within a tapeloop fit a callback finds `learning_rate`, "
            "`iterations` and, of several groups, `optimizers` there."
        )

    def _one_group(self) -> str:
        if self._group is not None:
            return self._group
        groups = list(self._rates())
        if len(groups) > 1:
            raise AttributeError(
                f"`self.model.optimizer.learning_rate` is not one number: the groups are {groups}. Go through "
                "`self.model.optimizer.optimizers`, whose `name` is the group's, or have the callback see one group "
                "alone: `tl.ForGroup(group, callback)`."
            )
        return groups[0]


class ModelView:
    """What a callback finds as `self.model`.

    All but the optimizer, the metrics, the history and `stop_training` is the user's model's.
    """

    def __init__(self, model: Model, loop: EpochLoop, objective: Objective, group: str | None = None) -> None:
        """Keep what is shown.

        Args:
            model: The user's model.
            loop: The trainer's loop.
            objective: The loss and the metrics that the trainer was made with.
            group: The only group whose learning rate shows; None: all.
        """
        # By the dictionary, since assigning to an attribute is assigning to the user's model.
        vars(self).update(_model=model, _loop=loop, _objective=objective)
        vars(self)["optimizer"] = OptimizerView(self._rates, loop, group)

    # TensorBoard writes the graph of a `Functional`, and callbacks of users ask whether it is a `keras.Model`.
    __class__ = property(lambda self: type(self._model))

    @property
    def metrics(self) -> list[Any]:
        """The metrics, by which Keras tells whether more is better."""
        return self._objective.metrics

    @property
    def loss(self) -> Any:
        """The loss, as the trainer was made with it."""
        return self._objective.given_loss

    def get_metrics_result(self) -> dict[str, Any]:
        """Return what the epoch that is under way has logged, or else what the last one has."""
        is_under_way = self._loop.state.under_way is not None
        return dict(self._loop.logs_so_far() if is_under_way else self._loop.state.logs)

    @property
    def stop_training(self) -> bool:
        """Whether the fit shall end."""
        return self._loop.stop_training

    def compile(self, *args: Any, **options: Any) -> None:
        """Refuse to be compiled.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "A callback has called `self.model.compile(...)`. A trainer is not compiled: `trainable` flags are read at "
            "the start of each epoch, and learning rates are set by `self.model.optimizer.learning_rate`."
        )

    def __getattr__(self, name: str) -> Any:
        if name == "history":  # until a `keras.callbacks.History` sets itself there
            return self._loop.state.history
        model = self._model
        if isinstance(model, Mapping) and not hasattr(model, name):
            raise AttributeError(
                f"A callback asks for `self.model.{name}`, and the trainer's model is a mapping of "
                f"{', '.join(map(repr, model))}, which has none. To save such models pass "
                "`checkpoint=tl.Checkpoints(...)` to `fit`; `self.model[name]` gives one of them."
            )
        return getattr(model, name)

    def __getitem__(self, name: str) -> Any:
        return self._model[name]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the user's model."""
        return self._model(*args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "stop_training":
            self._loop.stop_training = bool(value)
        elif name in OWN_NAMES:
            vars(self)[name] = value
        elif name in ("optimizer", "metrics"):
            raise AttributeError(f"A callback sets `self.model.{name}`: set it when the trainer is made.")
        else:
            setattr(self._model, name, value)

    def _rates(self) -> LearningRates:
        return LearningRates(self._loop.state.optimizers, self._selection())

    def _selection(self) -> Selection:
        """Return what trains, or, before an epoch, what is about to."""
        phases, state = self._loop.phases, self._loop.state
        # Before an epoch the policy is asked for it, and gives the same answer when the epoch begins. Where a run goes
        # on it is not asked: the answer is the checkpoint's.
        is_due = self._loop.is_starting and state.resumption is None
        return phases.now() if is_due else phases.current()
