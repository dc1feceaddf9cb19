"""Optimizers: one per group and cohort, cloned from the user's templates, each built for what it trains alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.errors import PolicyError
from tapeloop.modes import read_once
from tapeloop.rates import Rate
from tapeloop.selection import Selection
from tapeloop.tree import VariableInfo, raw

OptimizerLike: TypeAlias = Any  # keras.optimizers.Optimizer | str | Mapping[str, either]


class LearningRates(Mapping[str, float]):
    """The learning rates by group, to be read and set: `trainer.learning_rates["head"] = 1e-4`."""

    def __init__(self, optimizers: Optimizers, selection: Selection) -> None:
        self._optimizers = optimizers
        self._selection = selection

    def __getitem__(self, group: str) -> float:
        return self._optimizers.learning_rate(self._selection, self._known(group))

    def __setitem__(self, group: str, value: float) -> None:
        self._optimizers.set_learning_rate(self._known(group), value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._selection.groups)

    def __len__(self) -> int:
        return len(self._selection.groups)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _known(self, group: str) -> str:
        if group not in self._selection.groups:
            raise PolicyError(f"There is no group {group!r}: the groups are {sorted(self._selection.groups)}.")
        return group


@dataclass(frozen=True, eq=False)
class Cohort:
    """Variables that joined a group together, and the optimizer that holds their state and step count.

    Attributes:
        group: The group's name.
        optimizer: The Keras optimizer, built for these variables alone.
        rate: What sets its learning rate.
        slots: For each variable, by identity, the optimizer's variables that belong to it.
    """

    group: str
    optimizer: keras.optimizers.Optimizer
    rate: Rate
    slots: Mapping[int, tuple[keras.Variable, ...]]


class Optimizers:
    """The optimizers of all groups.

    A variable's state starts when it first trains, in the cohort of those that join its group with it, and is kept
    for its return when it leaves. What never trains never gets any.
    """

    def __init__(self, template: OptimizerLike) -> None:
        """Check and keep the user's optimizers.

        Args:
            template: A Keras optimizer or its name, cloned for every group; or a mapping with one for each group.
                They are templates: the trainer clones them and never changes them.

        Raises:
            TypeError: One of them is no Keras optimizer, scales the loss, or has `use_ema`.
        """
        self._by_group = isinstance(template, Mapping)
        named = template.items() if isinstance(template, Mapping) else [("", template)]
        self._templates = {name: _as_optimizer(optimizer) for name, optimizer in named}
        self._set: dict[str, float] = {}
        self.cohorts: list[Cohort] = []

    @property
    def are_keras(self) -> bool:
        """Whether all of them update as Keras' own do, of gradients and their state alone."""
        methods = [getattr(type(o), name) for o in self._templates.values() for name in ("apply", "update_step")]
        return all(method.__module__.startswith("keras.") for method in methods)

    def check(self, selection: Selection, *, changing: bool = False) -> None:
        """Check that there is an optimizer for each group, and, unless the policy is changing, a group for each.

        Raises:
            PolicyError: There is not.
        """
        names, groups = set(self._templates), set(selection.groups)
        if self._by_group and not (groups <= names if changing else groups == names):
            raise PolicyError(
                f"`optimizer` must have one entry for each group of the policy. "
                f"The groups are {sorted(groups)}, the optimizers are for {sorted(names)}."
            )

    def prepare(self, selection: Selection, *, changing: bool = False) -> None:
        """Make the state of every variable that trains and has none, and set the groups' learning rates.

        Args:
            selection: What trains.
            changing: Whether the policy changes as training goes, so that other groups may come later.

        Raises:
            PolicyError: The names of the optimizers are not those of the groups.
        """
        self.check(selection, changing=changing)
        for group, variables in selection.groups.items():
            known = {key for cohort in self.cohorts if cohort.group == group for key in cohort.slots}
            joining = [variable for variable in variables if id(variable.variable) not in known]
            if joining:
                self.cohorts.append(_new_cohort(group, self._template(group), joining))
            for cohort in self.cohorts:
                if cohort.group == group:
                    cohort.rate.set(selection.multipliers.get(group, 1.0), self._set.get(group))

    def learning_rate(self, selection: Selection, group: str) -> float:
        """Return the learning rate of a group now: where cohorts differ, that of the one that began first."""
        multiplier = selection.multipliers[group]
        for cohort in self.cohorts:
            if cohort.group == group:
                return cohort.rate.get(multiplier, self._set.get(group))
        rate = self._set.get(group)
        return multiplier * float(self._template(group).learning_rate) if rate is None else rate

    def set_learning_rate(self, group: str, value: float) -> None:
        """Set the learning rate of a group, from now on and without a new trace.

        Raises:
            TypeError: The group's optimizer follows a schedule.
        """
        if _compat.schedule_of(self._template(group)) is not None:
            raise TypeError(
                f"The learning rate of the group {group!r} follows a schedule, and cannot be set to {value!r}. "
                "Give the group's optimizer a number, or end the schedule there."
            )
        self._set[group] = float(value)
        for cohort in self.cohorts:
            if cohort.group == group:
                cohort.rate.set(1.0, self._set[group])

    def _template(self, group: str) -> keras.optimizers.Optimizer:
        return self._templates[group if self._by_group else ""]

    def apply(self, selection: Selection, gradients: Sequence[tuple[tf.Tensor, VariableInfo]]) -> None:
        """Update the variables by their gradients, each by the optimizer of its group and cohort."""
        for cohort in self.cohorts:
            mine = [
                (gradient, variable.variable)
                for gradient, variable in gradients
                if selection.group_of[variable] == cohort.group and id(variable.variable) in cohort.slots
            ]
            if mine:
                count = cohort.optimizer.iterations  # with gradients accumulated, no variable but computed of one
                with read_once(raw(count)) if isinstance(count, keras.Variable) else contextlib.nullcontext():
                    cohort.optimizer.apply(*zip(*mine))

    def state(self, variables: Iterable[VariableInfo]) -> list[tf.Variable]:
        """Return what the optimizers of these variables keep, step counts included."""
        keys = {id(variable.variable) for variable in variables}
        mine = [cohort.optimizer for cohort in self.cohorts if not keys.isdisjoint(cohort.slots)]
        return [raw(variable) for optimizer in mine for variable in optimizer.variables]

    def state_bytes(self, variable: VariableInfo) -> int:
        """Return how many bytes of optimizer state are held for one variable, in all groups that it trained in."""
        slots = [slot for cohort in self.cohorts for slot in cohort.slots.get(id(variable.variable), ())]
        return sum(_bytes(slot) for slot in slots)


