"""Policies: what trains, in which group, and which submodels run in inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tapeloop.checks import not_negative
from tapeloop.errors import PolicyError
from tapeloop.tree import SubmodelInfo, VariableInfo
from tapeloop.where import Where, WhereLike, as_where

DEFAULT_GROUP = "default"


@dataclass(frozen=True)
class Progress:
    """How far training has come, for policies that change as it goes.

    Attributes:
        step: How many steps were trained, over all fits.
        epoch: How many epochs were trained, over all fits.
        logs: At an epoch's start the logs of the last epoch, validation included; within an epoch those of it so far.
            Empty before the first.
    """

    step: int = 0
    epoch: int = 0
    logs: Mapping[str, float] = field(default_factory=dict)

    def count(self, unit: str) -> int:
        """Return `step` or `epoch`."""
        return self.step if unit == "step" else self.epoch


class VariablePolicy:
    """Gives every trainable variable a group, or freezes it. Subclass it and write `group`.

    One that changes as training goes writes `at` instead. It is asked at the start of every epoch and, where `every` is
    set, every so many steps.
    """

    @property
    def every(self) -> int | None:
        """After how many steps `at` is asked within an epoch, or None for at epochs' starts alone."""
        return None

    def at(self, progress: Progress) -> VariablePolicy:
        """Return the policy that holds at `progress`: this one, unless training going on changes it."""
        return self

    def group(self, variable: VariableInfo) -> str | None:
        """Name the group in which `variable` trains.

        Args:
            variable: A variable that Keras says can train; others are never asked about.

        Returns:
            The group's name, or None to freeze the variable.
        """
        raise NotImplementedError(f"{type(self).__name__} must write `group(self, variable)`.")

    def inference(self, submodel: SubmodelInfo, trained: bool) -> bool:
        """Tell whether `submodel` runs in inference mode.

        Args:
            submodel: A submodel that owns variables that can train. Others follow what encloses them.
            trained: Whether any variable under it trains.
        """
        return not trained

    def phases(self) -> tuple[VariablePolicy, ...]:
        """The policies that may hold as training goes, where they are known before it: each is checked at its start."""
        return ()

    def multiplier(self, variable: VariableInfo) -> float:
        """Return by how much the learning rate of the variable's group is multiplied; one number for each group."""
        return 1.0

    def rule(self, variable: VariableInfo) -> str:
        """Name the rule by which `variable` got its group or was frozen, for the report."""
        return type(self).__name__

    def wheres(self) -> tuple[Where, ...]:
        """The wheres of this policy: each must match a variable, one that can train unless `freezes_wheres`."""
        return ()

    @property
    def freezes_wheres(self) -> bool:
        """Whether the wheres say what is frozen; what Keras' flags have frozen may be frozen again."""
        return False


@dataclass(frozen=True)
class TrainAll(VariablePolicy):
    """Train every variable that can train."""

    def group(self, variable: VariableInfo) -> str | None:
        return DEFAULT_GROUP


@dataclass(frozen=True, init=False)
class TrainOnly(VariablePolicy):
    """Train what any of the wheres means, and freeze the rest."""

    _wheres: tuple[Where, ...]

    def __init__(self, *wheres: WhereLike) -> None:
        object.__setattr__(self, "_wheres", _at_least_one(self, wheres))

    def __repr__(self) -> str:
        return f"TrainOnly({', '.join(map(repr, self._wheres))})"

    def wheres(self) -> tuple[Where, ...]:
        return self._wheres

    def group(self, variable: VariableInfo) -> str | None:
        return DEFAULT_GROUP if any(where(variable) for where in self._wheres) else None

    def rule(self, variable: VariableInfo) -> str:
        return f"TrainOnly: {_matched(self._wheres, variable)}"


