"""Resolving a policy for a model: the one place where a policy becomes a selection, and where it is checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import keras

from tapeloop._validation import not_negative
from tapeloop.errors import PolicyError, listed
from tapeloop.model.filters import Filter, Joined, Under
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import Progress, VariablePolicy


def resolve(policy: VariablePolicy, tree: Tree, trains: bool = True) -> Selection:
    """Resolve a policy for a model.

    Args:
        policy: The policy.
        tree: The model.
        trains: Whether the selection is for training. A selection for evaluation may leave nothing to train.

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
        # An evaluation may run under a policy that leaves nothing to train, and asks for no match.
        _check_filters(policy, tree)
    # A variable that Keras holds non-trainable is never asked about: Keras' flags come first.
    answers = {variable: _checked_group(policy, variable) for variable in tree.variables if variable.trainable}
    groups: dict[str, list[VariableInfo]] = {}
    for variable, group in answers.items():
        if group is not None:
            groups.setdefault(group, []).append(variable)
    frozen = tuple(variable for variable, group in answers.items() if group is None)
    if trains and not groups:
        found = "Keras holds every variable of the model non-trainable"
        remedy = "Set `trainable = True` on the layers that should train"
        if frozen:
            found, remedy = f"it freezes all {len(frozen)} variables ({_listed(frozen)})", "Freeze less"
        raise PolicyError(f"{policy!r} leaves nothing to train: {found}. {remedy}.")
    return Selection(
        tree,
        {group: tuple(variables) for group, variables in groups.items()},
        frozen,
        tuple(variable for variable in tree.variables if not variable.trainable),
        _inference(policy, tree, answers.keys() - set(frozen)),
        {v: policy.rule(v) if v.trainable else _keras_rule(v) for v in tree.variables},
        {group: _multiplier(policy, group, variables) for group, variables in groups.items()},
    )


def chain(policy: VariablePolicy, progress: Progress) -> list[VariablePolicy]:
    """Return the policies that `at` leads to at a moment: the policy itself first, the policy that holds last.

    Raises:
        PolicyError: An `at` returns no policy, or policies refer to each other without end.
    """
    found = [policy]
    # Schedules nest: a phase may be a cycle. One that never settles would hang the fit.
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
    """Return the selections of the policies that are known to hold later, so that none fails in the middle of a run.

    Raises:
        PolicyError: One of them cannot be resolved for the model.
    """
    found = []
    # A typo in the policy of epoch 7 is so found before epoch 0. What only `at` knows cannot be looked at yet.
    for phase in policy.phases():
        if phase.phases():
            found += selections_to_come(phase, tree)
        elif type(phase).at is VariablePolicy.at:
            found.append(resolve(phase, tree))
    return found


def _checked_group(policy: VariablePolicy, variable: VariableInfo) -> str | None:
    group = policy.group(variable)
    if group is not None and (not isinstance(group, str) or not group):
        raise PolicyError(
            f"`{type(policy).__name__}.group` must return the name of a group, or None to freeze. "
            f"Received: {group!r} for the variable `{variable.path}`."
        )
    return group


def _check_filters(policy: VariablePolicy, tree: Tree) -> None:
    """Check that each filter of a policy matches a variable, and each part of a filter by itself: a typo does not."""
    # A filter that matches only what cannot train is a typo, or takes Keras' flag for something else.
    filters = [filter_ for filter_ in policy.filters() if not _is_weightless(filter_, tree)]
    if policy.filters() and not filters:
        raise PolicyError(f"{policy!r} names only layers without variables. Name one that has some.")
    for filter_ in filters:
        for part in (*filter_.parts(), filter_):
            if not any(map(part, tree.variables)) and not _is_weightless(part, tree):
                raise PolicyError(
                    f"{part!r} in {policy!r} matches no variable of the model. {nearest(near_paths(part, tree), tree)}"
                )
        matches = [variable for variable in tree.variables if filter_(variable)]
        if not any(variable.trainable for variable in matches) and not policy.freezes_filters:
            raise PolicyError(
                f"{filter_!r} in {policy!r} matches only variables that Keras holds non-trainable: "
                f"{_listed(matches)}. Set `trainable = True` on their layers, or leave the filter out; batch "
                "statistics, seed states and weights made with `trainable=False` train in no policy."
            )


