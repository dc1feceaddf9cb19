"""Policies that do not change: train all, some, all but some, or in groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError
from tapeloop.model.filters import Where, WhereLike, as_where
from tapeloop.model.tree import VariableInfo
from tapeloop.policies.base import DEFAULT_GROUP, VariablePolicy


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