@dataclass(frozen=True, init=False)
class Freeze(VariablePolicy):
    """Freeze what any of the wheres means, and train the rest."""

    _wheres: tuple[Where, ...]

    def __init__(self, *wheres: WhereLike) -> None:
        object.__setattr__(self, "_wheres", _at_least_one(self, wheres))

    def __repr__(self) -> str:
        return f"Freeze({', '.join(map(repr, self._wheres))})"

    @property
    def freezes_wheres(self) -> bool:
        return True

    def wheres(self) -> tuple[Where, ...]:
        return self._wheres

    def group(self, variable: VariableInfo) -> str | None:
        return None if any(where(variable) for where in self._wheres) else DEFAULT_GROUP

    def rule(self, variable: VariableInfo) -> str:
        return f"Freeze: {_matched(self._wheres, variable)}"


@dataclass(frozen=True, init=False)
class Groups(VariablePolicy):
    """Train each where's variables as a group of their own; what none means is frozen, and overlap is an error."""

    _groups: tuple[tuple[str, Where], ...]
    _multipliers: tuple[tuple[str, float], ...]

    def __init__(self, groups: Mapping[str, WhereLike], *, multipliers: Mapping[str, float] | None = None) -> None:
        """Set the groups.

        Args:
            groups: What trains in each.
            multipliers: By how much the learning rate of a group is multiplied; 1 for those left out.

        Raises:
            TypeError: `groups` is no mapping to wheres.
            PolicyError: A multiplier is for a group that there is not.
            ValueError: A multiplier is no number of 0 or more, or not finite.
        """
        if not isinstance(groups, Mapping) or not groups:
            raise TypeError(f"`Groups` takes a mapping from names of groups to wheres. Received: {groups!r}.")
        resolved = tuple((name, as_where(where)) for name, where in groups.items())
        unknown = sorted(set(multipliers or {}) - set(groups))
        if unknown:
            raise PolicyError(
                f"`multipliers` are for {unknown}, but the groups are {sorted(groups)}. Name one of these."
            )
        checked = (
            (name, not_negative(f"multipliers[{name!r}]", factor)) for name, factor in (multipliers or {}).items()
        )
        object.__setattr__(self, "_groups", resolved)
        object.__setattr__(self, "_multipliers", tuple(checked))

    def __repr__(self) -> str:
        multipliers = f", multipliers={dict(self._multipliers)!r}" if self._multipliers else ""
        return f"Groups({dict(self._groups)!r}{multipliers})"

    def multiplier(self, variable: VariableInfo) -> float:
        return dict(self._multipliers).get(self.group(variable) or "", 1.0)

    def wheres(self) -> tuple[Where, ...]:
        return tuple(where for _, where in self._groups)

    def group(self, variable: VariableInfo) -> str | None:
        matches = {name: where for name, where in self._groups if where(variable)}
        if len(matches) > 1:
            tied = len(variable.paths) > 1
            what = "the tied weight" if tied else "the variable"
            remedy = "give all its paths to one of them" if tied else "narrow one of them with `& ~...`"
            raise PolicyError(
                f"{what.capitalize()} {' = '.join(f'`{path}`' for path in variable.paths)} is in "
                f"{len(matches)} groups: {matches!r}. A variable trains in one group: {remedy}."
            )
        return next(iter(matches), None)

    def rule(self, variable: VariableInfo) -> str:
        return f"Groups: {_matched(self.wheres(), variable)}"


def _at_least_one(policy: VariablePolicy, wheres: tuple[WhereLike, ...]) -> tuple[Where, ...]:
    if not wheres:
        raise TypeError(f"`{type(policy).__name__}` takes one or more wheres. Received none: write `TrainAll()`.")
    return tuple(map(as_where, wheres))


def _matched(wheres: Iterable[Where], variable: VariableInfo) -> str:
    return next((repr(where) for where in wheres if where(variable)), "all else")


def is_value(policy: VariablePolicy) -> bool:
    """Tell whether a policy is a value, and not an object that may answer anew each time it is asked."""
    try:
        hash(policy)
    except TypeError:
        return False
    return type(policy).__hash__ is not object.__hash__
