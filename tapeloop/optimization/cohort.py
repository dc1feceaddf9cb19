"""Cohorts: variables that began to train together, with one optimizer for their state and step count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop.model.tree import VariableInfo, raw
from tapeloop.optimization.learning_rate import Rate
from tapeloop.optimization.user_optimizer import Template


@dataclass(frozen=True, eq=False)
class Share:
    """What one of several groups has of a cohort that a policy spreads over them.

    Attributes:
        rate: The group's learning rate, or what its schedule is multiplied by.
        counts: The group's own values of what the optimizer keeps for all its variables: its step count, say.
    """

    rate: tf.Variable
    counts: tuple[tf.Variable, ...]


@dataclass(eq=False)
class Cohort:
    """Variables that began to train together, and the optimizer that holds their state and step count.

    Attributes:
        optimizer: The Keras optimizer, built for these variables alone.
        rate: What sets its learning rate.
        slots: For each variable, the optimizer's variables that belong to it.
        groups: The groups in which its variables train now.
        shares: What each group has of it that it was ever spread over.
    """

    optimizer: keras.optimizers.Optimizer
    rate: Rate
    slots: Mapping[VariableInfo, list[keras.Variable]]
    groups: tuple[str, ...] = ()
    shares: dict[str, Share] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[tf.Variable, ...]:
        """What the optimizer keeps for all its variables together, but for its learning rate."""
        slots = {id(slot) for slots in self.slots.values() for slot in slots}
        rate = keras_internals.learning_rate_variable(self.optimizer)
        return tuple(raw(v) for v in self.optimizer.variables if id(v) not in slots and v is not rate)

    @property
    def variables(self) -> list[tf.Variable]:
        """What the optimizer keeps, and the counts of the groups that it is spread over."""
        shared = [count for share in self.shares.values() for count in share.counts]
        return [*(raw(variable) for variable in self.optimizer.variables), *shared]

    def named_variables(self) -> dict[str, tf.Variable]:
        """Return what `variables` returns by names that say what each belongs to."""
        slots = {f"slot/{v.path}/{n}": raw(slot) for v, slots in self.slots.items() for n, slot in enumerate(slots)}
        # A variable is in one cohort of an optimizer's, so that the first of them can stand for all.
        first = next(iter(self.slots)).path
        own = {f"count/{first}/{n}": count for n, count in enumerate(self.counts)}
        shared = {
            f"share/{group}/{first}/{n}": variable
            for group, share in self.shares.items()
            for n, variable in enumerate((share.rate, *share.counts))
        }
        rate = keras_internals.learning_rate_variable(self.optimizer)
        return slots | own | shared | ({} if rate is None else {f"rate/{first}": raw(rate)})

    def spread_over(self, group: str) -> None:
        """Make what a group has of it, if the group has none."""
        if group not in self.shares:
            copies = tuple(tf.Variable(count, trainable=False, name="count") for count in self.counts)
            self.shares[group] = Share(tf.Variable(0.0, trainable=False, name="rate"), copies)

    def regroup(self, groups: tuple[str, ...]) -> None:
        """Have its variables train in these groups from now on, each going on from the highest step count there is."""
        if groups == self.groups:
            return
        self.groups = groups
        if len(groups) > 1:
            for group in groups:
                self.spread_over(group)
        # An Adam that started again at step 0 would overshoot: its bias correction is made for zero moments. So each
        # group goes on from the highest count there is.
        if self.shares:
            held = [self.counts, *(share.counts for share in self.shares.values())]
            furthest = max(held, key=lambda counts: int(counts[0]))  # the first is `iterations`
            values = [count.numpy() for count in furthest]
            for counts in held:
                for count, value in zip(counts, values):
                    count.assign(value)


def new_cohort(template: Template, variables: list[VariableInfo]) -> Cohort:
    """Return a cohort of variables that have no state yet under a template's optimizers."""
    optimizer = template.optimizer_for_a_cohort()
    slots: dict[VariableInfo, list[keras.Variable]] = {variable: [] for variable in variables}
    rate = Rate(optimizer, lambda: template.rate)
    optimizer.build(_NotingSlots(optimizer, slots))
    return Cohort(optimizer, rate, slots)


def carry_over(source: Cohort | None, target: Cohort, variables: Sequence[VariableInfo]) -> None:
    """Give variables that go from one optimizer to another of its kind the state that they have, and its step count."""
    if source is None or type(source.optimizer) is not type(target.optimizer):
        return
    for variable in variables:
        own, other = source.slots[variable], target.slots[variable]
        if [slot.shape for slot in own] == [slot.shape for slot in other]:
            for before, after in zip(own, other):
                after.assign(before)
    if len(source.counts) == len(target.counts) and int(source.counts[0]) > int(target.counts[0]):
        for before, after in zip(source.counts, target.counts):
            after.assign(before)


class _NotingSlots(list[Any]):
    """The variables that an optimizer is built for, noting what it makes for each.

    Keras' optimizers make their state variable by variable and keep it by position, under names that need not be
    unique; whose it is can be told only while they go through the list.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, slots: Mapping[VariableInfo, list[keras.Variable]]
    ) -> None:
        super().__init__(variable.variable for variable in slots)
        self._optimizer = optimizer
        self._slots = slots

    def __iter__(self) -> Iterator[Any]:
        for variable, slots in self._slots.items():
            made = len(self._optimizer.variables)
            yield variable.variable
            slots += self._optimizer.variables[made:]
