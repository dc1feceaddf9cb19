"""A policy's answer for one model: which variables train in which group, and which submodels run in inference mode."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from tapeloop.model import summary
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo


@dataclass(frozen=True, eq=False)
class Selection:
    """The resolved, immutable answer of a policy for one model.

    Two selections are equal when the same variables train in the same groups and the same submodels run in
    inference mode, however their policies were written. Every variable of the model stands in exactly one of
    `groups`, `frozen` and `non_trainable`. A selection prints as a table of what trains.

    Attributes:
        tree: The model.
        groups: The variables that train, by group, in the model's order.
        frozen: The variables that could train and are in no group.
        non_trainable: The variables that Keras itself never trains: batch statistics, seed states, and what its
            `trainable` flags exclude.
        inference: The submodels that run in inference mode, whatever mode their parent is called in.
        rules: For every variable, the rule by which it trains or not, as `explain` shows it.
        multipliers: By how much each group's learning rate is multiplied.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> selection = tl.Trainer(model, tl.Freeze("base")).selection
        >>> selection
        <Selection: default: 2 variables, 8 parameters; frozen: 2 variables, 15 parameters>
        >>> [submodel.path for submodel in selection.inference]
        ['base']
        >>> [(variable.path, selection.group_of[variable]) for variable in selection.trained]
        [('head/kernel', 'default'), ('head/bias', 'default')]
        >>> print(selection)
        submodel  parameters  group    state   rule                  mode
        ----------------------------------------------------------------------
        base              15  -        frozen  Freeze: glob('base')  inference
        head               8  default  trains  Freeze: all else      train
        ----------------------------------------------------------------------
        parameters       23
          train          8 (34.8%) in 1 group: default
          frozen         15
          non-trainable  0 (statistics, seeds, Keras' flags)
    """

    tree: Tree
    groups: Mapping[str, tuple[VariableInfo, ...]]
    frozen: tuple[VariableInfo, ...]
    non_trainable: tuple[VariableInfo, ...]
    inference: tuple[SubmodelInfo, ...]
    rules: Mapping[VariableInfo, str] = field(repr=False)
    multipliers: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def trained(self) -> tuple[VariableInfo, ...]:
        """The variables of all groups, group by group."""
        return tuple(variable for variables in self.groups.values() for variable in variables)

    @functools.cached_property
    def group_of(self) -> Mapping[VariableInfo, str]:
        """The group of each variable that trains."""
        return {variable: group for group, variables in self.groups.items() for variable in variables}

    @functools.cached_property
    def idle(self) -> frozenset[SubmodelInfo]:
        """The submodels in inference mode without a variable that trains: assignments in their `call` are dropped."""
        # A policy may put a submodel that trains in inference mode: its own assignments then still happen.
        held, trains = self.tree.variables_in, self.group_of.keys()
        return frozenset(submodel for submodel in self.inference if trains.isdisjoint(held[submodel]))

    @functools.cached_property
    def still(self) -> tuple[VariableInfo, ...]:
        """The variables that do not move while this selection trains: those that it freezes, with their statistics."""
        idle = {variable for submodel in self.idle for variable in self.tree.variables_in[submodel]}
        # Keras holds the weights that LoRA adapts non-trainable, as it does statistics; only these move.
        adapted = {variable for variable in self.non_trainable if variable.is_adapted}
        still = idle.union(self.frozen, adapted)
        return tuple(variable for variable in self.tree.variables if variable in still)

    @functools.cached_property
    def _key(self) -> tuple[object, ...]:
        # By what trains and not by how the policy was written, so that two spellings share one compiled step.
        groups = frozenset((group, frozenset(variables)) for group, variables in self.groups.items())
        return groups, frozenset(self.inference)

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Selection) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<Selection: {self.describe()}>"

    def __str__(self) -> str:
        return str(summary.explain(self))

    def _repr_html_(self) -> str:
        return summary.explain(self).html

    def describe(self) -> str:
        """Return a line that says how much trains.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> tl.Trainer(model, tl.Freeze("base")).selection.describe()
            'default: 2 variables, 8 parameters; frozen: 2 variables, 15 parameters'
        """
        parts = {**self.groups, "frozen": self.frozen, "non-trainable": self.non_trainable}
        return "; ".join(
            f"{name}: {len(variables)} variables, {sum(v.size for v in variables):,} parameters"
            for name, variables in parts.items()
            if variables
        )
