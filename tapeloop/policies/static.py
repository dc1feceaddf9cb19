"""Policies that do not change: train all, some, all but some, or in groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError
from tapeloop.model.filters import Filter, FilterLike, to_filter
from tapeloop.model.tree import VariableInfo
from tapeloop.policies.base import DEFAULT_GROUP, VariablePolicy


@dataclass(frozen=True)
class TrainAll(VariablePolicy):
    """Train every variable that can train.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> tl.Trainer(model, tl.TrainAll()).selection
        <Selection: default: 4 variables, 23 parameters>
    """

    def group(self, variable: VariableInfo) -> str | None:
        return DEFAULT_GROUP


@dataclass(frozen=True, init=False)
class TrainOnly(VariablePolicy):
    """Train what any of the filters means, and freeze the rest.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly("head", "**/bias")).selection.trained]
        ['base/bias', 'head/kernel', 'head/bias']
    """

    _filters: tuple[Filter, ...]

    def __init__(self, *filters: FilterLike) -> None:
        object.__setattr__(self, "_filters", _at_least_one(self, filters))

    def __repr__(self) -> str:
        return f"TrainOnly({', '.join(map(repr, self._filters))})"

    def filters(self) -> tuple[Filter, ...]:
        return self._filters

    def group(self, variable: VariableInfo) -> str | None:
        return DEFAULT_GROUP if any(filter_(variable) for filter_ in self._filters) else None

    def rule(self, variable: VariableInfo) -> str:
        return f"TrainOnly: {_matched(self._filters, variable)}"


@dataclass(frozen=True, init=False)
class Freeze(VariablePolicy):
    """Freeze what any of the filters means, and train the rest.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze("base")).selection.trained]
        ['head/kernel', 'head/bias']
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze(*model.layers[:1])).selection.trained]
        ['head/kernel', 'head/bias']
    """

    _filters: tuple[Filter, ...]

    def __init__(self, *filters: FilterLike) -> None:
        object.__setattr__(self, "_filters", _at_least_one(self, filters))

    def __repr__(self) -> str:
        return f"Freeze({', '.join(map(repr, self._filters))})"

    @property
    def freezes_filters(self) -> bool:
        return True

    def filters(self) -> tuple[Filter, ...]:
        return self._filters

    def group(self, variable: VariableInfo) -> str | None:
        return None if any(filter_(variable) for filter_ in self._filters) else DEFAULT_GROUP

    def rule(self, variable: VariableInfo) -> str:
        return f"Freeze: {_matched(self._filters, variable)}"


@dataclass(frozen=True, init=False)
class Groups(VariablePolicy):
    """Train each filter's variables as a group of their own; what none means is frozen, and overlap is an error.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> policy = tl.Groups({"slow": "base", "fast": "head"}, multipliers={"slow": 0.1})
        >>> dict(tl.Trainer(model, policy, optimizer=keras.optimizers.SGD(1.0)).learning_rates)
        {'slow': 0.1, 'fast': 1.0}
    """

    _groups: tuple[tuple[str, Filter], ...]
    _multipliers: tuple[tuple[str, float], ...]

    def __init__(self, groups: Mapping[str, FilterLike], *, multipliers: Mapping[str, float] | None = None) -> None:
        """Set the groups.

        Args:
            groups: What trains in each.
            multipliers: By how much the learning rate of a group is multiplied; 1 for those left out.

        Raises:
            TypeError: `groups` is no mapping to filters.
            PolicyError: A multiplier is for a group that there is not.
            ValueError: A multiplier is no number of 0 or more, or not finite.
        """
        if not isinstance(groups, Mapping) or not groups:
            raise TypeError(f"`Groups` takes a mapping from names of groups to filters. Received: {groups!r}.")
        resolved = tuple((name, to_filter(filter_)) for name, filter_ in groups.items())
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

    def filters(self) -> tuple[Filter, ...]:
        return tuple(filter_ for _, filter_ in self._groups)

    def group(self, variable: VariableInfo) -> str | None:
        matches = {name: filter_ for name, filter_ in self._groups if filter_(variable)}
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
        return f"Groups: {_matched(self.filters(), variable)}"


def _at_least_one(policy: VariablePolicy, filters: tuple[FilterLike, ...]) -> tuple[Filter, ...]:
    if not filters:
        raise TypeError(f"`{type(policy).__name__}` takes one or more filters. Received none: write `TrainAll()`.")
    return tuple(map(to_filter, filters))


def _matched(filters: Iterable[Filter], variable: VariableInfo) -> str:
    return next((repr(filter_) for filter_ in filters if filter_(variable)), "all else")
