"""A step plan is transformed: its frozen part computes with folded values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend import onednn
from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.data.batch import tensors_in
from tapeloop.folding.frozen_values import FrozenValues
from tapeloop.folding.graph_folding import GraphFolding
from tapeloop.folding.store import FoldedPart, FoldedValues
from tapeloop.step.context import Training
from tapeloop.step.plan import Planner, StepPlan


@dataclass(frozen=True)
class Folded:
    """A plan that was folded.

    Attributes:
        plan: Computes the same with folded values.
        values: These.
    """

    plan: StepPlan
    values: FoldedPart


def fold(planner: Planner, plan: StepPlan, store: FoldedValues) -> Folded | None:
    """Return a plan that computes the same with folded values, and these; None if there is nothing to fold.

    Gradients through what is frozen still take its weights as they stand.

    Args:
        planner: What made the plan.
        plan: The plan of a step, or of a micro-batch.
        store: Holds the folded values.
    """
    parts = planner.parts
    known = [v.tf_variable for v in planner.selection.tree.variables]
    whole = TracedGraph(plan.functions[0], [*known, *parts.attributes.all_variables()])
    if whole.calls_python:  # which may assign to any variable
        return None
    # XLA has no such convolutions.
    keeps_filters = store.may_keep_filters and not parts.compilation.uses_xla and onednn.is_used()
    folding = GraphFolding(whole, FrozenValues(whole, _still(planner, plan, whole)), keeps_filters=keeps_filters)
    if not folding.is_worth_it:
        return None
    values = store.made(folding.keys(), folding.sources(), folding.values)
    part = folding.rest()

    def run(batch: Any) -> Any:
        computed = part([*tensors_in(batch, apart=True), *(value.variable.read_value() for value in values)])
        return whole.structured(computed)

    spec, _ = whole.function.structured_input_signature
    run_folded = tf.function(run, autograph=False).get_concrete_function(*spec)
    values_there = FoldedPart(values, folding.weights, folding.values, parts.interventions, bool(folding.kept))
    if folding.kept:
        store.keeping.add(values_there)
    return Folded(dataclasses.replace(plan, compute=run_folded), values_there)


def _still(planner: Planner, plan: StepPlan, whole: TracedGraph) -> set[str]:
    """Return the names of the captures that nothing moves while the step is in use: neither this step nor training."""
    selection, attributes = planner.selection, planner.parts.attributes
    still = {variable.tf_variable.ref() for variable in selection.still if not variable.seed}
    # A teacher that the trainer keeps beside its model is as frozen, unless the step assigns to it.
    aside = {variable.ref() for variable in attributes.variables()}
    still |= {variable.ref() for variable in attributes.all_variables()} - aside
    follows = plan.context.follows if isinstance(plan.context, Training) else ()
    moved = {target.tf_variable.ref() for follow in follows for target, _ in follow.pairs}
    moved |= {variable.tf_variable.ref() for variable in (*plan.context.assigned, *selection.trained)}
    written = whole.written()
    return {name for name, v in whole.variables.items() if v.ref() in still - moved and name not in written}
