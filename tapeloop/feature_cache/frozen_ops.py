"""Which tensors of a traced step are frozen: the same for an example whenever it comes.

The lists below, with `READING` and `PYTHON` of `traced_graph`, are all the op types that the cache knows by name. A
stateful op that is in no list is never frozen, and the `CacheError` names its type. For stateless ops TensorFlow says
what they compute; whether they keep the examples of a batch apart is tried out by `IndependenceProbe`.
"""

from __future__ import annotations

from collections.abc import Collection

import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Tree, VariableInfo

# Ops whose outputs have as many rows as there are values of some kind, so that a row is no longer an example's.
PICKING = frozenset({"Where", "DynamicPartition", "ListDiff"})
# The same, but a later gather may bring the examples back: an embedding looks up each token that occurs once.
COUNTING = frozenset({"Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2"})
# Ops that look at the shape of a tensor and at no value.
SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})
# Stateful ops that draw random numbers, beside those with "Random" in their type.
DRAWING = frozenset({"TruncatedNormal", "Multinomial"})


def model_variables(whole: TracedGraph, tree: Tree) -> dict[str, VariableInfo]:
    """Return the captures of a traced step that are variables of the model, by name."""
    infos = {variable.tf_variable.ref(): variable for variable in tree.variables}
    return {name: infos[v.ref()] for name, v in whole.variables.items() if v.ref() in infos}


