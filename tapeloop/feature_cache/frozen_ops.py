"""What of a traced step is frozen: the same for an example whenever it comes."""

from __future__ import annotations

from collections.abc import Collection

import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.model.selection import Selection

# Whose outputs have as many rows as there are values of a kind: examples come apart from their rows, or may.
PICKING = frozenset({"Where", "DynamicPartition", "ListDiff"})
COUNTING = frozenset({"Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2"})
SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})  # which look at no value


class FrozenAnalysis:
    """The marks of one traced step's tensors and ops.

    Attributes:
        depends: The names of the tensors that are frozen and depend on the batch.
        heavy: The names of the ops that compute such a tensor with weights.
        sized: The shapes of tensors of which only the number of examples is not known, with the tensors.
        unsized: The names of the tensors whose first dimension is known not to be the examples.
        mixed: The names of the tensors that depend on what is frozen, but on several examples at once.
        drawn: The names of what is random and comes before frozen weights all the same.
        effects_before: The ops that run unasked and take nothing but what is frozen.
        effects_after: All others that run unasked.
    """

    def __init__(
        self,
        whole: TracedGraph,
        selection: Selection,
        *,
        random: bool,
        moving: Collection[int] = (),
        unsized: Collection[str] = frozenset(),
    ) -> None:
        """Mark a step.

        Args:
            whole: The step.
            selection: What trains.
            random: Whether what is random may be frozen, where weights that are frozen follow on it.
            moving: The identities of variables that another step moves.
            unsized: The names of tensors whose first dimension is known not to be the examples.
        """
        self._whole = whole
        self.unsized = frozenset(unsized)
        model = {id(variable.tf_variable): variable for variable in selection.tree.variables}
        trained = {id(variable.tf_variable) for variable in selection.trained}
        held = {name: model[id(v)] for name, v in whole.variables.items() if id(v) in model and id(v) not in trained}
        written = whole.written()
        self._fixed = {name for name in held if name not in written and id(whole.variables[name]) not in moving}
        seeds = {name for name, variable in held.items() if variable.seed}
        self.drawn: set[str] = seeds | {op.name for op in whole.ops if _draws(op)} if random else set()
        self._mark()
        while random and not self.drawn <= self._drawn_before_weights:
            self.drawn &= self._drawn_before_weights
            self._mark()
        effects = whole.effects
        self.effects_before = [op for op in effects if self._moves(op)]
        self.effects_after = [op for op in effects if op not in self.effects_before and not self.is_static(op)]

    def is_static(self, op: tf.Operation) -> bool:
        """Tell whether an op computes something frozen."""
        return op.name in self._static_ops

    def origins(self, op: tf.Operation) -> list[tf.Operation]:
        """Return the ops from which it comes that an op is not frozen."""
        found, seen, waiting = [], set(), [op]
        while waiting:
            here = waiting.pop()
            if here.name in seen:
                continue
            seen.add(here.name)
            behind = [given.op for given in here.inputs if given.name not in self._static]
            if not [one for one in behind if one.type != "Placeholder"]:
                found.append(here)
            waiting += [one for one in behind if one.type != "Placeholder"]
        return found

    def _mark(self) -> None:
        """Go through the ops in their order, and mark what they compute by what they take."""
        self._static: set[str] = set()
        self._static_ops: set[str] = set()
        self.depends: set[str] = set()
        self.heavy: set[str] = set()
        self.sized: dict[str, tf.Tensor] = {}
        self.mixed: set[str] = set()
        self._weighty: set[str] = set()
        self._shapes: set[str] = set()
        self._drawn_alone: set[str] = set()
        self._counted: set[str] = set()
        self._drawn_before_weights: set[str] = set()
        self._taints: dict[str, frozenset[str]] = {}
        batch = {given.name for given in self._whole.batch}
        for op in self._whole.ops:
            names = {output.name for output in op.outputs}
            if names & batch:
                self.depends |= names
                self._static |= names
                if names & self._whole.shapes:
                    self._shapes |= names
                else:
                    self._set_mixed_apart(op)
            elif names & self._whole.captures.keys():
                if self._is_fixed(next(iter(names))):
                    self._static |= names
                    self._weighty |= names
                    self._taints |= {name: frozenset({name} & self.drawn) for name in names}
            elif self._whole.is_pure(op) or op.name in self.drawn:
                self._mark_op(op, names, {given.name for given in op.inputs})

    def _mark_op(self, op: tf.Operation, names: set[str], taken: set[str]) -> None:
        if not taken <= self._static:
            self.mixed |= names if taken <= self._static | self.mixed else set()
            return
        self._static |= names
        self._static_ops.add(op.name)
        if op.type in COUNTING or taken & self._counted:
            self._counted |= names
        taint = frozenset({op.name} & self.drawn).union(*(self._taints.get(name, frozenset()) for name in taken))
        self._taints |= dict.fromkeys(names, taint)
        weights, of_batch = taken & self._weighty - self.drawn, taken & self.depends - self._drawn_alone
        if op.type == "Shape" and self._is_sized(op.inputs[0]):
            self.sized |= {output.name: op.inputs[0] for output in op.outputs}
        elif of_batch or taint:
            self.depends |= names
            self._drawn_alone |= set() if of_batch else names
            if weights:
                self.heavy.add(op.name)
                self._drawn_before_weights |= taint
            if of_batch and (op.type in SHAPES or of_batch <= self._shapes):
                self._shapes |= names
            elif of_batch:
                self._set_mixed_apart(op, all_of_it=op.type in PICKING)
        elif weights:
            self._weighty |= names

    def _set_mixed_apart(self, op: tf.Operation, *, all_of_it: bool = False) -> None:
        """Mark those of an op's outputs as mixed that have lost the dimension of the examples, whose number is open."""
        plain = [output for output in op.outputs if output.dtype not in (tf.variant, tf.resource)]
        mixed = {output.name for output in plain if all_of_it or output.shape.is_fully_defined()}
        self.mixed |= mixed
        self._static -= mixed
        self.depends -= mixed

    def _is_fixed(self, name: str) -> bool:
        """Tell whether a capture stays as it is: a variable of the model that nothing moves, or a constant."""
        if name in self._whole.variables:
            return name in self._fixed or name in self.drawn
        return self._whole.captures[name].dtype != tf.resource

    def _is_sized(self, tensor: tf.Tensor) -> bool:
        known = tensor.shape.rank and tensor.shape[0] is None and None not in tensor.shape.as_list()[1:]
        return bool(known) and tensor.name in self.depends - self._counted - self.unsized

    def _moves(self, op: tf.Operation) -> bool:
        """Tell whether an op that runs unasked belongs with what is frozen: a check of it, or what a draw leaves."""
        handles = [given.name for given in op.inputs if given.dtype == tf.resource]
        takes_frozen = all(given.name in self._static or given.name in self.mixed for given in op.inputs)
        return takes_frozen and (op.type == "Assert" or (bool(handles) and self.drawn.issuperset(handles)))


def _draws(op: tf.Operation) -> bool:
    return op.op_def.is_stateful and ("Random" in op.type or op.type in ("TruncatedNormal", "Multinomial"))
