"""A traced step is taken apart into what is computed of frozen weights once, and a rest that takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend.traced_graph import Subgraph, TracedGraph
from tapeloop.folding.chains import KINDS, find_chains
from tapeloop.folding.evaluation import Evaluation
from tapeloop.folding.frozen_values import FrozenValues
from tapeloop.folding.kept_filters import can_keep, keep_filters, sums_without_broadcast

NAME = "folded/{}"  # of what stands for a folded value in the graph


class GraphFolding:
    """What is folded in one traced step.

    Attributes:
        chains: The convolutions and products that take in what follows on them.
        others: The other tensors that are computed of frozen weights, and taken by what is not.
        kept: The convolutions that keep their kernels.
    """

    def __init__(self, whole: TracedGraph, values: FrozenValues, *, keeps_filters: bool = False) -> None:
        """Analyze a step.

        Args:
            whole: The step.
            values: What of it is frozen.
            keeps_filters: Whether convolutions keep frozen kernels as they are when the step runs first.
        """
        self._whole = whole
        self._values = values
        # Reads are among the effects, and would keep alive what nobody takes.
        self._effects = [op for op in whole.effects if not whole.is_pure(op)]
        self._definition = whole.subgraph(whole.outputs, whole.inputs, self._effects).definition
        live = {node.name for node in self._definition.node}
        ops = [op for op in whole.ops if op.name in live]
        self._takers = _takers(whole, ops)
        self.chains = list(find_chains(ops, values, lambda tensor: self._takers[tensor.name]))
        self.others = self._boundary(ops)
        taken = [tensor for chain in self.chains for tensor in chain.values]
        self.kept = [op for op in ops if keeps_filters and can_keep(op, values) and self._gets_bias(op)]
        self._evaluation = Evaluation(whole, [*taken, *self.others])

    @property
    def is_worth_it(self) -> bool:
        """Whether there is anything to fold."""
        return bool(self.chains or self.others or self.kept)

    def values(self) -> list[tf.Tensor]:
        """Compute the folded values."""
        known = self._evaluation.values()
        folded = [v for chain in self.chains for v in chain.folded(*(known[tensor.name] for tensor in chain.values))]
        return folded + [known[tensor.name] for tensor in self.others]

    def keys(self) -> list[Hashable]:
        """Return what tells each folded value from others."""
        keys: list[Hashable] = []
        for chain in self.chains:
            terms = tuple((term.op.type, term.is_second, self._values.key(term.value)) for term in chain.terms)
            keys += [(chain.op.type, self._values.key(chain.kernel), terms, part) for part in ("kernel", "bias")]
        return keys + [self._values.key(tensor) for tensor in self.others]

    def sources(self) -> list[tuple[Any, ...]]:
        """Return what each folded value is computed of."""
        behind = [chain.values for chain in self.chains for _ in range(2)] + [[tensor] for tensor in self.others]
        captures, sources = self._whole.captures, self._values.sources
        return [tuple(captures[name] for t in tensors for name in sorted(sources[t.name])) for tensors in behind]

    @property
    def weights(self) -> list[tf.Variable]:
        """The frozen weights that the folded values are computed of, and the kernels that are kept."""
        kernels = [op.inputs[1] for op in self.kept]
        tensors = [*(tensor for chain in self.chains for tensor in chain.values), *self.others, *kernels]
        names = dict.fromkeys(name for tensor in tensors for name in sorted(self._values.sources[tensor.name]))
        return [self._whole.variables[name] for name in names]

    def rest(self) -> Subgraph:
        """Return the step that takes the folded values after the tensors of a batch."""
        definition = tf.compat.v1.GraphDef()
        definition.CopyFrom(self._definition)
        nodes = {node.name: node for node in definition.node}
        feeds = [_Feed(NAME.format(number)) for number in range(2 * len(self.chains) + len(self.others))]
        given = iter(feeds)
        instead: dict[str, str] = {}
        for chain in self.chains:
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
        for tensor in self.others:
            instead[tensor.name.removesuffix(":0")] = next(given).node
        for node in nodes.values():
            if f"{node.name}:0" not in self._values.names:
                taken = [instead.get(name, name) for name in node.input]
                del node.input[:]
                node.input.extend(taken)
        if self.kept:
            outputs = {output.op.name for output in self._whole.outputs}
            sums = sums_without_broadcast(self._whole.ops, self._values)
            keep_filters(nodes, sums, [op.name for op in self.kept], outputs)
        return self._whole.edited(nodes, [*self._whole.inputs, *feeds], self._effects)

    def _gets_bias(self, op: tf.Operation) -> bool:
        """Tell whether a bias alone follows on a convolution, once its chain is folded."""
        takers = self._takers[op.outputs[0].name]
        has_bias = len(takers) == 1 and takers[0] is not None and takers[0].type == "BiasAdd"
        return has_bias or any(chain.op.name == op.name for chain in self.chains)

    def _boundary(self, ops: Sequence[tf.Operation]) -> list[tf.Tensor]:
        """Return the other tensors that are computed of frozen weights, and taken by what is not."""
        values = self._values
        inside = {op.name for chain in self.chains for op in (chain.op, *(term.op for term in chain.terms))}
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
        # A variable of any shape counts nothing.
        weights = sum((source.shape.num_elements() or 0) * source.dtype.size for source in sources)
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
