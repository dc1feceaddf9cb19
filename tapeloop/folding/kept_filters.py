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


def keep_filters(
    nodes: dict[str, Any], sums: Collection[str], names: Iterable[str], outputs: Collection[str]
) -> list[str]:
    """Rewrite convolutions, each with the bias, the sum and the activation that alone follow on it.

    Args:
        nodes: The nodes of a step by name.
        sums: The additions that broadcast nothing; see `plain_sums`.
        names: The convolutions.
        outputs: The nodes whose values the step returns.

    Returns:
        The convolutions on which a bias follows, which alone are rewritten.
    """
    rewriting = _Rewriting(nodes, sums, outputs)
    rewritten = [name for name in names if rewriting.rewrite(nodes[name])]
    rewriting.rename()
    return rewritten


def plain_sums(ops: Iterable[tf.Operation], values: FrozenValues) -> set[str]:
    """Return the names of the additions of two tensors of one shape: of known sizes, but perhaps for the batch.

    Args:
        ops: The ops of a step, each after those whose outputs it takes.
        values: What of it is frozen, and has no batch.
    """
    batch_of: dict[str, str] = {}  # by tensor, the tensor whose batch it has
    found = set()
    for op in ops:
        taken = [tensor for tensor in op.inputs if tensor.name not in values.names]
        batches = {batch_of.get(tensor.name, tensor.name) for tensor in taken}
        # A kernel that trains is no tensor with a batch.
        of_first = op.type in _WITHIN_EXAMPLES and batch_of.get(op.inputs[0].name, op.inputs[0].name)
        keeps = {of_first} if of_first else batches if op.type in _PAIRWISE else set()
        if len(keeps) == 1:
            batch_of |= dict.fromkeys([output.name for output in op.outputs], *keeps)
        if op.type == "AddV2" and len(taken) == 2:
            one, other = (tensor.shape for tensor in taken)
            is_known = bool(one.rank) and one.rank == other.rank
            is_known = is_known and one[1:].is_fully_defined() and one[1:] == other[1:]
            if is_known and (one[0] == other[0] if one[0] is not None else len(batches) == 1):
                found.add(op.name)
    return found


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

    def rewrite(self, node: Any) -> bool:
        """Rewrite a convolution, if a bias follows on it, and tell whether one did."""
        bias = self._follower(node, {"BiasAdd"})
        if bias is None:
            return False
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
        return True

    def rename(self) -> None:
        """Have those that look at the shape of what is gone, or wait for it, do so with what stands for it."""
        for node in self._nodes.values():
            renamed = [self._new_name(name) for name in node.input]
            del node.input[:]
            node.input.extend(renamed)

    def _new_name(self, name: str) -> str:
        bare = name.lstrip("^")
        return name.replace(bare, self._renamed.get(bare, bare))

    def _follower(self, node: Any, kinds: Collection[str]) -> Any:
        """Return what alone takes the value of a node, if it is of some kind."""
        takers = self._takers[node.name]
        alone = len(takers) == 1 and node.name not in self._outputs and takers[0].op in kinds
        # One that stands for several by now has the name of the last of them.
        is_there = alone and self._nodes.get(takers[0].name) is takers[0]
        waits = is_there and any(name[0] == "^" for name in takers[0].input)
        return takers[0] if is_there and not waits else None
