"""Policies that change as training goes: each a frozen value that answers with the policy that holds at a moment."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tapeloop._validation import whole_number
from tapeloop.errors import PolicyError
from tapeloop.model.filters import Filter, FilterLike, SubmodelKind, to_filter
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import DEFAULT_GROUP, Progress, VariablePolicy
from tapeloop.policies.static import TrainOnly


@dataclass(frozen=True, init=False, repr=False)
class _Scheduled:
    """The base of policies that answer anew after a number of steps or epochs."""

    _unit: str
    _period: int

    def _set(self, unit: str, period: int, **fields: Any) -> None:
        """Set the fields of the frozen policy, in its constructor."""
        if unit not in ("epoch", "step"):
            raise ValueError(f"`unit` must be 'epoch' or 'step'. Received: {unit!r}.")
        # Phases with one start, at 0, have the period 0: there is nothing to ask within an epoch.
        every = period or None if unit == "step" else None
        # Past the dataclass, which is frozen: a policy is a value, by which its selection is looked up.
        for name, value in {"every": every, "_unit": unit, "_period": period, **fields}.items():
            object.__setattr__(self, name, value)

    def _periods_before(self, progress: Progress) -> int:
        return progress.count(self._unit) // self._period

    def _unit_unless(self, default: str) -> str:
        """Return the argument `unit` as it is written, if it is not the default."""
        return "" if self._unit == default else f", unit={self._unit!r}"


@dataclass(frozen=True, init=False, repr=False)
class Phases(_Scheduled, VariablePolicy):
    """One policy after the other, each from the epoch (or step) that is its key.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Phases({0: tl.Freeze("base"), 2: tl.TrainAll()}), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=3, progress="none")
        >>> [(phase.epoch, len(phase.selection.trained)) for phase in history.phases]
        [(0, 2), (2, 4)]
    """

    _phases: tuple[tuple[int, VariablePolicy], ...]

    def __init__(self, phases: Mapping[int, VariablePolicy], *, unit: str = "epoch") -> None:
        """Set the phases.

        Args:
            phases: From epochs (or steps), counted from 0 over all fits, to policies. One of them is 0.
            unit: What the keys count: `"epoch"` or `"step"`.

        Raises:
            PolicyError: No phase starts at 0.
            TypeError: `phases` is no mapping, or a phase no policy.
            ValueError: A key is no whole number, or `unit` no unit.
        """
        if not isinstance(phases, Mapping) or not phases:
            raise TypeError(f"`Phases` takes a mapping from whole numbers to policies. Received: {phases!r}.")
        starts = {whole_number("phases", start, 0): policy for start, policy in phases.items()}
        _check_policies("Phases", starts.values())
        if 0 not in starts:
            raise PolicyError(
                "`Phases` must say what trains from the start. "
                f"The first phase is at {unit} {min(starts)}: add one at 0."
            )
        # The period is the longest at which no start is missed, so that the loop asks no more often than needed.
        self._set(unit, math.gcd(*starts), _phases=tuple((start, starts[start]) for start in sorted(starts)))

    def __repr__(self) -> str:
        return f"Phases({dict(self._phases)!r}{self._unit_unless('epoch')})"

    def phases(self) -> tuple[VariablePolicy, ...]:
        return tuple(policy for _, policy in self._phases)

    def at(self, progress: Progress) -> VariablePolicy:
        now = progress.count(self._unit)
        return [policy for start, policy in self._phases if start <= now][-1]


@dataclass(frozen=True, init=False, repr=False)
class GradualUnfreeze(_Scheduled, VariablePolicy):
    """Train the first stage, then the second too, then the third: `GradualUnfreeze(["head", "backbone/block3"])`.

    Source: Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, section 3.3.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.GradualUnfreeze(["head", "base"], every=2), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=3, progress="none")
        >>> [(phase.epoch, phase.policy) for phase in history.phases]
        [(0, TrainOnly(glob('head'))), (2, TrainOnly(glob('head'), glob('base')))]
    """

    _stages: tuple[Filter, ...]

    def __init__(self, stages: Iterable[FilterLike], *, every: int = 1, unit: str = "epoch") -> None:
        """Set the stages.

        Args:
            stages: What trains first, what joins then, and so on.
            every: How many epochs (or steps) lie between two stages.
            unit: What `every` counts: `"epoch"` or `"step"`.

        Raises:
            PolicyError: There are no stages.
            TypeError: `stages` is no list of filters.
            ValueError: `every` is no whole number of 1 or more, or `unit` no unit.
        """
        if isinstance(stages, str) or not isinstance(stages, Iterable):
            raise TypeError(f"`GradualUnfreeze` takes a list of filters. Received: {stages!r}.")
        filters = tuple(to_filter(stage) for stage in stages)
        if not filters:
            raise PolicyError("`GradualUnfreeze` needs one or more stages. Received none: say what trains first.")
        self._set(unit, whole_number("every", every, 1), _stages=filters)

    def __repr__(self) -> str:
        return f"GradualUnfreeze({list(self._stages)!r}, every={self._period}{self._unit_unless('epoch')})"

    def phases(self) -> tuple[VariablePolicy, ...]:
        return tuple(TrainOnly(*self._stages[:count]) for count in range(1, 1 + len(self._stages)))

    def at(self, progress: Progress) -> VariablePolicy:
        # Once all stages train, the slice stays the same.
        return TrainOnly(*self._stages[: 1 + self._periods_before(progress)])


@dataclass(frozen=True, init=False, repr=False)
class Cycle(_Scheduled, VariablePolicy):
    """Several policies in turn, and around again: `Cycle([policy, other], every=100)`.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> policy = tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base")], every=2)
        >>> trainer = tl.Trainer(model, policy, loss="mse")
        >>> history = trainer.fit((np.ones((32, 4)), np.ones((32, 2))), batch_size=8, progress="none")
        >>> [(phase.step, phase.policy) for phase in history.phases]
        [(0, TrainOnly(glob('head'))), (2, TrainOnly(glob('base')))]
    """

    _policies: tuple[VariablePolicy, ...]

    def __init__(self, policies: Iterable[VariablePolicy], *, every: int = 1, unit: str = "step") -> None:
        """Set the policies.

        Args:
            policies: What trains, in turn.
            every: How many steps (or epochs) each holds.
            unit: What `every` counts: `"step"` or `"epoch"`.

        Raises:
            PolicyError: There are no policies.
            TypeError: One of them is no policy.
            ValueError: `every` is no whole number of 1 or more, or `unit` no unit.
        """
        turns = tuple(policies) if isinstance(policies, Iterable) else (policies,)
        if not turns:
            raise PolicyError("`Cycle` needs one or more policies. Received none.")
        _check_policies("Cycle", turns)
        self._set(unit, whole_number("every", every, 1), _policies=turns)

    def __repr__(self) -> str:
        return f"Cycle({list(self._policies)!r}, every={self._period}{self._unit_unless('step')})"

    def phases(self) -> tuple[VariablePolicy, ...]:
        return self._policies

    def at(self, progress: Progress) -> VariablePolicy:
        return self._policies[self._periods_before(progress) % len(self._policies)]


@dataclass(frozen=True, init=False, repr=False)
class RandomSubset(_Scheduled, VariablePolicy):
    """Train `k` submodels drawn at random, and draw others after a while.

    A draw follows from the seed and its number alone, so that a resumed run goes on with the same draws.

    Example:
        >>> dense = keras.layers.Dense
        >>> layers = [dense(3, name="low"), dense(3, name="high"), dense(2, name="head")]
        >>> model = keras.Sequential([keras.Input((4,)), *layers])
        >>> policy = tl.RandomSubset(1, of=dense, every=100, always="head")
        >>> [variable.path for variable in tl.Trainer(model, policy).selection.trained]
        ['high/kernel', 'high/bias', 'head/kernel', 'head/bias']
    """

    _k: int
    _kind: SubmodelKind
    _always: Filter | None
    _seed: int

    def __init__(
        self,
        k: int,
        *,
        of: type | str,
        every: int,
        always: FilterLike | None = None,
        seed: int = 0,
        unit: str = "step",
    ) -> None:
        """Choose the submodels and how often they are drawn.

        Args:
            k: How many submodels train at a time.
            of: Which submodels are drawn from: a class of layers, or a path glob that names submodels.
            every: How many steps (or epochs) a draw holds.
            always: What trains beside every draw: a path glob, a layer, a class of layers, a list of these, or a
                filter. A submodel of which it leaves nothing to draw is not drawn from.
            seed: The seed of the draws.
            unit: What `every` counts: `"step"` or `"epoch"`.

        Raises:
            TypeError: `of` is no class of layers and no path glob, or `always` no filter.
            ValueError: `k` or `every` is no whole number of 1 or more, or `unit` no unit.
        """
        k, every = whole_number("k", k, 1), whole_number("every", every, 1)
        chosen = None if always is None else to_filter(always)
        self._set(unit, every, _k=k, _kind=SubmodelKind(of), _always=chosen, _seed=seed)

    def __repr__(self) -> str:
        always = "" if self._always is None else f", always={self._always!r}"
        drawn = f"{self._k}, of={self._kind!r}, every={self._period}{always}, seed={self._seed}"
        return f"RandomSubset({drawn}{self._unit_unless('step')})"

    def phases(self) -> tuple[VariablePolicy, ...]:
        # Of draws without end: if one can be resolved for a model, so can the others.
        return (self._draw(0),)

    def at(self, progress: Progress) -> VariablePolicy:
        # A policy of its own: as long as a draw holds, its selection is looked up by it and not resolved anew.
        return self._draw(self._periods_before(progress))

    def _draw(self, number: int) -> _Draw:
        return _Draw(self._k, self._kind, self._always, self._seed, number)


@dataclass(frozen=True)
class _Draw(VariablePolicy):
    """One draw of a `RandomSubset`."""

    k: int
    kind: SubmodelKind
    always: Filter | None
    seed: int
    number: int
    # Of each model: a policy is asked about one variable at a time, and would draw anew for each.
    _drawn: weakref.WeakKeyDictionary[Tree, frozenset[SubmodelInfo]] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, compare=False
    )

    def __repr__(self) -> str:
        return f"RandomSubset draw {self.number}{'' if self.always is None else f' (always {self.always!r})'}"

    def filters(self) -> tuple[Filter, ...]:
        return () if self.always is None else (self.always,)

    def group(self, variable: VariableInfo) -> str | None:
        drawn = self._drawn_in(variable.tree)
        return DEFAULT_GROUP if self._is_always(variable) or not drawn.isdisjoint(variable.submodels) else None

    def rule(self, variable: VariableInfo) -> str:
        return f"RandomSubset{f': always {self.always!r}' if self._is_always(variable) else f' draw {self.number}'}"

    def _is_always(self, variable: VariableInfo) -> bool:
        return self.always is not None and self.always(variable)

    def _drawn_in(self, tree: Tree) -> frozenset[SubmodelInfo]:
        """Return the submodels of a model that are drawn: the same ones each time, so that a draw needs no state.

        Raises:
            PolicyError: There are fewer than are to be drawn.
        """
        if tree not in self._drawn:
            found = self.kind.found_in(tree)
            # One of which all trains already would be drawn for nothing.
            left = [s for s in found if any(v.trainable and not self._is_always(v) for v in tree.variables_in[s])]
            if self.k > len(left):
                but = f", {len(found) - len(left)} of them in `always`" if len(left) < len(found) else ""
                raise PolicyError(
                    f"`RandomSubset` was asked for {self.k} submodels of {self.kind!r}, but the model has {len(found)} "
                    f"that hold variables that can train{but}. Ask for fewer."
                )
            # Python's own generator takes a text as its seed, and draws the same on every machine.
            self._drawn[tree] = frozenset(random.Random(f"{self.seed} {self.number}").sample(left, self.k))
        return self._drawn[tree]


def _check_policies(name: str, policies: Iterable[object]) -> None:
    for policy in policies:
        if not isinstance(policy, VariablePolicy):
            raise TypeError(f"`{name}` takes policies, such as `Freeze('backbone')`. Received: {policy!r}.")
