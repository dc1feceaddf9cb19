"""Splitting a step at its frontier, and having it run on features from there."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.feature_cache.frontier import Cut, Obstacle, find
from tapeloop.feature_cache.frozen_ops import model_variables
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.model.tree import VariableInfo
from tapeloop.step.plan import StepPlan

_Moves = frozenset[VariableInfo]


@dataclass(frozen=True)
class _Split:
    """A step that is cut.

    Attributes:
        cut: Where.
        plan_rest: Plans the rest of the step, for features of a signature.
    """

    cut: Cut
    plan_rest: Callable[[Any], StepPlan]


# Kept beside the steps, which know nothing of the cache: a later fit finds its cut, and traces nothing.
_splits: weakref.WeakKeyDictionary[CompiledStep, dict[tuple[str, bool, _Moves], _Split]] = weakref.WeakKeyDictionary()
_moves: weakref.WeakKeyDictionary[CompiledStep, _Moves] = weakref.WeakKeyDictionary()


def split(
    step: CompiledStep, spec: Any, batch: Any, *, random: bool, beside: CompiledStep | None = None
) -> Cut | list[Obstacle]:
    """Find the frontier of a step. The step then runs from there if it is given features.

    Args:
        step: The step.
        spec: The signature of batches.
        batch: One of them.
        random: Whether random ops may come before the frontier.
        beside: The training step of which it evaluates the results. What that step assigns to is not frozen.

    Returns:
        Where the step is cut, or what stands in the way.
    """
    moving = frozenset() if beside is None else _moves.get(beside, frozenset())
    splits, key = _splits.setdefault(step, {}), (str(spec), random, moving)
    if key not in splits:
        # The plan is cut in its graph: forward and backward pass, several updates and overridden steps are cut by the
        # same code, and the model is traced no more often than without a cache.
        plan = step.plan(spec)
        known = [variable.tf_variable for variable in step.selection.tree.variables]
        whole = TracedGraph(plan.functions[0], [*known, *step.planner.parts.attributes.variables()])
        written, variables = whole.written(), model_variables(whole, step.selection.tree)
        _moves[step] = frozenset(variable for name, variable in variables.items() if name in written)
        cut = find(whole, step.selection, batch, random=random, moving=moving)
        if not isinstance(cut, Cut):  # not kept: another batch may show no obstacle
            return cut
        splits[key] = _Split(cut, lambda features: dataclasses.replace(plan, compute=cut.rest_for(features)))
    step.split_at(splits[key].plan_rest)
    return splits[key].cut
