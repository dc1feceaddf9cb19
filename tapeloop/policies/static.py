"""Policies that do not change: train all, some, all but some, or in groups."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, init=False, repr=False)
class _OfFilters:
    """The base of `TrainOnly` and `Freeze`, which have filters."""

    _filters: tuple[Filter, ...]

    def __init__(self, *filters: FilterLike) -> None:
        if not filters:
            raise TypeError(f"`{type(self).__name__}` takes one or more filters. Received none: write `TrainAll()`.")
        object.__setattr__(self, "_filters", tuple(map(to_filter, filters)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._filters))})"

    def filters(self) -> tuple[Filter, ...]:
        return self._filters


@dataclass(frozen=True, init=False, repr=False)
class TrainOnly(_OfFilters, VariablePolicy):
    """Train the variables that any of the filters chooses, and freeze the rest.

    Args:
        *filters: Path globs, layers, classes of layers, lists of these, or filters.

    Raises:
        TypeError: There are no filters, or one of them is none of these.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly("head", "**/bias")).selection.trained]
        ['base/bias', 'head/kernel', 'head/bias']
    """

    def group(self, variable: VariableInfo) -> str | None:
        return DEFAULT_GROUP if any(filter_(variable) for filter_ in self._filters) else None


@dataclass(frozen=True, init=False, repr=False)
class Freeze(_OfFilters, VariablePolicy):
    """Freeze the variables that any of the filters chooses, and train the rest.

    Args:
        *filters: Path globs, layers, classes of layers, lists of these, or filters.

    Raises:
        TypeError: There are no filters, or one of them is none of these.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze("base")).selection.trained]
        ['head/kernel', 'head/bias']
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze(*model.layers[:1])).selection.trained]
        ['head/kernel', 'head/bias']
    """

    freezes_filters = True

    def group(self, variable: VariableInfo) -> str | None:
        return None if any(filter_(variable) for filter_ in self._filters) else DEFAULT_GROUP


@dataclass(frozen=True, init=False, repr=False)
class Groups(VariablePolicy):
    """Train each filter's variables as a group, and freeze the rest; a variable in two groups is an error.

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
            groups: From names of groups to filters: path globs, layers, classes of layers, lists of these.
            multipliers: By how much the learning rate of a group is multiplied; 1 for groups left out.

        Raises:
            TypeError: `groups` is no mapping to filters.
            PolicyError: A multiplier is for a group that does not exist.
            ValueError: A multiplier is no number of 0 or more, or not finite.
        """
        if not isinstance(groups, Mapping) or not groups:
            raise TypeError(f"`Groups` takes a mapping from names of groups to filters. Received: {groups!r}.")
        factors = multipliers or {}
        if unknown := sorted(set(factors) - set(groups)):
            raise PolicyError(
                f"`multipliers` are for {unknown}, but the groups are {sorted(groups)}. Name one of these."
            )
        # Tuples of pairs and not dicts: a policy is a value with a hash.
        checked = ((name, not_negative(f"multipliers[{name!r}]", factor)) for name, factor in factors.items())
        filters = ((name, to_filter(filter_)) for name, filter_ in groups.items())
        object.__setattr__(self, "_groups", tuple(filters))
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
        # If the first group won, what trains would hang on the order of a dict; so an overlap is the user's to decide.
        if len(matches) > 1:
            is_tied = len(variable.paths) > 1
            what = "The tied weight" if is_tied else "The variable"
            remedy = "give all its paths to one of them" if is_tied else "narrow one of them with `& ~...`"
            raise PolicyError(
                f"{what} {' = '.join(f'`{path}`' for path in variable.paths)} is in {len(matches)} groups: "
                f"{matches!r}. A variable trains in one group: {remedy}."
            )
        return next(iter(matches), None)
