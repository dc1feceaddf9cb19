"""Policies that change as training goes: each a frozen value that answers with the policy that holds at a moment."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tapeloop._validation import is_number, whole_number
from tapeloop.errors import PolicyError
from tapeloop.model.filters import Filter, FilterLike, SubmodelKind, to_filter
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo
from tapeloop.policies.base import DEFAULT_GROUP, Progress, Unit, VariablePolicy
from tapeloop.policies.static import TrainOnly


@dataclass(frozen=True, init=False, repr=False)
class _Scheduled:
    """The base of policies that answer anew after a number of steps or epochs."""

    _unit: Unit
    _period: int

    def _set(self, unit: Unit, period: int, **fields: Any) -> None:
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

    def _unit_unless(self, default: Unit) -> str:
        """Return the argument `unit` as it is written, if it is not the default."""
        return "" if self._unit == default else f", unit={self._unit!r}"


@dataclass(frozen=True, init=False, repr=False)
class Phases(_Scheduled, VariablePolicy):
    """One policy after the other, each from the epoch (or step) that is its key.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Phases({0: tl.Freeze("base"), 2: tl.TrainAll()}), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=3, verbose=0)
        >>> [(phase.epoch, len(phase.selection.trained)) for phase in history.phases]
        [(0, 2), (2, 4)]
    """

    _phases: tuple[tuple[int, VariablePolicy], ...]

    def __init__(self, phases: Mapping[int, VariablePolicy], *, unit: Unit = "epoch") -> None:
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

    With a `decay`, each stage is a group, `"stage0"`, `"stage1"` and so on, whose learning rate is that of the stage
    before it times the decay: what is unfrozen later, and lies lower, learns more slowly.

    Source: Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018: gradual unfreezing in
    section 3.3; discriminative fine-tuning, with a decay of 1 / 2.6, in section 3.2.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.GradualUnfreeze(["head", "base"], every=2), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=3, verbose=0)
        >>> [(phase.epoch, phase.policy) for phase in history.phases]
        [(0, TrainOnly(glob('head'))), (2, TrainOnly(glob('head'), glob('base')))]
        >>> trainer.policy = tl.GradualUnfreeze(["head", "base"], every=2, decay=0.5)
        >>> trainer.selection.multipliers
        {'stage1': 0.5, 'stage0': 1.0}
    """

    _stages: tuple[Filter, ...]
    _decay: float | None

    def __init__(
        self, stages: Iterable[FilterLike], *, every: int = 1, decay: float | None = None, unit: Unit = "epoch"
    ) -> None:
        """Set the stages.

        Args:
            stages: What trains first, what joins then, and so on. What several choose belongs to the first of them.
            every: How many epochs (or steps) lie between two stages.
            decay: The factor from the learning rate of one stage to that of the next, above 0 and at most 1; None: all
                stages are one group.
            unit: What `every` counts: `"epoch"` or `"step"`.

        Raises:
            PolicyError: There are no stages.
            TypeError: `stages` is no list of filters.
            ValueError: `every` is no whole number of 1 or more, `decay` is out of range, or `unit` no unit.
        """
        if isinstance(stages, str) or not isinstance(stages, Iterable):
            raise TypeError(f"`GradualUnfreeze` takes a list of filters. Received: {stages!r}.")
        filters = tuple(to_filter(stage) for stage in stages)
        if not filters:
            raise PolicyError("`GradualUnfreeze` needs one or more stages. Received none: say what trains first.")
        if decay is not None and (not is_number(decay) or not 0 < decay <= 1):
            raise ValueError(f"`decay` must be above 0 and at most 1. Received: {decay!r}.")
        decay = None if decay is None else float(decay)
        self._set(unit, whole_number("every", every, 1), _stages=filters, _decay=decay)

    def __repr__(self) -> str:
        decay = "" if self._decay is None else f", decay={self._decay}"
        return f"GradualUnfreeze({list(self._stages)!r}, every={self._period}{decay}{self._unit_unless('epoch')})"

    def phases(self) -> tuple[VariablePolicy, ...]:
        return tuple(self._first(count) for count in range(1, 1 + len(self._stages)))

    def at(self, progress: Progress) -> VariablePolicy:
        return self._first(1 + self._periods_before(progress))

    def _first(self, count: int) -> VariablePolicy:
        """Return the policy that trains so many stages; once all of them train, it stays the same."""
        stages = self._stages[:count]
        return TrainOnly(*stages) if self._decay is None else _Stages(stages, self._decay)


@dataclass(frozen=True)
class _Stages(VariablePolicy):
    """The first stages of a `GradualUnfreeze`, each with a learning rate of its own."""

    stages: tuple[Filter, ...]
    decay: float

    def __repr__(self) -> str:
        return f"GradualUnfreeze stages {list(self.stages)!r} (decay={self.decay})"

    def filters(self) -> tuple[Filter, ...]:
        return self.stages

    def group(self, variable: VariableInfo) -> str | None:
        stage = self._stage(variable)
        return None if stage is None else f"stage{stage}"

    def multiplier(self, variable: VariableInfo) -> float:
        return self.decay ** (self._stage(variable) or 0)

    def rule(self, variable: VariableInfo) -> str:
        stage = self._stage(variable)
        if stage is None:
            return "GradualUnfreeze: all else"
        return f"GradualUnfreeze: {self.stages[stage]!r} x{self.multiplier(variable):.3g}"

    def _stage(self, variable: VariableInfo) -> int | None:
        # The first that chooses it: the last stage is often the whole backbone, which those before are parts of.
        return next((number for number, stage in enumerate(self.stages) if stage(variable)), None)


@dataclass(frozen=True, init=False, repr=False)
class Cycle(_Scheduled, VariablePolicy):
    """Several policies in turn, and around again: `Cycle([policy, other], every=100)`.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> policy = tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base")], every=2)
        >>> trainer = tl.Trainer(model, policy, loss="mse")
        >>> history = trainer.fit((np.ones((32, 4)), np.ones((32, 2))), batch_size=8, verbose=0)
        >>> [(phase.step, phase.policy) for phase in history.phases]
        [(0, TrainOnly(glob('head'))), (2, TrainOnly(glob('base')))]
    """

    _policies: tuple[VariablePolicy, ...]

    def __init__(self, policies: Iterable[VariablePolicy], *, every: int = 1, unit: Unit = "step") -> None:
        """Set the policies.

        Args:
            policies: What trains, in turn.
            every: How many steps (or epochs) each holds.
            unit: What `every` counts: `"step"` or `"epoch"`.

        Raises:
            PolicyError: There are no policies.
            TypeError: `policies` is no list of policies.
            ValueError: `every` is no whole number of 1 or more, or `unit` no unit.
        """
        if isinstance(policies, VariablePolicy) or not isinstance(policies, Iterable):
            raise TypeError(f"`Cycle` takes a list of policies. Received: {policies!r}.")
        turns = tuple(policies)
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
        unit: Unit = "step",
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
            ValueError: `k` or `every` is no whole number of 1 or more, `seed` none of 0 or more, or `unit` no unit.
        """
        k, every, seed = whole_number("k", k, 1), whole_number("every", every, 1), whole_number("seed", seed, 0)
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
