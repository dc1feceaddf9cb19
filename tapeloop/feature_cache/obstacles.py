"""What stands in the way of a frontier, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.feature_cache.frozen_ops import FrozenAnalysis
from tapeloop.model.selection import Selection


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of a frontier.

    Attributes:
        what: Where it stands in the model, or the name of an op.
        why: What is the matter with it.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"`{self.what}` {self.why}" if self.what else f"it {self.why}"


def obstacles(whole: TracedGraph, selection: Selection, marks: FrozenAnalysis, most: int = 3) -> list[Obstacle]:
    """Return what comes first of what is not frozen, where it meets what depends on the batch alone."""
    infos = {id(variable.tf_variable): variable for variable in selection.tree.variables}
    found: list[Obstacle] = []
    touched = {given.name for given in whole.batch}
    for op in whole.ops:
        taken = {given.name for given in op.inputs}
        if not taken & touched - marks.sized.keys():
            continue
        if taken & touched <= marks.depends and not marks.is_static(op) and op.type != "Placeholder":
            here = [_obstacle(whole, infos, origin) for origin in marks.origins(op)]
            found += [one for one in dict.fromkeys(here) if one not in found]
        touched |= {output.name for output in op.outputs}
    if not found and marks.mixed:
        mixing = next(op.name for op in whole.ops if any(output.name in marks.mixed for output in op.outputs))
        found = [Obstacle(mixing, "makes one thing of the examples of a batch, and comes first")]
    return found[:most] or [Obstacle("", "reads no frozen weights on the way to what trains")]


def _obstacle(whole: TracedGraph, infos: dict[int, Any], origin: tf.Operation) -> Obstacle:
    handles = [given.name for given in origin.inputs if given.name in whole.variables]
    variable = whole.variables[handles[0]] if handles else None
    info = infos.get(id(variable))
    if variable is None:
        return Obstacle(origin.name, f"(`{origin.type}`) may give something else each time, and comes first")
    if info is None:
        return Obstacle(variable.name, "is no variable of the model, so that nobody knows when it changes")
    if info.seed:
        return Obstacle(info.submodels[-1].path, "is random and comes first")
    return Obstacle(info.path, "trains and comes first" if info.trainable else "changes in each step and comes first")
