"""What a policy answered, as a saved run recorded it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.policies.base import VariablePolicy


@dataclass(frozen=True)
class Recorded(VariablePolicy):
    """What a policy answered when a run was saved: a run that goes on need not ask it again about the same moment.

    Attributes:
        name: The policy that answered, as it is written.
        groups: The path of each variable that trains, and its group.
        modes: The paths of the submodels in inference mode.
        multipliers: By how much each group's learning rate is multiplied.
        every: At which multiples of steps the trainer's policy is asked again, or None.
    """

    name: str
    groups: tuple[tuple[str, str], ...]
    modes: tuple[str, ...]
    multipliers: tuple[tuple[str, float], ...] = ()
    every: int | None = None

    @classmethod
    def of(cls, name: str, selection: Selection, every: int | None) -> Recorded:
        """Record the selection that a policy, as it is written, came to."""
        return cls(
            name,
            tuple((variable.path, group) for variable, group in selection.group_of.items()),
            tuple(submodel.path for submodel in selection.inference),
            tuple(selection.multipliers.items()),
            every,
        )

    def __repr__(self) -> str:
        return self.name

    def group(self, variable: VariableInfo) -> str | None:
        return next((self._group_at[path] for path in variable.paths if path in self._group_at), None)

    def inference(self, submodel: SubmodelInfo, trained: bool) -> bool:
        return not self._modes.isdisjoint(submodel.paths)

    def multiplier(self, variable: VariableInfo) -> float:
        return dict(self.multipliers).get(self.group(variable) or "", 1.0)

    def rule(self, variable: VariableInfo) -> str:
        return self.name

    @functools.cached_property
    def _group_at(self) -> Mapping[str, str]:
        return dict(self.groups)

    @functools.cached_property
    def _modes(self) -> frozenset[str]:
        return frozenset(self.modes)


def described(policy: VariablePolicy) -> str:
    """Return how a policy is written, without the addresses of objects, which differ from process to process."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(policy))