def _as_optimizer(optimizer: OptimizerLike) -> keras.optimizers.Optimizer:
    if isinstance(optimizer, str):
        optimizer = keras.optimizers.get(optimizer)
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
    if optimizer.use_ema:
        raise TypeError(
            "`optimizer` must not have `use_ema=True`: it averages, and overwrites, all that it was built with, also "
            f"what is frozen by then. Received: {optimizer!r}. Pass it without, and `ema=...` to the trainer."
        )
    return optimizer


def _new_cohort(group: str, template: keras.optimizers.Optimizer, variables: list[VariableInfo]) -> Cohort:
    optimizer = _compat.clone_optimizer(template)
    slots: dict[int, list[keras.Variable]] = {id(variable.variable): [] for variable in variables}
    rate = Rate(optimizer)
    optimizer.build(_NotingSlots([variable.variable for variable in variables], optimizer, slots))
    return Cohort(group, optimizer, rate, {key: tuple(slot) for key, slot in slots.items()})


class _NotingSlots(list[Any]):
    """The variables that an optimizer is built for, noting what it makes for each.

    Keras' optimizers make their state variable by variable and keep it by position, under names that need not be
    unique; whose it is can be told only while they go through the list.
    """

    def __init__(
        self,
        variables: Iterable[Any],
        optimizer: keras.optimizers.Optimizer,
        slots: Mapping[int, list[keras.Variable]],
    ) -> None:
        super().__init__(variables)
        self._optimizer = optimizer
        self._slots = slots

    def __iter__(self) -> Iterator[Any]:
        for variable in super().__iter__():
            made = len(self._optimizer.variables)
            yield variable
            self._slots[id(variable)].extend(self._optimizer.variables[made:])


def _bytes(variable: keras.Variable) -> int:
    return int(tf.TensorShape(variable.shape).num_elements()) * tf.as_dtype(variable.dtype).size
