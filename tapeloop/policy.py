"""Policies: what trains, in which group, and which submodels run in inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tapeloop.errors import PolicyError
from tapeloop.tree import SubmodelInfo, VariableInfo
from tapeloop.where import Where, WhereLike, as_where

DEFAULT_GROUP = "default"


class VariablePolicy:
    """Gives every trainable variable a group, or freezes it. Subclass it and write `group`."""

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

    def rule(self, variable: VariableInfo) -> str:
        """Name the rule by which `variable` got its group or was frozen, for the report."""
        return type(self).__name__

    def wheres(self) -> tuple[Where, ...]:
        """The wheres of this policy: each must match a variable that can train."""
        return ()


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

    def __init__(self, groups: Mapping[str, WhereLike]) -> None:
        if not isinstance(groups, Mapping) or not groups:
            raise TypeError(f"`Groups` takes a mapping from names of groups to wheres. Received: {groups!r}.")
        resolved = tuple((name, as_where(where)) for name, where in groups.items())
        object.__setattr__(self, "_groups", resolved)

    def __repr__(self) -> str:
        return f"Groups({dict(self._groups)!r})"

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
    return tuple(as_where(where) for where in wheres)


def _matched(wheres: Iterable[Where], variable: VariableInfo) -> str:
    return next((repr(where) for where in wheres if where(variable)), "all else")
