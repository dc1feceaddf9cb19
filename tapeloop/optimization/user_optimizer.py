"""An optimizer as the user passed it: used as it is, and cloned only where a second one is needed."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError
from tapeloop.optimization.learning_rate import Multiplied

_LOG = logging.getLogger("tapeloop")
PRIMES = 2, 3, 5, 7, 11, 13, 17, 19
SLOT_SETTINGS = "momentum", "amsgrad", "centered"  # of Keras' optimizers: with them, a variable has more slots


class Template:
    """A user's optimizer, and what it said of itself when it was passed.

    Attributes:
        optimizer: The very object.
        schedule: The schedule or function that its learning rate follows, or None.
        clones_are: What clones of it are for, and how to do without them.
    """

    clones_are = (
        "for variables that train in another group or begin at another time",
        "pass one optimizer for each group",
    )

    def __init__(self, optimizer: Any) -> None:
        """Check and keep the optimizer.

        Raises:
            TypeError: It is no Keras optimizer, or decides something for its own variables alone.
            ValueError: Its learning rate is below 0, or not finite.
        """
        self.optimizer = _checked(optimizer)
        schedule = keras_internals.schedule_of(self.optimizer)
        self.schedule = schedule.schedule if isinstance(schedule, Multiplied) else schedule
        self._rate = (
            None if schedule is not None else not_negative("learning_rate", float(self.optimizer.learning_rate))
        )
        self._seen = self._first_rate = self._rate
        # Taken now, while it still says what the user has passed: later the rate may be a trainer's.
        self._config = None if self.optimizer.built else keras_internals.optimizer_config(self.optimizer, self.schedule)
        self._said = _settings(self.optimizer)
        self._is_taken = False
        self._slots: dict[int, list[tuple[int, ...]]] = {}  # for each rank, the dimensions of each slot, by number

    def slot_numbers(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers the optimizer keeps for a variable of a shape, without making any of that size."""
        rank = len(shape)
        if rank not in self._slots:
            # Of a small variable whose dimensions are told apart: some optimizers keep rows and columns alone.
            lengths = PRIMES[:rank]
            clone = self._clone()
            clone.build([keras.Variable(np.zeros(lengths, "float32"))])
            aside = clone.iterations, keras_internals.learning_rate_variable(clone)
            slots = [variable for variable in clone.variables if all(variable is not each for each in aside)]
            known = {length: place for place, length in enumerate(lengths)}
            self._slots[rank] = [tuple(known[length] for length in slot.shape if length in known) for slot in slots]
        return sum(math.prod(shape[place] for place in slot) for slot in self._slots[rank])

    @property
    def rate(self) -> float:
        """Its learning rate as the user last set it, or what its schedule says now."""
        return float(self.optimizer.learning_rate) if self._rate is None else self._rate

    def refresh(self, given: Collection[float] = ()) -> bool:
        """Take in whether the user has assigned another learning rate to the optimizer, and tell so.

        Args:
            given: The rates that the trainer may have given it since.
        """
        # A rate that differs from what the trainer has set is the user's, such as a callback's.
        now = float(self.optimizer.learning_rate)
        if self._rate is None or now == self._seen or now in given:
            return False
        self._rate = self._seen = not_negative("learning_rate", now)
        return True

    def saw(self) -> None:
        """Note that the trainer has given the optimizer a learning rate."""
        self._seen = float(self.optimizer.learning_rate)

    def describe(self) -> dict[str, Any]:
        """Return, as JSON has it, what `restore` needs."""
        rates = {"rate": self._rate, "seen": self._seen, "first_rate": self._first_rate, "slots": self.slot_settings}
        return {"kind": type(self.optimizer).__name__, "now": float(self.optimizer.learning_rate), **rates}

    @property
    def slot_settings(self) -> dict[str, bool]:
        """Which of its settings are on that decide which slots it keeps for a variable."""
        return {name: bool(self._said[name]) for name in SLOT_SETTINGS if name in self._said}

    def restore(self, description: Mapping[str, Any]) -> None:
        """Take the learning rate that was described, in place of the one that was passed."""
        if self._rate is None or description["rate"] is None:
            return
        if self._first_rate is not None and self._first_rate != description["first_rate"]:
            _LOG.warning(
                "This program sets the learning rate of %s to %.4g, and the run began with %.4g: it keeps its own, "
                "%.4g. Assign to `trainer.learning_rates` to change it.",
                description["kind"],
                self._first_rate,
                description["first_rate"],
                description["rate"],
            )
        self._first_rate = description["first_rate"]
        self._rate, self._seen = description["rate"], description["seen"]
        self.optimizer.learning_rate = description["now"]

    def optimizer_for_a_cohort(self) -> keras.optimizers.Optimizer:
        """Return an optimizer that is not built: the user's own the first time, clones after.

        Raises:
            PolicyError: A clone would not be what the user passed.
        """
        # The user may hold on to the object, to read or set its rate.
        if self._is_free:
            self._is_taken = True
            return self.optimizer
        return self._clone()

    def on_trial(self) -> Template:
        """Return what stands for the optimizer on trial: what becomes of it is its own, and it gives out clones."""
        other = copy.copy(self)
        # Once an optimizer is built, it is built for good.
        other._is_taken = True
        other.clones_are = "to try learning rates on it", "train a step before the search"
        return other

    def require_clones(self, cohorts: int) -> None:
        """Check that there can be so many optimizers more.

        Raises:
            PolicyError: There cannot.
        """
        if cohorts > self._is_free:
            self._clone()

    @property
    def _is_free(self) -> bool:
        """Whether it is not built yet, by another trainer either: it would hold the state of other variables."""
        return not self._is_taken and not self.optimizer.built

    def _clone(self) -> keras.optimizers.Optimizer:
        config = self._config or keras_internals.optimizer_config(self.optimizer, self.schedule)
        kind, (purpose, remedy) = type(self.optimizer), self.clones_are
        try:
            clone = keras_internals.clone_optimizer(self.optimizer, config)
        except Exception as error:
            raise PolicyError(
                f"A second {kind.__name__} is needed, {purpose}, and `from_config(get_config())` raises "
                f"{type(error).__name__}: {error}. Have `get_config` list what `__init__` takes, or {remedy}."
            ) from error
        # `get_config` may leave out what a subclass's `__init__` takes: the copy would silently train in another way.
        said = _settings(clone)
        differ = [name for name, value in self._said.items() if name not in said or not _same(value, said[name])]
        if differ:
            name = differ[0]
            raise PolicyError(
                f"A second {kind.__name__} is needed, {purpose}, and its copy would not be the one you passed: "
                f"`{name}` would be {said.get(name, 'missing')!r} and not {self._said[name]!r}. Have its `get_config` "
                f"list {', '.join(f'`{each}`' for each in differ)}, or {remedy}."
            )
        return clone


