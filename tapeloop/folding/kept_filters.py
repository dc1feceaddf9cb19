"""Frozen convolutions keep their kernels in the order in which the processor's library computes with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import tensorflow as tf

from tapeloop._backend.onednn import ACTIVATIONS, keep_filter
from tapeloop.folding.frozen_values import FrozenValues

# Ops whose output has the batch of their first input.
_WITHIN_EXAMPLES = frozenset(
    {"AvgPool", "BiasAdd", "Cast", "Conv2D", "DepthwiseConv2dNative", "Identity", "MaxPool", "Sigmoid", "Tanh"}
    | ACTIVATIONS
)
_PAIRWISE = frozenset({"Add", "AddV2", "Maximum", "Mul", "RealDiv", "SquaredDifference", "Sub"})


def can_keep(op: tf.Operation, values: FrozenValues) -> bool:
    """Tell whether an op is a convolution that can keep its kernel, since that is frozen."""
    if op.type != "Conv2D" or op.outputs[0].dtype != tf.float32 or op.get_attr("data_format") != b"NHWC":
        return False
    given, kernel = op.inputs
    # In groups, a kernel sees some of the channels.
    sees_all = given.shape.rank == kernel.shape.rank == 4 and given.shape[-1] == kernel.shape[2] is not None
    return sees_all and kernel.name in values.of_weights and given.name not in values.names


def keep_filters(nodes: dict[str, Any], sums: Collection[str], names: Iterable[str], outputs: Collection[str]) -> None:
    """Rewrite convolutions, each with the bias, the sum and the activation that alone follow on it.

    Args:
        nodes: The nodes of a step by name.
        sums: The additions that broadcast nothing; see `sums_without_broadcast`.
        names: The convolutions.
        outputs: The nodes whose values the step returns.
    """
    rewriting = _Rewriting(nodes, sums, outputs)
    for name in names:
        rewriting.rewrite(nodes[name])
    rewriting.rename()


def sums_without_broadcast(ops: Iterable[tf.Operation], values: FrozenValues) -> set[str]:
    """Return the names of the additions of two tensors of one shape.

    All sizes are known but perhaps that of the batch, which is the same if both are computed, example by example, of
    one tensor.

    Args:
        ops: The ops of a step, each after those whose outputs it takes.
        values: The frozen tensors, which have no batch.
    """
    source_of: dict[str, str] = {}  # by tensor, the tensor of which it is computed example by example
    found = set()
    for op in ops:
        moving = [tensor for tensor in op.inputs if tensor.name not in values.names]
        sources = {source_of.get(tensor.name, tensor.name) for tensor in moving}
        if op.type in _WITHIN_EXAMPLES:
            # The first input has the examples; a kernel or bias that trains has none.
            first = op.inputs[0].name
            source_of[op.outputs[0].name] = source_of.get(first, first)
        elif op.type in _PAIRWISE and len(sources) == 1:
            (source_of[op.outputs[0].name],) = sources
        if op.type == "AddV2" and len(moving) == 2 and _has_one_shape(*moving, of_one_source=len(sources) == 1):
            found.add(op.name)
    return found


def _has_one_shape(one: tf.Tensor, other: tf.Tensor, *, of_one_source: bool) -> bool:
    if not one.shape.rank or one.shape.rank != other.shape.rank:
        return False
    rest, batch = one.shape[1:], one.shape[0]
    has_one_batch = of_one_source if batch is None else batch == other.shape[0]
    return bool(rest.is_fully_defined() and rest == other.shape[1:] and has_one_batch)


class _Rewriting:
    def __init__(self, nodes: dict[str, Any], sums: Collection[str], outputs: Collection[str]) -> None:
        self._nodes = nodes
        self._sums = sums
        self._outputs = outputs
        self._renamed: dict[str, str] = {}
        self._takers: dict[str, list[Any]] = defaultdict(list)
        # What others wait for, or look at the shape of.
        self._watched = {
            name.lstrip("^") for node in nodes.values() for name in node.input if node.op == "Shape" or name[0] == "^"
        }
        for node in nodes.values():
            # Who looks at the shape alone may look at what comes out in the end: it is the same.
            for taken in node.input if node.op != "Shape" else ():
                self._takers[taken].append(node)

    def rewrite(self, node: Any) -> None:
        """Rewrite a convolution."""
        bias = self._follower(node, {"BiasAdd"})
        if bias is None:  # it waits for something
            return
        added = self._follower(bias, {"AddV2"})
        # The other summand may be computed by what waits for this one, and would come before itself.
        is_free = self._watched.isdisjoint({node.name, bias.name})
        added = added if added is not None and added.name in self._sums and is_free else None
        active = self._follower(bias if added is None else added, ACTIVATIONS)
        parts = [part for part in (node, bias, added, active) if part is not None]
        taken = [*node.input[:2], bias.input[1]]
        if added is not None:
            taken += [name for name in added.input if name[0] != "^" and name != bias.name]
        waits = [name for part in parts for name in part.input if name[0] == "^"]
        fused = ["BiasAdd", *(["Add"] if added is not None else []), *([active.op] if active is not None else [])]
        keep_filter(node, fused)
        del node.input[:]
        node.input.extend([*taken, *waits])
        # It takes the place of the last, by whose name others know it.
        for part in parts:
            del self._nodes[part.name]
        self._renamed |= {part.name: parts[-1].name for part in parts[:-1]}
        node.name = parts[-1].name
        self._nodes[node.name] = node

    def rename(self) -> None:
        """Have nodes that look at the shape of a removed node, or wait for it, do so with the one in its place."""
        for node in self._nodes.values():
            renamed = [self._new_name(name) for name in node.input]
            del node.input[:]
            node.input.extend(renamed)

    def _new_name(self, name: str) -> str:
        bare = name.removeprefix("^")
        return ("^" if name[0] == "^" else "") + self._renamed.get(bare, bare)

    def _follower(self, node: Any, kinds: Collection[str]) -> Any:
        """Return the node that alone takes the value of another, if it is of some kind and waits for nothing."""
        takers = self._takers[node.name]
        if len(takers) != 1 or node.name in self._outputs or takers[0].op not in kinds:
            return None
        (taker,) = takers
        # A sum that another convolution has taken in is there no more, though a node has its name.
        is_there = self._nodes.get(taker.name) is taker
        return taker if is_there and not any(name[0] == "^" for name in taker.input) else None
