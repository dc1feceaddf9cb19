"""Splitting a step at its frontier, so that it runs on features from there."""

from __future__ import annotations

import weakref
from typing import Any

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.feature_cache.frontier import Cut, Obstacle, find
from tapeloop.feature_cache.frozen_ops import model_variables
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.model.tree import VariableInfo

_Moves = frozenset[VariableInfo]
# Kept beside the steps, which know nothing of the cache: a later fit finds its cut, and traces nothing.
_cuts: weakref.WeakKeyDictionary[CompiledStep, dict[tuple[str, bool, _Moves], Cut]] = weakref.WeakKeyDictionary()
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
    cuts, key = _cuts.setdefault(step, {}), (str(spec), random, moving)
    if key not in cuts:
        # The body is traced by itself once more, and cut in its graph: forward and backward pass, several updates and
        # overridden steps are cut by the same code, and the model is traced no more often than without a cache.
        whole = TracedGraph(step.whole(spec), step.variables())
        written, variables = whole.written(), model_variables(whole, step.selection.tree)
        _moves[step] = frozenset(variable for name, variable in variables.items() if name in written)
        found = find(whole, step.selection, batch, random=random, moving=moving)
        if not isinstance(found, Cut):  # not kept: another batch may show no obstacle
            return found
        cuts[key] = found
    step.split_at(cuts[key])
    return cuts[key]
