"""Splitting a step at its frontier, and having it run on features from there."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.feature_cache.frontier import Cut, find
from tapeloop.feature_cache.obstacles import Obstacle
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.step.plan import StepPlan


@dataclass
class _Known:
    """What is known of a step.

    Attributes:
        moves: The identities of the variables that it assigns to.
        cuts: Its cuts, by the signature of batches, whether randomness may come before, and what another step moves.
        rests: What plans the rest of the step behind each cut.
    """

    moves: frozenset[int] = frozenset()
    cuts: dict[tuple[str, bool, frozenset[int]], Cut] = field(default_factory=dict)
    rests: dict[tuple[str, bool, frozenset[int]], Callable[[Any], StepPlan]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[CompiledStep, _Known] = weakref.WeakKeyDictionary()


def split(
    step: CompiledStep, spec: Any, batch: Any, *, random: bool, moving: frozenset[int] = frozenset()
) -> Cut | list[Obstacle]:
    """Find the frontier of a step, on whose features it then runs where it is fed them.

    Args:
        step: The step.
        spec: The signature of batches.
        batch: One of them.
        random: Whether what is random may come before it.
        moving: The identities of variables that another step moves.

    Returns:
        Where the step is cut, or what stands in the way.
    """
    known, key = _known.setdefault(step, _Known()), (str(spec), random, moving)
    if key not in known.cuts:
        plan = step.plan(spec)
        variables = [v.tf_variable for v in step.selection.tree.variables] + step.planner.parts.attributes.variables()
        whole = TracedGraph(plan.functions[0], variables)
        known.moves = frozenset(id(whole.variables[name]) for name in whole.written() if name in whole.variables)
        found = find(whole, step.selection, batch, random=random, moving=moving)
        if not isinstance(found, Cut):
            return found
        known.cuts[key] = found
        known.rests[key] = functools.partial(_plan_rest, plan, found)
    step.split_at(known.rests[key])
    return known.cuts[key]


def _plan_rest(plan: StepPlan, cut: Cut, features: Any) -> StepPlan:
    """Return the plan of a step that computes only the rest behind its cut, on features of this signature."""
    return dataclasses.replace(plan, compute=cut.rest_for(features))


def moves_of(step: CompiledStep) -> frozenset[int]:
    """Return the identities of the variables that a step assigns to, once its frontier was looked for."""
    known = _known.get(step)
    return frozenset() if known is None else known.moves