def _is_weightless(filter_: Filter, tree: Tree) -> bool:
    """Tell whether a filter names only layer objects without variables, as slices of `model.layers` hold many."""
    if isinstance(filter_, Joined) and filter_.sign == ",":
        return all(_is_weightless(each, tree) for each in filter_.filters)
    if not isinstance(filter_, Under):
        return False
    if isinstance(filter_.submodel, keras.layers.InputLayer):  # which the tree leaves out
        return True
    return not tree.variables_in.get(SubmodelInfo(filter_.submodel), (filter_,))


def near_paths(filter_: Filter, tree: Tree) -> list[str]:
    """List the paths that a filter may have meant."""
    paths, near = _paths(tree), list[str]()
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], path)
    for pattern in filter_.patterns():
        pattern = pattern.removesuffix("/**")
        # The whole path may be far off, though its last segment is right: users leave out a level.
        near += difflib.get_close_matches(pattern, paths, n=3)
        near += [by_name[name] for name in difflib.get_close_matches(pattern.rpartition("/")[2], by_name, n=2)]
    return list(dict.fromkeys(near))


def nearest(near: Sequence[str], tree: Tree) -> str:
    """Say which paths a filter may have meant, as `near_paths` lists them, or what there is in the model."""
    if near:
        return f"The nearest paths are {', '.join(f'`{path}`' for path in near)}."
    return f"The model has {listed([path for path in _paths(tree) if '/' not in path], most=5)} at the top."


def _paths(tree: Tree) -> list[str]:
    infos: tuple[SubmodelInfo | VariableInfo, ...] = (*tree.submodels, *tree.variables)
    return [path for info in infos for path in info.paths if path]


def _listed(variables: Iterable[VariableInfo]) -> str:
    return listed([variable.path for variable in variables], most=5)


def _multiplier(policy: VariablePolicy, group: str, variables: list[VariableInfo]) -> float:
    must = f"`{type(policy).__name__}.multiplier` must return"
    found = {variable.path: policy.multiplier(variable) for variable in variables}
    for path, factor in found.items():
        try:
            not_negative("multiplier", factor)
        except ValueError:
            received = f"{factor!r} for the variable `{path}` of the group {group!r}"
            raise PolicyError(f"{must} a finite number, 0 or more. Received: {received}.") from None
    # A group has one learning rate: one number is put into its optimizer.
    if len(set(found.values())) != 1:
        raise PolicyError(f"{must} one number for each group. Received for the group {group!r}: {found!r}.")
    return next(iter(found.values()))


def _keras_rule(variable: VariableInfo) -> str:
    """Name why Keras does not train a variable."""
    if variable.seed:
        return "Keras: seed state"
    # The outermost layer with the flag off: to lift the flag there is what helps.
    off = [s for s in variable.submodels if isinstance(s.object, keras.Layer) and not s.object.trainable]
    if off:
        return f"Keras: {off[0].path or 'model'}.trainable=False"
    return "Keras: non-trainable"


def _inference(policy: VariablePolicy, tree: Tree, trained: AbstractSet[VariableInfo]) -> tuple[SubmodelInfo, ...]:
    """Find the submodels in inference mode: those the policy says, and those that stand in such submodels alone."""
    # A submodel without weights of its own is not asked about: it follows the submodels that enclose it.
    inference = {
        submodel
        for submodel in tree.submodels
        if _owns(submodel, tree) and policy.inference(submodel, not trained.isdisjoint(tree.variables_in[submodel]))
    }
    found = inference
    while found:  # a shared submodel may come before one that encloses it: one pass in order would not do
        undecided = [submodel for submodel in tree.submodels if tree.parents[submodel] and submodel not in inference]
        found = {submodel for submodel in undecided if inference.issuperset(tree.parents[submodel])}
        inference |= found
    return tuple(submodel for submodel in tree.submodels if submodel in inference)


def _owns(submodel: SubmodelInfo, tree: Tree) -> bool:
    """Tell whether a submodel owns variables that can train, or could if Keras' flag on it were lifted.

    Statistics alone do not count. A BatchNormalization without scale and offset has nothing that could train, and would
    otherwise be in inference mode and never update its statistics: it follows the submodel that encloses it.
    """
    flagged_off = isinstance(submodel.object, keras.Layer) and not submodel.object.trainable
    return any(variable.trainable or (flagged_off and not variable.seed) for variable in tree.variables_in[submodel])
