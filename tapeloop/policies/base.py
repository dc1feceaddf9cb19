"""The base of policies: rules that say which variables train in which group, and what runs in inference mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import keras
import tensorflow as tf

from tapeloop.model.filters import Filter
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.policies.state import encoded_attributes, restore_attributes

DEFAULT_GROUP = "default"
Unit: TypeAlias = Literal["epoch", "step"]  # of what a policy counts


@dataclass(frozen=True)
class Progress:
    """How far training has come, for policies that change as it goes.

    Attributes:
        step: How many steps were trained, over all fits.
        epoch: How many epochs were trained, over all fits.
        logs: At an epoch's start the logs of the last epoch, validation included; within an epoch its logs so far.
            Empty before the first.

    Example:
        >>> policy = tl.Phases({0: tl.Freeze("base"), 2: tl.TrainAll()})
        >>> policy.at(tl.Progress(epoch=1)), policy.at(tl.Progress(epoch=2))
        (Freeze(glob('base')), TrainAll())
    """

    step: int = 0
    epoch: int = 0
    logs: Mapping[str, float] = field(default_factory=dict)

    def count(self, unit: Unit) -> int:
        """Return `step` or `epoch`.

        Args:
            unit: `"step"` or `"epoch"`.

        Example:
            >>> tl.Progress(step=20, epoch=2).count("epoch")
            2
        """
        return self.step if unit == "step" else self.epoch


class VariablePolicy:
    """Gives every trainable variable a group, or freezes it. Subclass it and write `group`.

    A policy that changes as training goes writes `at`, and returns another policy from it, or itself in another state.

    Attributes:
        every: After how many steps `at` is asked within an epoch; None if it is asked at the start of epochs alone.
        freezes_filters: Whether `filters` name frozen variables, which Keras may hold non-trainable already.

    Example:
        >>> class Vectors(tl.VariablePolicy):
        ...     def group(self, variable):
        ...         return "vectors" if len(variable.shape) == 1 else None
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, Vectors()).selection.trained]
        ['base/bias', 'head/bias']
    """

    every: int | None = None
    freezes_filters = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def at(self, progress: Progress) -> VariablePolicy:
        """Return the policy that holds at a moment.

        Args:
            progress: How far training has come.

        Returns:
            A policy, which is asked in turn; or this policy itself, whose `group` then holds. It may have changed what
            it goes by.

        Example:
            >>> class Later(tl.VariablePolicy):
            ...     def at(self, progress):
            ...         return tl.TrainAll() if progress.epoch >= 3 else tl.TrainOnly("head")
            >>> Later().at(tl.Progress(epoch=2)), Later().at(tl.Progress(epoch=3))
            (TrainOnly(glob('head')), TrainAll())
        """
        return self

    def group(self, variable: VariableInfo) -> str | None:
        """Return the group in which a variable trains.

        Args:
            variable: A variable that Keras says can train; others are never asked about.

        Returns:
            The group's name, or None to freeze the variable.

        Raises:
            NotImplementedError: A subclass writes neither this nor `at`.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> [tl.TrainOnly("**/bias").group(variable) for variable in tl.Trainer(model).selection.trained]
            [None, 'default']
        """
        # No abstract method: a policy that only writes `at` never has its own `group` called.
        raise NotImplementedError(
            f"{type(self).__name__} must write `group(self, variable)`, or `at(self, progress)` that returns another "
            "policy."
        )

    def inference(self, submodel: SubmodelInfo, trained: bool) -> bool:
        """Tell whether a submodel runs in inference mode.

        Args:
            submodel: A submodel that owns variables that can train. Others follow the submodel that encloses them.
            trained: Whether any variable under it trains.

        Returns:
            By default, whether nothing under it trains.

        Example:
            >>> class Quiet(tl.TrainAll):
            ...     def inference(self, submodel, trained):
            ...         return isinstance(submodel.object, keras.layers.BatchNormalization) or not trained
            >>> inside = [keras.layers.Dense(3, name="base"), keras.layers.BatchNormalization(name="norm")]
            >>> model = keras.Sequential([keras.Input((4,)), *inside])
            >>> [submodel.path for submodel in tl.Trainer(model, Quiet()).selection.inference]
            ['norm']
        """
        return not trained

    def phases(self) -> tuple[VariablePolicy, ...]:
        """Return the policies that may hold later, if they are known: `fit` checks each before its first step.

        Example:
            >>> tl.GradualUnfreeze(["head", "base"]).phases()
            (TrainOnly(glob('head')), TrainOnly(glob('head'), glob('base')))
        """
        return ()

    def multiplier(self, variable: VariableInfo) -> float:
        """Return by how much the learning rate of a variable's group is multiplied: one number for each group.

        Args:
            variable: A variable that trains.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> kernel = tl.Trainer(model).selection.trained[0]
            >>> tl.Groups({"head": "head"}, multipliers={"head": 0.1}).multiplier(kernel)
            0.1
        """
        return 1.0

    def rule(self, variable: VariableInfo) -> str:
        """Return the rule by which a variable got its group or was frozen, for the report.

        Args:
            variable: A variable that can train.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> tl.Freeze("**/bias").rule(tl.Trainer(model).selection.trained[1])
            "Freeze: glob('**/bias')"
        """
        name, filters = type(self).__name__, self.filters()
        # The first match: a variable may be chosen by several filters of a list.
        matched = next((repr(filter_) for filter_ in filters if filter_(variable)), "all else")
        return f"{name}: {matched}" if filters else name

    def filters(self) -> tuple[Filter, ...]:
        """Return the filters of this policy: each must match a variable that can train, unless `freezes_filters`.

        Example:
            >>> tl.TrainOnly("head", keras.layers.LayerNormalization).filters()
            (glob('head'), of_type(LayerNormalization))
        """
        return ()

    def get_state(self) -> dict[str, Any]:
        """Return the state of this policy for a checkpoint, as JSON can hold it.

        The default saves the attributes that are numbers, strings, NumPy arrays, random generators, and tuples, sets,
        lists and dicts of these, and the state of nested policies. Functions, classes and filters are left out. Of a
        policy that compares by value, such as a frozen dataclass, there is none.

        Raises:
            TypeError: An attribute is of another kind: write this method and `set_state`.

        Example:
            >>> class Drawn(tl.VariablePolicy):
            ...     def __init__(self):
            ...         self.asked = 0
            ...     def at(self, progress):
            ...         self.asked += 1
            ...         return tl.TrainAll()
            >>> policy = Drawn()
            >>> policy.set_state({"own": {"asked": 3}})
            >>> policy.get_state()
            {'own': {'asked': 3}}
        """
        inner = [policy.get_state() for policy in self.phases()]
        own = {} if is_value(self) else encoded_attributes(self, (Filter, type))
        return {"own": own} | ({"phases": inner} if any(inner) else {}) if own or any(inner) else {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `get_state` returned.

        Args:
            state: What it returned when the run was saved.

        Example:
            >>> class Counts(tl.VariablePolicy):
            ...     def __init__(self):
            ...         self.count = 0
            >>> policy = Counts()
            >>> policy.set_state({"own": {"count": 3}})
            >>> policy.count
            3
        """
        restore_attributes(self, state.get("own", {}))
        for policy, inner in zip(self.phases(), state.get("phases", ())):
            policy.set_state(inner)


def is_value(policy: VariablePolicy) -> bool:
    """Tell whether a policy is a value, and not an object that may answer anew each time it is asked."""
    try:
        hash(policy)
    except TypeError:
        return False
    # The hash of `object` is by identity: such a policy may keep state and answer otherwise the next time.
    return type(policy).__hash__ is not object.__hash__


def is_declarative(value: object) -> bool:
    """Tell whether a policy goes by paths, classes and layers alone, and selects the same of an unchanged model."""
    if value is None or isinstance(value, (str, int, float, type, keras.Layer, tf.Module)):
        return True
    if isinstance(value, Mapping):
        return all(map(is_declarative, (*value, *value.values())))
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(is_declarative, value))
    # A function of the user's may look at anything, and so may a policy of a class of the user's.
    return type(value).__module__.startswith("tapeloop.") and all(map(is_declarative, vars(value).values()))