def _settings(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer that say how it updates, and not what it has come to."""
    found = {}
    for name, value in vars(optimizer).items():
        is_state = any(isinstance(part, (keras.Variable, tf.Variable)) for part in tf.nest.flatten(value))
        if name not in keras_internals.optimizer_bookkeeping() and not is_state:
            found[name] = value
    return found


def _same(one: Any, other: Any) -> bool:
    """Tell whether two settings are alike: equal, or objects of one class that say the same of themselves."""
    if one is other:
        return True
    if isinstance(one, (np.ndarray, tf.Tensor)):
        return type(one) is type(other) and np.array_equal(one, other)
    if type(one) is not type(other):
        return isinstance(one, (int, float)) and isinstance(other, (int, float)) and one == other
    # Objects that are equal to themselves alone, such as an initializer in a setting, are what they hold.
    if getattr(type(one), "__eq__", None) is getattr(object, "__eq__", None) and hasattr(one, "__dict__"):
        return vars(one).keys() == vars(other).keys() and all(_same(v, vars(other)[k]) for k, v in vars(one).items())
    return bool(one == other)


def _checked(optimizer: Any) -> keras.optimizers.Optimizer:
    if isinstance(optimizer, str):
        by_name = {n.lower(): kind for n, kind in vars(keras.optimizers).items() if isinstance(kind, type)}
        if optimizer.lower() not in by_name:
            near = difflib.get_close_matches(optimizer.lower(), by_name, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"`optimizer` is {optimizer!r}, and Keras has none of that name.{hint}")
        optimizer = by_name[optimizer.lower()]()
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a Keras optimizer, its name, or a mapping from groups to such. "
            f"Received: {optimizer!r} of type {type(optimizer).__name__}."
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor is not None:
        raise TypeError(
            "`optimizer` must not scale the loss: each would decide for its own group alone. The trainer does it for "
            f"all together where a layer computes in float16. Received: {optimizer!r}. Pass the optimizer inside it, "
            "without `loss_scale_factor`."
        )
    # Each of these would be decided by every cohort's optimizer for its own variables alone.
    if optimizer.use_ema:
        raise TypeError(
            "`optimizer` must not have `use_ema=True`: it averages, and overwrites, all that it was built with, also "
            f"what is frozen by then. Received: {optimizer!r}. Pass it without, and `ema=...` to the trainer."
        )
    if optimizer.gradient_accumulation_steps:
        steps = optimizer.gradient_accumulation_steps
        raise TypeError(
            "`optimizer` must not accumulate gradients: variables that begin to train at different times would be "
            f"updated on different steps. Received: {optimizer!r} with `gradient_accumulation_steps={steps}`. Pass it "
            f"without, {steps} times the `batch_size`, and `microbatches={steps}` to the trainer: the same update in "
            "the same memory."
        )
    return optimizer
