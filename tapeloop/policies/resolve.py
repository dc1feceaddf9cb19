"""Resolving a policy for a model: the one place where a policy becomes a selection, and where it is checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import keras

from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError, listed
from tapeloop.model.filters import AnyOf, Filter, Under
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import Progress, VariablePolicy


def resolve(policy: VariablePolicy, tree: Tree, trains: bool = True) -> Selection:
    """Resolve a policy for a model.

    Args:
        policy: What trains.
        tree: The model.
        trains: Whether the selection is to train with; one to evaluate with may leave nothing to train.

    Raises:
        PolicyError: A filter matches nothing that can train, groups overlap, `group` returns no name, or nothing is
            left to train.
    """
    if trains and not tree.variables:
        raise PolicyError(
            f"{policy!r} was asked what trains, but the model has no variables. Pass a model with weights; one that "
            "makes them in its first call has them after `fit` has seen a batch, or once it was called on one."
        )
    if trains:
        _check_matches(policy, tree)
    groups: dict[str, list[VariableInfo]] = {}
    frozen, non_trainable = [], []
    rules = {}
    for variable in tree.variables:
        group = policy.group(variable) if variable.trainable else None
        if group is not None:
            groups.setdefault(_checked_name(policy, group, variable), []).append(variable)
        elif variable.trainable:
            frozen.append(variable)
        else:
            non_trainable.append(variable)
        rules[variable] = policy.rule(variable) if variable.trainable else _flag(variable)
    if trains and not groups:
        raise PolicyError(_nothing_left(policy, frozen))
    return Selection(
        tree,
        {group: tuple(variables) for group, variables in groups.items()},
        tuple(frozen),
        tuple(non_trainable),
        _inference(policy, tree, {variable for group in groups.values() for variable in group}),
        rules,
        {group: _multiplier(policy, group, variables) for group, variables in groups.items()},
    )


def chain(policy: VariablePolicy, progress: Progress) -> list[VariablePolicy]:
    """Return the policies that lie within one another at `progress`: the outermost first, the one that holds last.

    Raises:
        PolicyError: An `at` returns no policy, or policies refer to each other without end.
    """
    found = [policy]
    for _ in range(100):
        following = found[-1].at(progress)
        if not isinstance(following, VariablePolicy):
            raise PolicyError(
                f"`{type(found[-1]).__name__}.at` must return a policy, itself where nothing changes. "
                f"Received: {following!r} at step {progress.step}, epoch {progress.epoch}."
            )
        if following is found[-1]:
            return found
        found.append(following)
    raise PolicyError(
        f"{policy!r} does not settle: each `at` returned another policy, 100 times over. An `at` must return a policy "
        "that returns itself in the end."
    )


def selections_to_come(policy: VariablePolicy, tree: Tree) -> list[Selection]:
    """Resolve every policy that is known to hold some day, so that none fails when its day comes.

    Raises:
        PolicyError: One of them cannot be resolved for the model.
    """
    found = []
    for phase in policy.phases():
        if phase.phases():
            found += selections_to_come(phase, tree)
        elif type(phase).at is VariablePolicy.at:
            found.append(resolve(phase, tree))
    return found


def _checked_name(policy: VariablePolicy, group: object, variable: VariableInfo) -> str:
    if not isinstance(group, str) or not group:
        raise PolicyError(
            f"`{type(policy).__name__}.group` must return the name of a group, or None to freeze. "
            f"Received: {group!r} for the variable `{variable.path}`."
        )
    return group


def _check_matches(policy: VariablePolicy, tree: Tree) -> None:
    weightless = [filter_ for filter_ in policy.filters() if _is_weightless(filter_, tree)]
    for filter_ in policy.filters():
        if filter_ not in weightless:
            _check_match(policy, filter_, tree)
    if weightless and len(weightless) == len(policy.filters()):
        raise PolicyError(f"{policy!r} names only layers without variables. Name one that has some.")


def _is_weightless(filter_: Filter, tree: Tree) -> bool:
    """Tell whether a filter names only layer objects without variables, as slices of `model.layers` hold many."""
    if isinstance(filter_, AnyOf):
        return all(_is_weightless(each, tree) for each in filter_.filters)
    if not isinstance(filter_, Under):
        return False
    if isinstance(filter_.submodel, keras.layers.InputLayer):
        return True
    return any(s.object is filter_.submodel and not tree.held[s] for s in tree.submodels)


def _check_match(policy: VariablePolicy, filter_: Filter, tree: Tree) -> None:
    for part in (*filter_.parts(), filter_):
        if not any(map(part, tree.variables)) and not _is_weightless(part, tree):
            raise PolicyError(f"{part!r} in {policy!r} matches no variable of the model. {_nearest(part, tree)}")
    matches = [variable for variable in tree.variables if filter_(variable)]
    if not any(variable.trainable for variable in matches) and not policy.freezes_filters:
        raise PolicyError(
            f"{filter_!r} in {policy!r} matches only variables that Keras holds non-trainable: {_listed(matches)}. "
            "Set `trainable = True` on their layers, or leave the filter out; batch statistics, seed states and "
            "weights made with `trainable=False` train in no policy."
        )


def _nearest(filter_: Filter, tree: Tree) -> str:
    paths = [path for paths in _all_paths(tree) for path in paths if path]
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], path)
    near: list[str] = []
    for pattern in filter_.patterns():
        near += difflib.get_close_matches(pattern.removesuffix("/**"), paths, n=3)
        names = difflib.get_close_matches(pattern.removesuffix("/**").rpartition("/")[2], by_name, n=2)
        near += [by_name[name] for name in names]
    if near:
        return f"The nearest paths are {', '.join(f'`{path}`' for path in dict.fromkeys(near))}."
    top = [path for path in paths if "/" not in path]
    return f"The model has {listed(top, most=5)} at the top."


def _all_paths(tree: Tree) -> list[tuple[str, ...]]:
    return [submodel.paths for submodel in tree.submodels] + [variable.paths for variable in tree.variables]


def _listed(variables: Iterable[VariableInfo]) -> str:
    return listed([variable.path for variable in variables], most=5)


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


def _multiplier(policy: VariablePolicy, group: str, variables: list[VariableInfo]) -> float:
    found = {variable.path: policy.multiplier(variable) for variable in variables}
    for path, factor in found.items():
        try:
            not_negative("multiplier", factor)
        except ValueError:
            raise PolicyError(
                f"`{type(policy).__name__}.multiplier` must return a finite number, 0 or more. "
                f"Received: {factor!r} for the variable `{path}` of the group {group!r}."
            ) from None
    if len(set(found.values())) != 1:
        raise PolicyError(
            f"`{type(policy).__name__}.multiplier` must return one number for each group. "
            f"Received for the group {group!r}: {found!r}."
        )
    return next(iter(found.values()))


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
