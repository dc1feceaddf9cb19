"""Policies: what trains, in which group, and which submodels run in inference mode."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import keras

from tapeloop.errors import PolicyError
from tapeloop.selection import Selection
from tapeloop.tree import SubmodelInfo, Tree, VariableInfo
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

    def select(self, tree: Tree) -> Selection:
        """Resolve this policy for a model.

        Raises:
            PolicyError: A where matches nothing, groups overlap, or nothing is left to train.
        """
        if not tree.variables:
            raise PolicyError(
                f"{self!r} was asked what trains, but the model has no variables. Pass a model with weights; "
                "if it makes them in its first call, call it on a batch before."
            )
        for where in self.wheres():
            _check_match(self, where, tree)
        groups: dict[str, list[VariableInfo]] = {}
        frozen, non_trainable = [], []
        rules = {}
        for variable in tree.variables:
            group = self.group(variable) if variable.trainable else None
            if group is not None:
                groups.setdefault(_checked_name(self, group, variable), []).append(variable)
            elif variable.trainable:
                frozen.append(variable)
            else:
                non_trainable.append(variable)
            rules[variable] = self.rule(variable) if variable.trainable else _flag(variable)
        if not groups:
            raise PolicyError(_nothing_left(self, frozen))
        return Selection(
            tree,
            {group: tuple(variables) for group, variables in groups.items()},
            tuple(frozen),
            tuple(non_trainable),
            _inference(self, tree, {variable for group in groups.values() for variable in group}),
            rules,
        )


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


def _checked_name(policy: VariablePolicy, group: object, variable: VariableInfo) -> str:
    if not isinstance(group, str) or not group:
        raise PolicyError(
            f"`{type(policy).__name__}.group` must return the name of a group, or None to freeze. "
            f"Received: {group!r} for the variable `{variable.path}`."
        )
    return group


def _check_match(policy: VariablePolicy, where: Where, tree: Tree) -> None:
    matches = [variable for variable in tree.variables if where(variable)]
    if not matches:
        raise PolicyError(f"{where!r} in {policy!r} matches no variable of the model. {_nearest(where, tree)}")
    if not any(variable.trainable for variable in matches):
        raise PolicyError(
            f"{where!r} in {policy!r} matches only variables that Keras holds non-trainable: {_listed(matches)}. "
            "Set `trainable = True` on their layers, or leave the where out; batch statistics, seed states and "
            "weights made with `trainable=False` train in no policy."
        )


def _nearest(where: Where, tree: Tree) -> str:
    paths = [path for paths in _all_paths(tree) for path in paths if path]
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], path)
    near: list[str] = []
    for pattern in where.patterns():
        near += difflib.get_close_matches(pattern.removesuffix("/**"), paths, n=3)
        names = difflib.get_close_matches(pattern.removesuffix("/**").rpartition("/")[2], by_name, n=2)
        near += [by_name[name] for name in names]
    if near:
        return f"The nearest paths are {', '.join(f'`{path}`' for path in dict.fromkeys(near))}."
    top = [path for path in paths if "/" not in path]
    return f"The model has {_listed_paths(top)} at the top."


def _all_paths(tree: Tree) -> list[tuple[str, ...]]:
    return [submodel.paths for submodel in tree.submodels] + [variable.paths for variable in tree.variables]


def _listed(variables: Iterable[VariableInfo]) -> str:
    return _listed_paths([variable.path for variable in variables])


def _listed_paths(paths: list[str], most: int = 5) -> str:
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"`{path}`" for path in paths[:most]) + rest


def _nothing_left(policy: VariablePolicy, frozen: list[VariableInfo]) -> str:
    if frozen:
        return (
            f"{policy!r} leaves nothing to train: it freezes all {len(frozen)} variables ({_listed(frozen)}). "
            "Freeze less."
        )
    return (
        f"{policy!r} leaves nothing to train: Keras holds every variable of the model non-trainable. "
        "Set `trainable = True` on the layers that should train."
    )


def _flag(variable: VariableInfo) -> str:
    if variable.seed:
        return "Keras: seed state"
    off = [s for s in variable.submodels if isinstance(s.object, keras.Layer) and not s.object.trainable]
    if off:
        return f"Keras: {off[0].path or 'model'}.trainable=False"
    return "Keras: non-trainable"


def _inference(policy: VariablePolicy, tree: Tree, trained: set[VariableInfo]) -> tuple[SubmodelInfo, ...]:
    """Find the submodels in inference mode: those the policy says, and those that stand in such ones alone."""
    inference = {
        submodel
        for submodel in tree.submodels
        if _owns(submodel, tree) and policy.inference(submodel, not trained.isdisjoint(tree.held[submodel]))
    }
    undecided = [submodel for submodel in tree.submodels if submodel not in inference]
    while undecided:
        follows = {s for s in undecided if tree.parents[s] and inference.issuperset(tree.parents[s])}
        if not follows:
            break
        inference |= follows
        undecided = [submodel for submodel in undecided if submodel not in follows]
    return tuple(submodel for submodel in tree.submodels if submodel in inference)


def _owns(submodel: SubmodelInfo, tree: Tree) -> bool:
    """Tell whether a submodel owns variables that can train, or could if Keras' flag on it were lifted.

    Statistics alone do not count: a BatchNormalization without scale and offset follows what encloses it.
    """
    flagged_off = isinstance(submodel.object, keras.Layer) and not submodel.object.trainable
    return any(variable.trainable or (flagged_off and not variable.seed) for variable in tree.held[submodel])
