"""A step plan is transformed: its frozen part computes with folded values."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend.traced_graph import Subgraph, TracedGraph
from tapeloop.data.batch import tensors_in
from tapeloop.folding.chains import KINDS, chains
from tapeloop.folding.evaluation import Evaluation
from tapeloop.folding.frozen_values import FrozenValues
from tapeloop.folding.store import FoldedPart, FoldedValues
from tapeloop.step.context import Training
from tapeloop.step.plan import Planner, StepPlan

NAME = "folded/{}"  # of what stands for a folded value in the graph


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
    folding = _Folding(whole, FrozenValues(whole, _still(planner, plan, whole)))
    if not folding.is_worth_it:
        return None
    values = store.made(folding.keys(), folding.sources(), folding.values)
    part = folding.rest()

    def run(batch: Any) -> Any:
        computed = part([*tensors_in(batch, apart=True), *(value.variable.read_value() for value in values)])
        return whole.structured(computed)

    spec, _ = whole.function.structured_input_signature
    run_folded = tf.function(run, autograph=False).get_concrete_function(*spec)
    return Folded(dataclasses.replace(plan, compute=run_folded), FoldedPart(store, values, folding.values))


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


class _Folding:
    """What is folded in one traced step."""

    def __init__(self, whole: TracedGraph, values: FrozenValues) -> None:
        self._whole = whole
        self._values = values
        # Reads are among the effects, and would keep alive what nobody takes.
        self._effects = [op for op in whole.effects if not whole.is_pure(op)]
        self._definition = whole.subgraph(whole.outputs, whole.inputs, self._effects).definition
        live = {node.name for node in self._definition.node}
        ops = [op for op in whole.ops if op.name in live]
        self._takers = _takers(whole, ops)
        self._chains = list(chains(ops, values, lambda tensor: self._takers[tensor.name]))
        self._others = self._boundary(ops)

    @property
    def is_worth_it(self) -> bool:
        """Whether there is anything to fold."""
        return bool(self._chains or self._others)

    def values(self) -> list[tf.Tensor]:
        """Compute the folded values."""
        evaluation = Evaluation(self._whole)
        folded = [v for chain in self._chains for v in chain.folded(*map(evaluation.value, chain.values))]
        return folded + [evaluation.value(tensor) for tensor in self._others]

    def keys(self) -> list[Hashable]:
        """Return what tells each folded value from others."""
        keys: list[Hashable] = []
        for chain in self._chains:
            terms = tuple((term.op.type, term.is_second, self._values.key(term.value)) for term in chain.terms)
            keys += [(chain.op.type, self._values.key(chain.kernel), terms, part) for part in ("kernel", "bias")]
        return keys + [self._values.key(tensor) for tensor in self._others]

    def sources(self) -> list[tuple[Any, ...]]:
        """Return what each folded value is computed of."""
        behind = [chain.values for chain in self._chains for _ in range(2)] + [[tensor] for tensor in self._others]
        captures, sources = self._whole.captures, self._values.sources
        return [tuple(captures[name] for t in tensors for name in sorted(sources[t.name])) for tensors in behind]

    def rest(self) -> Subgraph:
        """Return the step that takes the folded values after the tensors of a batch."""
        nodes = {node.name: node for node in self._definition.node}
        feeds = [_Feed(NAME.format(number)) for number in range(2 * len(self._chains) + len(self._others))]
        given = iter(feeds)
        instead: dict[str, str] = {}
        for chain in self._chains:
            kernel, bias = next(given), next(given)
            nodes[chain.op.name].input[KINDS[chain.op.type].kernel] = kernel.node
            last = nodes[chain.terms[-1].op.name]
            del last.input[:]
            last.op = "BiasAdd"
            last.input.extend([chain.op.name, bias.node])
            last.attr["data_format"].s = b"NHWC"
            # What looks at a shape alone, or waits, may as well look at the convolution.
            for term in chain.terms[:-1]:
                instead[term.op.name] = chain.op.name
                instead["^" + term.op.name] = "^" + chain.op.name
                del nodes[term.op.name]
        for tensor in self._others:
            instead[tensor.name.removesuffix(":0")] = next(given).node
        for node in nodes.values():
            if f"{node.name}:0" not in self._values.names:
                taken = [instead.get(name, name) for name in node.input]
                del node.input[:]
                node.input.extend(taken)
        return self._whole.edited(nodes, [*self._whole.inputs, *feeds], self._effects)

    def _boundary(self, ops: Sequence[tf.Operation]) -> list[tf.Tensor]:
        """Return the other tensors that are computed of frozen weights, and taken by what is not."""
        values = self._values
        inside = {op.name for chain in self._chains for op in (chain.op, *(term.op for term in chain.terms))}
        found: dict[str, tf.Tensor] = {}
        for op in ops:
            if op.outputs and op.outputs[0].name in values.names:
                continue
            for tensor in op.inputs if op.name not in inside else ():
                computed = tensor.name in values.of_weights and tensor.name not in values.plain
                if computed and self._is_small(tensor):
                    found[tensor.name] = tensor
        return list(found.values())

    def _is_small(self, tensor: tf.Tensor) -> bool:
        """Tell whether a tensor takes no more memory than the weights that it is computed of."""
        if not tensor.shape.is_fully_defined() or tensor.dtype in (tf.resource, tf.variant, tf.string):
            return False
        sources = [self._whole.variables[name] for name in self._values.sources[tensor.name]]
        weights = sum(source.shape.num_elements() * source.dtype.size for source in sources)
        return bool(tensor.shape.num_elements() * tensor.dtype.size <= weights)


@dataclass(frozen=True)
class _Feed:
    """Stands for a folded value in the graph, as a tensor does for an input."""

    node: str

    @property
    def name(self) -> str:
        return f"{self.node}:0"


def _takers(whole: TracedGraph, ops: Iterable[tf.Operation]) -> dict[str, list[tf.Operation | None]]:
    """Return the ops that take each tensor, and not its shape alone; None stands for the end of the step."""
    takers: dict[str, list[tf.Operation | None]] = defaultdict(list)
    for op in ops:
        for tensor in op.inputs if op.type != "Shape" else ():
            takers[tensor.name].append(op)
    for tensor in whole.outputs:
        takers[tensor.name].append(None)
    return takers