class FrozenAnalysis:
    """What is frozen in one traced step. All attributes but the last two hold names.

    Attributes:
        by_example: The tensors that are frozen and depend on the batch.
        reads_weights: The ops that compute such a tensor with weights.
        batch_shapes: The shapes of tensors of which only the number of examples is open, with these tensors.
        not_by_example: The tensors whose first dimension is known not to be the examples.
        mixes_examples: The tensors that are computed of frozen ones, but of several examples at once.
        random: The random ops and seeds that come before frozen weights and are taken for frozen all the same.
        effects_before: The effects of the step that take nothing but frozen tensors.
        effects_after: All other effects.
    """

    def __init__(
        self,
        whole: TracedGraph,
        selection: Selection,
        *,
        random: bool,
        moving: Collection[VariableInfo] = (),
        not_by_example: Collection[str] = (),
    ) -> None:
        """Analyze a step.

        Args:
            whole: The step.
            selection: What trains.
            random: Whether random ops may count as frozen if frozen weights follow.
            moving: The variables that another step assigns to.
            not_by_example: The names of tensors whose first dimension is known not to be the examples.
        """
        self._whole = whole
        self.not_by_example = frozenset(not_by_example)
        moves = {*selection.trained, *moving}
        still = {name: v for name, v in model_variables(whole, selection.tree).items() if v not in moves}
        self._constant = still.keys() - whole.written()
        seeds = {name for name, variable in still.items() if variable.seed}
        self.random: set[str] = seeds | {op.name for op in whole.ops if _draws(op)} if random else set()
        self._analyze()
        while not self.random <= self._random_before_weights:  # dropping one may leave weights behind another unread
            self.random &= self._random_before_weights
            self._analyze()
        self.effects_before = [op for op in whole.effects if self._belongs_before(op)]
        apart = {op.name for op in self.effects_before} | self._frozen_ops
        self.effects_after = [op for op in whole.effects if op.name not in apart]

    def is_frozen(self, op: tf.Operation) -> bool:
        """Tell whether an op computes something frozen."""
        return op.name in self._frozen_ops

    def origins(self, op: tf.Operation) -> list[tf.Operation]:
        """Return the first ops on the way to an op that are not frozen."""
        found, seen, waiting = [], set[str](), [op]
        while waiting:
            here = waiting.pop()
            if here.name not in seen:
                seen.add(here.name)
                before = [taken.op for taken in here.inputs if taken.name not in self._frozen]
                before = [one for one in before if one.type != "Placeholder"]
                found += [] if before else [here]
                waiting += before
        return found

    def _analyze(self) -> None:
        """Go through the ops in order, and tell from its inputs what each computes."""
        self._frozen: set[str] = set()
        self._frozen_ops: set[str] = set()
        self.by_example: set[str] = set()
        self.reads_weights: set[str] = set()
        self.batch_shapes: dict[str, tf.Tensor] = {}
        self.mixes_examples: set[str] = set()
        self._of_weights: set[str] = set()  # of weights, and not of the batch
        self._shape_values: set[str] = set()
        self._counted: set[str] = set()
        self._random_alone: set[str] = set()  # of random ops, and not of the batch
        self._random_before_weights: set[str] = set()
        self._draws_behind: dict[str, frozenset[str]] = {}
        inputs = {given.name for given in self._whole.inputs}
        for op in self._whole.ops:
            names = {output.name for output in op.outputs}
            if names & inputs:
                self.by_example |= names
                self._frozen |= names
                if names & self._whole.sparse_shapes:
                    self._shape_values |= names
                else:
                    self._set_mixed_apart(op)
            elif names & self._whole.captures.keys():
                if self._is_constant(*names):
                    self._frozen |= names
                    self._of_weights |= names
                    self._draws_behind |= dict.fromkeys(names, self.random & names)
            elif self._whole.is_pure(op) or op.name in self.random:
                self._analyze_op(op, names, {taken.name for taken in op.inputs})

    def _analyze_op(self, op: tf.Operation, names: set[str], taken: set[str]) -> None:
        if not taken <= self._frozen:
            self.mixes_examples |= names if taken <= self._frozen | self.mixes_examples else set()
            return
        self._frozen |= names
        self._frozen_ops.add(op.name)
        if op.type in COUNTING or taken & self._counted:
            self._counted |= names
        draws = (self.random & {op.name}).union(*(self._draws_behind.get(name, ()) for name in taken))
        self._draws_behind |= dict.fromkeys(names, frozenset(draws))
        weights, of_batch = taken & self._of_weights - self.random, taken & self.by_example - self._random_alone
        if op.type == "Shape" and self._has_a_row_for_each_example(op.inputs[0]):
            self.batch_shapes |= {output.name: op.inputs[0] for output in op.outputs}
        elif of_batch or draws:
            self.by_example |= names
            self._random_alone |= set() if of_batch else names
            if weights:
                self.reads_weights.add(op.name)
                self._random_before_weights |= draws
            if of_batch and (op.type in SHAPES or of_batch <= self._shape_values):
                self._shape_values |= names
            elif of_batch:
                self._set_mixed_apart(op)
        elif weights:
            self._of_weights |= names

    def _set_mixed_apart(self, op: tf.Operation) -> None:
        """Note which outputs of an op have no row for each example.

        The step is traced with the number of examples left open: a tensor that depends on values of the batch and has
        no open dimension any more was made of several examples.
        """
        plain = [output for output in op.outputs if output.dtype not in (tf.variant, tf.resource)]
        mixed = {output.name for output in plain if op.type in PICKING or output.shape.is_fully_defined()}
        self.mixes_examples |= mixed
        self._frozen -= mixed
        self.by_example -= mixed

    def _is_constant(self, name: str) -> bool:
        """Tell whether a capture keeps its value: a variable of the model that nothing moves, or a constant."""
        if name in self._whole.variables:  # of another variable nobody knows when it changes
            return name in self._constant or name in self.random
        return self._whole.captures[name].dtype != tf.resource

    def _has_a_row_for_each_example(self, tensor: tf.Tensor) -> bool:
        known = tensor.shape.rank and tensor.shape[0] is None and None not in tensor.shape.as_list()[1:]
        return bool(known) and tensor.name in self.by_example - self._counted - self.not_by_example

    def _belongs_before(self, op: tf.Operation) -> bool:
        """Tell whether an effect belongs with what is frozen: a check of it, or the next state of a random seed."""
        handles = [taken.name for taken in op.inputs if taken.dtype == tf.resource]
        takes_frozen = {taken.name for taken in op.inputs} <= self._frozen | self.mixes_examples
        return takes_frozen and (op.type == "Assert" or (bool(handles) and self.random.issuperset(handles)))


def _draws(op: tf.Operation) -> bool:
    return op.op_def.is_stateful and ("Random" in op.type or op.type in DRAWING)
