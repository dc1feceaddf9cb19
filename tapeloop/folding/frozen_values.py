"""Which tensors of a traced step are computed of frozen weights alone."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import tensorflow as tf

from tapeloop._backend.eager_ops import can_run_alone
from tapeloop._backend.traced_graph import READING, VIEWS, TracedGraph

# Ops that show the weights of a variable and compute nothing.
PLAIN = frozenset(READING | VIEWS)
# No attribute of a node that says what it computes: where it runs and how it was traced.
_ASIDE = frozenset({"_class", "_output_shapes", "_XlaCompile", "_XlaMustCompile"})


class FrozenValues:
    """The tensors of a traced step that are computed of frozen weights and constants alone. They stand in it by name.

    Attributes:
        names: The tensors.
        of_weights: Those of them that depend on weights, and not on constants alone.
        plain: Those of them that are weights as they stand, or another view of them.
        sources: For each of them, the captures that it is computed of.
    """

    def __init__(self, whole: TracedGraph, still: Collection[str]) -> None:
        """Analyze a step.

        Args:
            whole: The step.
            still: The names of the captures that nothing moves while the step is in use.
        """
        self.names: set[str] = set()
        self.of_weights: set[str] = set()
        self.plain: set[str] = set()
        self.sources: dict[str, frozenset[str]] = {}
        self._whole = whole
        self._keys: dict[str, Hashable] = {}
        handles = set(still)
        for op in whole.ops:
            if op.type == "Placeholder":
                # A tensor that is captured, and no variable, keeps its value for good.
                kept = {out.name for out in op.outputs if out.name in whole.captures and out.dtype != tf.resource}
                self.names |= kept
                self.sources |= dict.fromkeys(kept, frozenset())
                continue
            taken = [given.name for given in op.inputs]
            if not op.outputs or not all(name in self.names or name in handles for name in taken):
                continue
            if whole.is_pure(op) and can_run_alone(op):
                self._add(op, taken, handles)

    def key(self, tensor: tf.Tensor) -> Hashable:
        """Return what is equal for tensors that are computed in the same way of the same variables, in any step."""
        if tensor.name not in self._keys:
            self._keys[tensor.name] = self._new_key(tensor)
        return self._keys[tensor.name]

    def _add(self, op: tf.Operation, taken: list[str], handles: set[str]) -> None:
        names = {output.name for output in op.outputs}
        read = frozenset(name for name in taken if name in handles)
        sources = read.union(*(self.sources.get(name, ()) for name in taken))
        self.names |= names
        self.sources |= dict.fromkeys(names, sources)
        if sources:
            self.of_weights |= names
        # A gather reads rows of a variable: another view would be a copy of the variable.
        if op.type in PLAIN and all(name in handles or name in self.plain for name in taken[:1]):
            self.plain |= names

    def _new_key(self, tensor: tf.Tensor) -> Hashable:
        captured = self._whole.captures.get(tensor.name)
        if captured is not None:
            return id(captured)
        op = tensor.op
        attributes = op.node_def.attr
        said = [(name, attributes[name].SerializeToString(deterministic=True)) for name in sorted(attributes)]
        settings = tuple(pair for pair in said if pair[0] not in _ASIDE)
        return op.type, tensor.value_index, settings, tuple(self.key(given) for given in op.inputs)
