"""The frontier: where, in a traced step, what is frozen and always the same for an example comes to its end."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop._backend.traced_graph import Subgraph, TracedGraph
from tapeloop.data.batch import Features, examples_of, spec_of
from tapeloop.feature_cache.batch_independence import IndependenceProbe, flat
from tapeloop.feature_cache.frozen_ops import FrozenAnalysis
from tapeloop.feature_cache.min_cut import smallest_cut
from tapeloop.feature_cache.obstacles import Obstacle, obstacles
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo


@dataclass(frozen=True, eq=False)
class Cut:
    """A traced step in two: what is computed of a batch once and for all, and the rest.

    Attributes:
        features: The tensors at which it is cut, with the examples first.
        bytes: How many bytes they have, an example.
        before: Computes them of the tensors of a batch.
        after: Computes the outputs of the step of them, and of the sizes of a batch.
        whole: The step.
        submodels: Those that lie wholly before the cut, of nested ones the outermost.
        drawn: The names of the captures before the cut that are the states of something random.
    """

    features: tuple[tf.Tensor, ...]
    bytes: int
    before: Subgraph
    after: Subgraph
    whole: TracedGraph
    submodels: tuple[SubmodelInfo, ...]
    drawn: frozenset[str]
    _sizes: tuple[tf.Tensor, ...]

    @property
    def function(self) -> Any:
        """The whole step, as it was traced."""
        return self.whole.function

    @functools.cached_property
    def compute(self) -> Any:
        """The compiled function that computes features of the tensors of a batch."""
        return self.before.function()

    @functools.cached_property
    def compute_several(self) -> Any:
        """What computes features of several batches of arrays, `(source, first, count)`, and says of how many examples.

        Two batches are under way at once: beside its large ops each has many that leave most of a device idle.
        """

        def several(source: Any, first: tf.Tensor, count: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            kept = [tf.TensorArray(feature.dtype, count, infer_shape=False) for feature in self.features]

            def add(number: tf.Tensor, kept: list[tf.TensorArray], examples: tf.Tensor) -> Any:
                batch = source.read(first + tf.cast(number, tf.int64))
                rows = self.before(flat(batch))
                return number + 1, [one.write(number, r) for one, r in zip(kept, rows)], examples + examples_of(batch)

            _, kept, examples = tf.while_loop(lambda n, *_: n < count, add, (0, kept, 0), parallel_iterations=2)
            return [one.concat() for one in kept], examples

        return tf.function(several, autograph=False)

    def checksum(self) -> tuple[int, ...]:
        """Return a number for each frozen variable before the cut, another one when one of its numbers is another."""
        names = [name for name in self.before.captures if name in self.whole.variables and name not in self.drawn]
        values = (np.ascontiguousarray(self.whole.variables[name].numpy()) for name in names)
        return tuple(zlib.crc32(value.reshape(-1).view(np.uint8).data) for value in values)

    def rest_for(self, features: Any) -> Any:
        """Return a function of features like these that runs the rest of the step, to be called in a traced one."""
        return tf.function(functools.partial(self.rest), autograph=False).get_concrete_function(spec_of(features))

    def rest(self, features: Features) -> Any:
        """Run the rest of the step, in a function that is being traced, and return what the step returns."""
        tensors = features.tensors
        computed = iter(self.after([*tensors, *(_size_like(size, tensors[0]) for size in self._sizes)]))
        structure = self.whole.function.structured_outputs
        flat = tf.nest.flatten(structure, expand_composites=True)
        values = [next(computed) if isinstance(value, tf.Tensor) else value for value in flat]
        return tf.nest.pack_sequence_as(structure, values, expand_composites=True)


def find(
    whole: TracedGraph, selection: Selection, batch: Any, *, random: bool = False, moving: Collection[int] = ()
) -> Cut | list[Obstacle]:
    """Find the frontier of a step, and there the cut with the fewest bytes an example.

    What reads a frozen weight comes before the cut. What does not, and follows on it, may come after, where that makes
    for fewer bytes. Each example is to come to the same whatever the others in its batch, which is tried out.

    Args:
        whole: The traced step.
        selection: What trains.
        batch: A batch of the data.
        random: Whether what is random may come before the cut, too, where something frozen follows on it.
        moving: The identities of variables that another step moves.

    Returns:
        The cut, or what stands in the way of one.
    """
    rows = IndependenceProbe(whole, batch)
    marks = FrozenAnalysis(whole, selection, random=random, moving=moving)
    while True:
        region = _Region(whole, marks)
        if not region.heavy:
            return obstacles(whole, selection, marks)
        unlike = rows.unlike(region.sized)
        if not unlike:
            break
        marks = FrozenAnalysis(whole, selection, random=random, moving=moving, unsized=marks.unsized | unlike)
    weights = rows.bytes(region.tensors, compares=not marks.drawn)
    chosen = smallest_cut(weights, region.edges, region.sources, region.boundary)
    if chosen is None:
        mixing = next((name for name in region.tensors if name in region.boundary and math.isinf(weights[name])), "")
        why = "has no row of its own for each example, or one that the other examples of a batch have a part in"
        return [Obstacle(mixing.rpartition(":")[0], why)]
    features = tuple(tensor for name, tensor in region.tensors.items() if name in chosen)
    before = whole.part(features, whole.batch, marks.effects_before)
    sizes = tuple(region.sizes.values())
    after = whole.part(whole.outputs, [*features, *sizes], marks.effects_after)
    total = int(sum(weights[name] for name in chosen))
    submodels, drawn = _submodels(selection, before, after), frozenset(marks.drawn.intersection(before.captures))
    return Cut(features, total, before, after, whole, submodels, drawn, sizes)


class _Region:
    """What is frozen and is needed by what is not, back to where the last frozen weights are read.

    Attributes:
        boundary: The names of the tensors that what is not frozen takes.
        tensors: The tensors of the region, in the order of the graph.
        edges: From a tensor to one that is computed of it without weights.
        sources: Those that the region begins with: computed with weights, or inputs.
        heavy: Those of the sources that are computed with weights.
        sizes: The shapes of tensors that are needed beside them, of which only the number of examples is not known.
        sized: The tensors that they are shapes of.
    """

    def __init__(self, whole: TracedGraph, marks: FrozenAnalysis) -> None:
        self._marks = marks
        self.boundary: set[str] = set()
        self.sizes: dict[str, tf.Tensor] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: set[str] = set()
        found: dict[str, tf.Tensor] = {}
        self._look_behind(whole, found)
        waiting = list(found.values())
        while waiting:
            tensor = waiting.pop()
            if tensor.op.name in marks.heavy or not tensor.op.inputs:
                self.sources.add(tensor.name)
                continue
            for given in tensor.op.inputs:
                if given.name not in marks.depends:
                    self._look_for_sizes(given)
                    continue
                self.edges.append((given.name, tensor.name))
                if given.name not in found:
                    found[given.name] = given
                    waiting.append(given)
        order = [output for op in whole.ops for output in op.outputs]
        self.tensors = {tensor.name: tensor for tensor in order if tensor.name in found}
        self.sized = [marks.sized[name] for name in self.sizes]
        self.heavy = [tensor for tensor in self.tensors.values() if tensor.op.name in marks.heavy]

    def _look_for_sizes(self, tensor: tf.Tensor) -> None:
        """Find the sizes of a batch of which a tensor is computed that depends on nothing else in it."""
        waiting, seen = [tensor], set()
        while waiting:
            here = waiting.pop()
            if here.name in self._marks.sized:
                self.sizes[here.name] = here
            elif here.name not in seen:
                seen.add(here.name)
                waiting += here.op.inputs

    def _look_behind(self, whole: TracedGraph, found: dict[str, tf.Tensor]) -> None:
        """Find what the outputs and effects of the step take of what is frozen."""
        marks, seen = self._marks, set()
        tensors, ops = list(whole.outputs), list(marks.effects_after)
        while tensors or ops:
            if ops:
                op = ops.pop()
                if op.name not in seen:
                    seen.add(op.name)
                    tensors += op.inputs
                    ops += [before for before in op.control_inputs if before in marks.effects_after]
                continue
            tensor = tensors.pop()
            if tensor.name in marks.sized:
                self.sizes[tensor.name] = tensor
            elif tensor.name in marks.depends:
                self.boundary.add(tensor.name)
                found[tensor.name] = tensor
            else:
                ops.append(tensor.op)


def _size_like(size: tf.Tensor, feature: tf.Tensor) -> tf.Tensor:
    """Return the value of a shape op whose tensor has as many examples as a feature."""
    rest = tf.constant(size.op.inputs[0].shape[1:].as_list(), size.dtype)
    return tf.concat([tf.shape(feature, size.dtype)[:1], rest], 0)


def _submodels(selection: Selection, before: Subgraph, after: Subgraph) -> tuple[SubmodelInfo, ...]:
    """Return the outermost submodels whose variables are read before the cut and not behind it."""
    read, kept = ({id(variable) for variable in part.variables} for part in (before, after))
    tree, found = selection.tree, list[SubmodelInfo]()
    for submodel in tree.submodels:
        held = {id(variable.tf_variable) for variable in tree.variables_in[submodel]}
        inside = any(other in tree.parents[submodel] or _within(tree, submodel, other) for other in found)
        trains = any(id(variable.tf_variable) in held for variable in selection.trained)
        if held & read and not held & kept and not trains and not inside:
            found.append(submodel)
    return tuple(found)


def _within(tree: Any, submodel: SubmodelInfo, other: SubmodelInfo) -> bool:
    return any(parent is other or _within(tree, parent, other) for parent in tree.parents[submodel])
