"""Policies: what trains, in which group, and which submodels run in inference mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tapeloop.model.filters import Filter
from tapeloop.model.tree import SubmodelInfo, VariableInfo

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

    Example:
        >>> class Vectors(tl.VariablePolicy):
        ...     def group(self, variable):
        ...         return "vectors" if len(variable.shape) == 1 else None
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, Vectors()).selection.trained]
        ['base/bias', 'head/bias']
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

    def filters(self) -> tuple[Filter, ...]:
        """The filters of this policy: each must match a variable, one that can train unless `freezes_wheres`."""
        return ()

    @property
    def freezes_filters(self) -> bool:
        """Whether the filters say what is frozen; what Keras' flags have frozen may be frozen again."""
        return False


def is_value(policy: VariablePolicy) -> bool:
    """Tell whether a policy is a value, and not an object that may answer anew each time it is asked."""
    try:
        hash(policy)
    except TypeError:
        return False
    return type(policy).__hash__ is not object.__hash__
