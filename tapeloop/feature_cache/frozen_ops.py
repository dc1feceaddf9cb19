"""Which tensors of a traced step are frozen: the same for an example whenever it comes."""

from __future__ import annotations

from collections.abc import Collection

import tensorflow as tf

from tapeloop._backend.traced_graph import TracedGraph
from tapeloop._search import search
from tapeloop.feature_cache.op_types import COUNTING, DRAWING, PICKING, SHAPES
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Tree, VariableInfo


def model_variables(whole: TracedGraph, tree: Tree) -> dict[str, VariableInfo]:
    """Return the captures of a traced step that are variables of the model, by name."""
    infos = {variable.tf_variable.ref(): variable for variable in tree.variables}
    return {name: infos[v.ref()] for name, v in whole.variables.items() if v.ref() in infos}


class FrozenAnalysis:
    """What is frozen in one traced step. Tensors and ops stand in it by name.

    Attributes:
        variables: The captures of the step that are variables of the model.
        frozen_ops: The ops that compute something frozen.
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
        self.variables = model_variables(whole, selection.tree)
        moves = {*selection.trained, *moving}
        still = {name: variable for name, variable in self.variables.items() if variable not in moves}
        # Batch statistics and counters do not train, but the step itself may assign to them.
        self._constant = still.keys() - whole.written()
        self.random: set[str] = set()
        if random:
            draws = [op for op in whole.ops if "Random" in op.type or op.type in DRAWING]
            self.random |= {op.name for op in draws if op.op_def.is_stateful}
            self.random |= {name for name, variable in still.items() if variable.seed}
        self._analyze()
        # A random op that no frozen weights follow, such as dropout in the head, must draw anew in each step. What
        # follows on it is then not frozen any more, so others may have to go as well.
        while not self.random <= self._random_before_weights:
            self.random &= self._random_before_weights
            self._analyze()
        # Each effect belongs to one side of a cut. Frozen ones that change nothing, such as reads, may be left out.
        self.effects_before = [op for op in whole.effects if self._belongs_before(op)]
        apart = {op.name for op in self.effects_before} | self.frozen_ops
        self.effects_after = [op for op in whole.effects if op.name not in apart]

    def origins(self, op: tf.Operation) -> list[tf.Operation]:
        """Return the first ops on the way to an op that are not frozen."""

        def behind(here: tf.Operation) -> list[tf.Operation]:
            before = [taken.op for taken in here.inputs if taken.name not in self._frozen]
            return [one for one in before if one.type != "Placeholder"]

        return [here for here in search([op], behind) if not behind(here)]

    def _analyze(self) -> None:
        """Go through the ops in order, and tell from its inputs what each computes."""
        self._frozen: set[str] = set()
        self.frozen_ops: set[str] = set()
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
                # The dense shape of a sparse tensor is a fully defined vector, but no mixture of examples.
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
            # What follows on a mixture of frozen examples is told apart, to name the mixture as the obstacle.
            self.mixes_examples |= names if taken <= self._frozen | self.mixes_examples else set()
            return
        self._frozen |= names
        self.frozen_ops.add(op.name)
        if op.type in COUNTING or taken & self._counted:
            self._counted |= names
        draws = (self.random & {op.name}).union(*(self._draws_behind.get(name, ()) for name in taken))
        self._draws_behind |= dict.fromkeys(names, frozenset(draws))
        weights, of_batch = taken & self._of_weights - self.random, taken & self.by_example - self._random_alone
        # A shape in which only the number of examples is open can be made anew from the features: it needs no cut.
        if op.type == "Shape" and self._has_a_row_for_each_example(op.inputs[0]):
            self.batch_shapes |= {output.name: op.inputs[0] for output in op.outputs}
        elif of_batch or draws:
            self.by_example |= names
            self._random_alone |= set() if of_batch else names
            if weights:
                self.reads_weights.add(op.name)
                self._random_before_weights |= draws
            # Numbers that are computed from shapes alone are the same for all examples, and mix none.
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
        # A check of the batch as a whole, such as the range of its labels, runs while the batch is there.
        takes_frozen = {taken.name for taken in op.inputs} <= self._frozen | self.mixes_examples
        return takes_frozen and (op.type == "Assert" or (bool(handles) and self.random.issuperset(handles)))
