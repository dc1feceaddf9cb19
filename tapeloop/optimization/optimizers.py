"""Optimizers: state that belongs to variables, kept while groups are renamed, split and joined."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tapeloop._backend.patching import patched, read_once
from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError, listed
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo, raw
from tapeloop.optimization.clipping import clip_by_global_norm
from tapeloop.optimization.cohort import Cohort, carry_over, new_cohort
from tapeloop.optimization.user_optimizer import Template

OptimizerLike: TypeAlias = Any  # keras.optimizers.Optimizer | str | Mapping[str, either]
Gradients: TypeAlias = Sequence[tuple[tf.Tensor, VariableInfo]]


class LearningRates(Mapping[str, float]):
    """The learning rates by group, to be read and set: `trainer.learning_rates["head"] = 1e-4`."""

    def __init__(self, optimizers: Optimizers, selection: Selection) -> None:
        self._optimizers = optimizers
        self._selection = selection

    def __getitem__(self, group: str) -> float:
        return self._optimizers.learning_rate(self._selection, self._known(group))

    def __setitem__(self, group: str, value: float) -> None:
        self._optimizers.set_learning_rate(self._selection, self._known(group), value)

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


class Optimizers:
    """The optimizers of all groups.

    A variable's state starts when it first trains, in a cohort of those that begin with it, and stays with it: while
    it is frozen, and under whatever name its group goes. What never trains never gets any.
    """

    def __init__(self, template: OptimizerLike) -> None:
        """Check and keep the user's optimizers.

        Args:
            template: A Keras optimizer or its name, for every group; or a mapping with one for each group. The first
                cohort has the very object, others have clones.

        Raises:
            TypeError: One of them is no Keras optimizer, or decides something for its own variables alone.
            ValueError: A learning rate is below 0, or not finite.
        """
        self._by_group = isinstance(template, Mapping)
        named = template.items() if isinstance(template, Mapping) else [("", template)]
        # One object may serve several groups: it is one template then, and its variables may share a cohort.
        known: dict[int, Template] = {}
        self._templates = {name: known.setdefault(id(one), Template(one)) for name, one in named}
        self._set: dict[str, float] = {}
        self._home: dict[tuple[VariableInfo, str], Cohort] = {}  # of a variable under a template
        self._latest: dict[VariableInfo, Cohort] = {}  # in which a variable trained last
        self.cohorts: list[Cohort] = []

    @property
    def are_keras(self) -> bool:
        """Whether all of them update as Keras' own do, of gradients and their state alone."""
        kinds = {type(template.optimizer) for template in self._templates.values()}
        methods = [getattr(kind, name) for kind in kinds for name in ("apply", "update_step")]
        return all(method.__module__.startswith("keras.") for method in methods)

    def require_groups(self, selections: Sequence[Selection], *, changing: bool = False) -> None:
        """Check that there is an optimizer for each group, and, unless the policy is changing, a group for each.

        Args:
            selections: What trains, one after the other.
            changing: Whether the policy changes as training goes, so that other groups may come later.

        Raises:
            PolicyError: There is not, or one would have to be cloned for a second cohort and cannot be.
        """
        names = set(self._templates)
        for selection in selections:
            groups = set(selection.groups)
            if self._by_group and not (groups <= names if changing else groups == names):
                raise PolicyError(
                    f"`optimizer` must have one entry for each group of the policy. "
                    f"The groups are {sorted(groups)}, the optimizers are for {sorted(names)}."
                )
        # How many cohorts each template will need: one for each set of variables that joins. The second needs a clone,
        # and an optimizer that cannot be cloned is found here, before anything has moved.
        known, cohorts = set(self._home), dict.fromkeys(self._templates.values(), 0)
        for selection in selections:
            for group, variables in selection.groups.items():
                joining = {(variable, self._key(group)) for variable in variables} - known
                cohorts[self._templates[self._key(group)]] += bool(joining)
                known |= joining
        for template, count in cohorts.items():
            template.require_clones(count)

    def prepare(self, selection: Selection, *, changing: bool = False) -> None:
        """Make the state of every variable that trains and has none, and set the groups' learning rates.

        Args:
            selection: What trains.
            changing: Whether the policy changes as training goes, so that other groups may come later.

        Raises:
            PolicyError: As `require_groups` does.
        """
        self.require_groups([selection], changing=changing)
        for group, variables in selection.groups.items():
            self._welcome(group, variables)
        # A cohort that is frozen in this phase keeps the groups that it had.
        for cohort in self.cohorts:
            groups = self._groups(cohort, selection)
            if groups:
                cohort.regroup(groups)
        self._refresh()
        for group in selection.groups:
            self._set_rates(selection, group)

    def _refresh(self) -> None:
        """Take in the learning rates that the user has assigned to optimizers: they hold over what was set before."""
        for key, template in self._templates.items():
            mine = [cohort for cohort in self.cohorts if cohort.optimizer is template.optimizer]
            given = [float(share.rate) for cohort in mine for share in cohort.shares.values()]
            if template.refresh(given):
                self._set = {group: rate for group, rate in self._set.items() if self._key(group) != key}

    def learning_rate(self, selection: Selection, group: str) -> float:
        """Return the learning rate of a group now: where cohorts differ, that of the one that began first."""
        multiplier, rate = selection.multipliers[group], self._set.get(group)
        for cohort in self.cohorts:
            if group in self._groups(cohort, selection):
                return cohort.rate.get(multiplier, rate)
        return multiplier * float(self._templates[self._key(group)].rate) if rate is None else rate

    def settings(self, selection: Selection | None) -> list[str]:
        """Say which optimizers update what trains, at which learning rates: `Adam(0.001)`. No variable is read.

        Args:
            selection: What trains, or None if that is not known.
        """
        groups: dict[str, list[str]] = {}
        for group in self._templates if selection is None else selection.groups:
            template = self._templates.get(self._key(group))
            if template is None:
                groups.setdefault("none", []).append(group)
                continue
            multiplier = 1.0 if selection is None else selection.multipliers.get(group, 1.0)
            rate = (
                f"{self._set.get(group, multiplier * template.rate):.4g}" if template.schedule is None else "schedule"
            )
            groups.setdefault(f"{type(template.optimizer).__name__}({rate})", []).append(group)
        if len(groups) == 1 and "none" not in groups:
            return list(groups)
        return [f"{said} for {listed(names, most=3)}" for said, names in groups.items()]

    def set_learning_rate(self, selection: Selection, group: str, value: float) -> None:
        """Set the learning rate of a group, from now on and without a new trace.

        Raises:
            TypeError: The group's optimizer follows a schedule.
            ValueError: The rate is no number of 0 or more, or not finite.
        """
        rate = not_negative("learning_rates", value)
        if self._templates[self._key(group)].schedule is not None:
            raise TypeError(
                f"The learning rate of the group {group!r} follows a schedule, and cannot be set to {value!r}. "
                "Give the group's optimizer a number, or end the schedule there."
            )
        self._set[group] = rate
        self._set_rates(selection, group)

    def apply(self, selection: Selection, gradients: Gradients) -> None:
        """Update the variables by their gradients, each by the optimizer of its group and cohort."""
        by_template: dict[str, list[tuple[tf.Tensor, VariableInfo]]] = {}
        for gradient, variable in gradients:
            by_template.setdefault(self._key(selection.group_of[variable]), []).append((gradient, variable))
        parts: dict[tuple[Cohort, str], list[tuple[tf.Tensor, VariableInfo]]] = {}
        for key, pairs in by_template.items():
            # The optimizer of each cohort would take the norm over its own variables alone.
            norm = self._templates[key].optimizer.global_clipnorm
            for gradient, variable in clip_by_global_norm(pairs, norm) if norm else pairs:
                part = self._home[variable, key], selection.group_of[variable]
                parts.setdefault(part, []).append((gradient, variable))
        # In the order in which cohorts began, whatever order the gradients came in: one trace, one order.
        for cohort in self.cohorts:
            groups = self._groups(cohort, selection)
            for group in groups:
                if (cohort, group) in parts:
                    with patched(cohort.optimizer, "global_clipnorm", None):
                        self._apply(cohort, group, parts[cohort, group], spread=len(groups) > 1)

    @property
    def variables(self) -> list[tf.Variable]:
        """What the optimizers keep: slots, step counts, learning rates."""
        return [variable for cohort in self.cohorts for variable in cohort.variables]

    def state(self, variables: Iterable[VariableInfo]) -> list[tf.Variable]:
        """Return what the optimizers of these variables keep, step counts included."""
        wanted = set(variables)
        mine = [cohort for cohort in self.cohorts if not wanted.isdisjoint(cohort.slots)]
        return [variable for cohort in mine for variable in cohort.variables]

    def state_bytes(self, variable: VariableInfo) -> int:
        """Return how many bytes of optimizer state are held for one variable, in all groups that it trained in."""
        slots = [slot for cohort in self.cohorts for slot in cohort.slots.get(variable, ())]
        return sum(_bytes(slot) for slot in slots)

    def expected_bytes(self, selection: Selection, variable: VariableInfo) -> int:
        """Return how many bytes of state there are for a variable, or will be once a selection trains it."""
        group = selection.group_of.get(variable)
        return self.state_bytes(variable) or (0 if group is None else self.slot_bytes(variable, group))

    def slot_bytes(self, variable: VariableInfo, group: str) -> int:
        """Return how many bytes of state a variable has, or would have, while it trains in a group."""
        return self._templates[self._key(group)].slot_numbers(variable.shape) * (variable.bytes // (variable.size or 1))

    def named_variables(self) -> dict[str, tf.Variable]:
        """Return what the optimizers keep, by names that say what each variable belongs to."""
        return {
            f"{self._key_of(cohort) or 'all'}/{name}": variable
            for cohort in self.cohorts
            for name, variable in cohort.named_variables().items()
        }

    def describe(self) -> dict[str, Any]:
        """Return, as JSON has it, what `rebuild` needs to make the same variables."""
        latest: dict[Cohort, list[str]] = {cohort: [] for cohort in self.cohorts}
        for variable, cohort in self._latest.items():
            latest[cohort].append(variable.path)
        cohorts = [
            {
                "optimizer": self._key_of(cohort),
                "variables": [variable.path for variable in cohort.slots],
                "groups": list(cohort.groups),
                "groups_so_far": list(cohort.shares),
                "updates": latest[cohort],
            }
            for cohort in self.cohorts
        ]
        templates = {key: template.describe() for key, template in self._templates.items()}
        return {"cohorts": cohorts, "configured": templates, "learning_rates_set": dict(self._set)}

    def differences(self, description: Mapping[str, Any]) -> list[str]:
        """Say why these optimizers cannot hold the state that was described; an empty list if they can."""
        kinds = {key: type(template.optimizer).__name__ for key, template in self._templates.items()}
        there = {entry["optimizer"] for entry in description["cohorts"]}
        said = []
        for key in sorted(there):
            kind, name = description["configured"][key]["kind"], f"the group {key!r}" if key else "all groups"
            if key not in kinds:
                said.append(f"it has an optimizer for {name}, the trainer has those for {sorted(kinds)}")
            elif kinds[key] != kind:
                said.append(f"the optimizer of {name} is {kind} there and {kinds[key]} here")
            elif description["configured"][key]["slots"] != self._templates[key].slot_settings:
                slots = description["configured"][key]["slots"], self._templates[key].slot_settings
                said.append(f"the {kind} of {name} has {slots[0]} there and {slots[1]} here")
        return said

    def rebuild(self, description: Mapping[str, Any], by_path: Mapping[str, VariableInfo]) -> bool:
        """Make the variables that were described, and tell whether some of those there were are gone.

        Args:
            description: What `describe` returned, in this process or another.
            by_path: The model's variables by their paths; others are left out.
        """
        free = {cohort: self._key_of(cohort) for cohort in self.cohorts}
        self.cohorts, self._home, self._latest = [], {}, {}
        for entry in description["cohorts"]:
            variables, key = [by_path[path] for path in entry["variables"] if path in by_path], entry["optimizer"]
            if not variables:
                continue
            # What is there already stays, so that compiled steps which update it stay good.
            alike = [cohort for cohort in free if free[cohort] == key and list(cohort.slots) == variables]
            cohort = alike[0] if alike else new_cohort(self._templates[key], variables)
            free.pop(cohort, None)
            for group in entry["groups_so_far"]:
                cohort.spread_over(group)
            cohort.groups = tuple(entry["groups"])
            self.cohorts.append(cohort)
            self._home |= {(variable, key): cohort for variable in variables}
            self._latest |= {by_path[path]: cohort for path in entry["updates"] if path in by_path}
        for key, template in self._templates.items():
            if key in description["configured"]:
                template.restore(description["configured"][key])
        self._set = dict(description["learning_rates_set"])
        return bool(free)

    def on_trial(self) -> Optimizers:
        """Return optimizers that go on from the state of these, in the same variables, and share nothing else.

        What their steps leave behind is values: nothing of these optimizers is made, moved to a group or set.
        """
        self._refresh()
        other = copy.copy(self)
        templates = {template: template.on_trial() for template in self._templates.values()}
        cohorts = {cohort: dataclasses.replace(cohort, shares=dict(cohort.shares)) for cohort in self.cohorts}
        other._templates = {key: templates[template] for key, template in self._templates.items()}
        other._set = dict(self._set)
        other._home = {place: cohorts[cohort] for place, cohort in self._home.items()}
        other._latest = {variable: cohorts[cohort] for variable, cohort in self._latest.items()}
        other.cohorts = list(cohorts.values())
        return other

    def start_over(self) -> None:
        """Let go of all state: every variable starts anew when it next trains."""
        self.cohorts, self._home, self._latest = [], {}, {}

    def _key_of(self, cohort: Cohort) -> str:
        """Name the template of a cohort's optimizer."""
        return next(key for (_, key), home in self._home.items() if home is cohort)

    def _key(self, group: str) -> str:
        """Name the template of a group's optimizer."""
        return group if self._by_group else ""

    def _groups(self, cohort: Cohort, selection: Selection) -> tuple[str, ...]:
        """Name the groups of a selection in which a cohort's variables train."""
        return tuple(
            group
            for group, variables in selection.groups.items()
            if any(self._home.get((variable, self._key(group))) is cohort for variable in variables)
        )

    def _welcome(self, group: str, variables: Sequence[VariableInfo]) -> None:
        """Give every variable of a group a cohort under the group's template, with the state that it has already."""
        key = self._key(group)
        joining: dict[Cohort | None, list[VariableInfo]] = {}
        for variable in variables:
            home, latest = self._home.get((variable, key)), self._latest.get(variable)
            if home is None:
                joining.setdefault(latest, []).append(variable)
            elif latest is not home:
                carry_over(latest, home, [variable])
            if home is not None:
                self._latest[variable] = home
        # Variables that come from different cohorts have different step counts, so that they cannot share a new one.
        for latest, together in joining.items():
            cohort = new_cohort(self._templates[key], together)
            carry_over(latest, cohort, together)
            self.cohorts.append(cohort)
            for variable in together:
                self._home[variable, key] = self._latest[variable] = cohort

    def _set_rates(self, selection: Selection, group: str) -> None:
        multiplier, rate = selection.multipliers.get(group, 1.0), self._set.get(group)
        for cohort in self.cohorts:
            groups, setting = self._groups(cohort, selection), cohort.rate.setting(multiplier, rate)
            if groups == (group,):
                cohort.rate.assign(setting)
                if cohort.optimizer is self._templates[self._key(group)].optimizer:
                    self._templates[self._key(group)].saw()
            elif group in groups:
                cohort.shares[group].rate.assign(setting)

    def _apply(self, cohort: Cohort, group: str, gradients: Gradients, *, spread: bool) -> None:
        """Update variables of one cohort and group; if the cohort is spread, with the group's own rate and counts."""
        optimizer, counts = cohort.optimizer, cohort.counts
        share = cohort.shares[group] if spread else None
        # Slots stay where they are; rate and counts are put into the optimizer for this group and taken out after it,
        # so that a phase that returns costs no trace.
        if share is not None:
            # Its value: Keras would track a variable that is set as an attribute.
            cohort.rate.assign(share.rate.read_value())
            for count, own in zip(counts, share.counts):
                count.assign(own)
        # Keras reads the step count for each variable, and TensorFlow does not compute once what comes of two reads.
        with read_once(raw(optimizer.iterations)):
            optimizer.apply(*zip(*((gradient, variable.variable) for gradient, variable in gradients)))
        if share is not None:
            for count, own in zip(counts, share.counts):
                own.assign(count)


def _bytes(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
