"""Frozen convolutions keep their kernels in the order in which the processor's library computes with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import tensorflow as tf

from tapeloop._backend.onednn import ACTIVATIONS, keep_filter
from tapeloop.folding.frozen_values import FrozenValues


def can_keep(op: tf.Operation, values: FrozenValues) -> bool:
    """Tell whether an op is a convolution that can keep its kernel, since that is frozen."""
    if op.type != "Conv2D" or op.outputs[0].dtype != tf.float32 or op.get_attr("data_format") != b"NHWC":
        return False
    given, kernel = op.inputs
    # In groups, a kernel sees some of the channels.
    sees_all = given.shape.rank == kernel.shape.rank == 4 and given.shape[-1] == kernel.shape[2] is not None
    return sees_all and kernel.name in values.of_weights and given.name not in values.names


def keep_filters(
    nodes: dict[str, Any], ops: Mapping[str, tf.Operation], names: Iterable[str], outputs: Collection[str]
) -> None:
    """Rewrite convolutions, each with the bias and the activation that alone follow on it.

    Args:
        nodes: The nodes of a step by name.
        ops: The ops that these were, for the shapes.
        names: The convolutions.
        outputs: The nodes whose values the step returns.
    """
    rewriting = _Rewriting(nodes, ops, outputs)
    for name in names:
        rewriting.rewrite(nodes[name])
    rewriting.rename()


class _Rewriting:
    def __init__(self, nodes: dict[str, Any], ops: Mapping[str, tf.Operation], outputs: Collection[str]) -> None:
        self._nodes = nodes
        self._ops = ops
        self._outputs = outputs
        self._renamed: dict[str, str] = {}
        self._takers: dict[str, list[Any]] = defaultdict(list)
        for node in nodes.values():
            # Who looks at the shape alone may look at what comes out in the end: it is the same.
            for taken in node.input if node.op != "Shape" else ():
                self._takers[taken].append(node)

    def rewrite(self, node: Any) -> None:
        """Rewrite a convolution, if a bias follows on it."""
        bias = self._follower(node, {"BiasAdd"})
        if bias is None:
            return
        added = self._follower(bias, {"AddV2"})
        added = added if added is not None and self._has_equal_shapes(added) else None
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
        return takers[0] if alone and takers[0].name in self._nodes else None

    def _has_equal_shapes(self, node: Any) -> bool:
        one, other = (taken.shape for taken in self._ops[node.name].inputs)
        return bool(one.is_fully_defined() and one == other)
