"""The frontier: where in a traced step the computations end that are frozen and the same for an example each time."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend.traced_graph import Subgraph, TracedGraph
from tapeloop.data.batch import Features, examples_of, tensors_in
from tapeloop.feature_cache.batch_independence import IndependenceProbe
from tapeloop.feature_cache.digests import of_texts
from tapeloop.feature_cache.frozen_ops import FrozenAnalysis
from tapeloop.feature_cache.min_cut import smallest_cut
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of a frontier.

    Attributes:
        what: Where it stands in the model, or the name of an op.
        why: What is the matter with it.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"`{self.what}` {self.why}" if self.what else f"it {self.why}"


@dataclass(frozen=True, eq=False)
class Cut:
    """A traced step in two parts: what is computed of a batch once and for all, and the rest.

    Attributes:
        features: The tensors at which it is cut, with the examples first.
        bytes: How many bytes they have per example.
        before: Computes them from the tensors of a batch.
        after: Computes the outputs of the step from them, and from the sizes of a batch.
        whole: The step.
        submodels: The submodels that lie wholly before the cut, the outermost of nested ones.
        random: The names of the captures before the cut that are states of random seeds.
        sizes: The shapes that the rest takes, of tensors of which only the number of examples is open.
    """

    features: tuple[tf.Tensor, ...]
    bytes: int
    before: Subgraph
    after: Subgraph
    whole: TracedGraph
    submodels: tuple[SubmodelInfo, ...]
    random: frozenset[str]
    sizes: tuple[tf.Tensor, ...]

    @functools.cached_property
    def compute(self) -> Any:
        """The compiled function that computes features from the tensors of a batch."""
        return self.before.function()

    @functools.cached_property
    def compute_several(self) -> Any:
        """The compiled function of `(source, first, count)` that computes features of several batches of arrays.

        It returns them with the number of examples. Two batches are under way at once: beside its large ops each has
        many that leave most of a device idle.
        """

        # For 50 batches of a MobileNetV2, one call per batch took 1.2 of an epoch without a cache, this takes 0.73.
        def several(source: Any, first: tf.Tensor, count: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            kept = [tf.TensorArray(feature.dtype, count, infer_shape=False) for feature in self.features]

            def add(number: tf.Tensor, kept: list[tf.TensorArray], examples: tf.Tensor) -> Any:
                batch = source.read(first + tf.cast(number, tf.int64))
                rows = self.before(tensors_in(batch, apart=True))
                return number + 1, [one.write(number, r) for one, r in zip(kept, rows)], examples + examples_of(batch)

            _, kept, examples = tf.while_loop(lambda n, *_: n < count, add, (0, kept, 0), parallel_iterations=2)
            return [one.concat() for one in kept], examples

        return tf.function(several, autograph=False)

    @functools.cached_property
    def captured(self) -> list[Any]:
        """What is captured before the cut, but for seeds, which move while features are drawn."""
        names = [name for name in self.before.captures if name not in self.random]
        return [self.whole.variables.get(name, self.whole.captures[name]) for name in names]

    @property
    def weights(self) -> list[tf.Variable]:
        """The frozen variables before the cut."""
        return [one for one in self.captured if isinstance(one, tf.Variable)]

    @functools.cached_property
    def computation(self) -> str:
        """The digest of what is computed before the cut."""
        labels = {feed.name: f"input {number}" for number, feed in enumerate(self.whole.inputs)}
        labels |= {name: f"weight {number}" for number, name in enumerate(self.before.captures)}
        return of_texts([self.before.canonical_text(labels)])

    def rest_for(self, features: Any) -> Any:
        """Return the rest of the step as a function of features of this signature, to be called in a traced one."""
        # A partial, since TensorFlow counts traces by code and would warn that the cuts of all steps retrace.
        return tf.function(functools.partial(self.rest), autograph=False).get_concrete_function(features)

    def rest(self, features: Features) -> Any:
        """Run the rest of the step in a function that is being traced, and return what the step returns."""
        tensors = features.tensors
        sizes = (_size_like(size, tensors[0]) for size in self.sizes)
        return self.whole.structured(self.after([*tensors, *sizes]))


def find(
    whole: TracedGraph, selection: Selection, batch: Any, *, random: bool = False, moving: Collection[VariableInfo] = ()
) -> Cut | list[Obstacle]:
    """Find the frontier of a step, and there the cut with the fewest bytes per example.

    Ops that read frozen weights come before the cut. Ops that only follow on them may come after it, if that makes for
    fewer bytes: the mean over a map is kept rather than the map, and targets rather than one-hot vectors.

    Args:
        whole: The traced step.
        selection: What trains.
        batch: A batch of the data, on which is tried out that examples do not depend on each other.
        random: Whether random ops may come before the cut if frozen weights follow.
        moving: The variables that another step assigns to.

    Returns:
        The cut, or what stands in the way of one.
    """
    probe = IndependenceProbe(whole, batch)
    analysis = FrozenAnalysis(whole, selection, random=random, moving=moving)
    while True:
        region = _Region(whole, analysis)
        if not region.reads_weights:
            return list(_obstacles(whole, analysis))[:3]
        # The number of examples can be taken from the features only where it is the number of rows. Examples that
        # are folded into another dimension have an open first dimension as well.
        unlike = probe.without_rows(region.sized)
        if not unlike:
            break
        unlike |= analysis.not_by_example
        analysis = FrozenAnalysis(whole, selection, random=random, moving=moving, not_by_example=unlike)
    weights = probe.bytes(region.tensors, compares=not analysis.random)
    chosen = smallest_cut(weights, region.edges, region.sources, region.boundary)
    if chosen is None:  # each way from weights to the rest ends in a tensor that cannot be cut
        mixing = next((name for name in region.tensors if name in region.boundary and math.isinf(weights[name])), "")
        why = "has no row of its own for each example, or one that the other examples of a batch have a part in"
        return [Obstacle(mixing.rpartition(":")[0], why)]
    features, sizes = tuple(region.tensors[name] for name in region.tensors if name in chosen), tuple(region.sizes)
    before = whole.subgraph(features, whole.inputs, analysis.effects_before)
    after = whole.subgraph(whole.outputs, [*features, *sizes], analysis.effects_after)
    bytes_ = int(sum(weights[name] for name in chosen))
    read, behind = ({v for name, v in analysis.variables.items() if name in part.captures} for part in (before, after))
    submodels = tuple(_outermost(selection.tree, read, behind.union(selection.trained)))
    random_states = frozenset(analysis.random.intersection(before.captures))
    return Cut(features, bytes_, before, after, whole, submodels, random_states, sizes)


class _Region:
    """The frozen tensors that the rest of a step depends on, back to where the last frozen weights are read.

    Attributes:
        boundary: The names of the tensors that the rest takes.
        tensors: The tensors of the region by name, in the order of the graph.
        edges: From a tensor to one that is computed of it without weights.
        sources: The names of the tensors that the region begins with: computed with weights, or inputs.
        reads_weights: Whether any is computed with weights.
        sizes: The shapes that are needed beside them, of tensors of which only the number of examples is open.
        sized: These tensors.
    """

    def __init__(self, whole: TracedGraph, analysis: FrozenAnalysis) -> None:
        self._analysis = analysis
        self._sizes: dict[str, tf.Tensor] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: set[str] = set()
        taken = self._nearest_frozen([*whole.outputs, *(i for op in analysis.effects_after for i in op.inputs)])
        self.boundary = {tensor.name for tensor in taken}
        found: set[str] = set()
        while taken:
            tensor = taken.pop()
            if tensor.name in found:
                continue
            found.add(tensor.name)
            # Whatever comes before the last frozen weights is computed once anyway, so the cut need not be there.
            if tensor.op.name in analysis.reads_weights or not tensor.op.inputs:
                self.sources.add(tensor.name)
                continue
            behind = self._nearest_frozen(tensor.op.inputs)
            self.edges += [(one.name, tensor.name) for one in behind]
            taken += behind
        # In the order of the graph, so that the same step is cut at the same features in the same order.
        order = [output for op in whole.ops for output in op.outputs]
        self.tensors = {tensor.name: tensor for tensor in order if tensor.name in found}
        self.reads_weights = any(tensor.op.name in analysis.reads_weights for tensor in self.tensors.values())
        self.sizes = list(self._sizes.values())
        self.sized = [analysis.batch_shapes[name] for name in self._sizes]

    def _nearest_frozen(self, tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
        """Return the first tensors on each way back that are frozen and depend on the batch, and note its sizes."""
        waiting, seen, found = list(tensors), set[str](), []
        while waiting:
            tensor = waiting.pop()
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            if tensor.name in self._analysis.batch_shapes:
                self._sizes[tensor.name] = tensor
            elif tensor.name in self._analysis.by_example:
                found.append(tensor)
            else:
                waiting += tensor.op.inputs
        return found


def _size_like(size: tf.Tensor, feature: tf.Tensor) -> tf.Tensor:
    """Return the value of a shape op whose tensor has as many examples as a feature."""
    rest = tf.constant(size.op.inputs[0].shape[1:].as_list(), size.dtype)
    return tf.concat([tf.shape(feature, size.dtype)[:1], rest], 0)


def _outermost(tree: Tree, read: set[VariableInfo], elsewhere: set[VariableInfo]) -> list[SubmodelInfo]:
    """Return the outermost submodels that hold some variables and none of others."""
    found: list[SubmodelInfo] = []
    for submodel in tree.submodels:
        held = set(tree.variables_in[submodel])
        if held & read and not held & elsewhere and not any(map(submodel.is_inside, found)):
            found.append(submodel)
    return found


def _obstacles(whole: TracedGraph, analysis: FrozenAnalysis) -> Iterator[Obstacle]:
    """Give the obstacles that come first: not frozen, where they meet what depends on the batch alone."""
    found: dict[Obstacle, None] = {}
    touched = {given.name for given in whole.inputs}
    for op in whole.ops:
        taken = {given.name for given in op.inputs} & touched
        if not taken - analysis.batch_shapes.keys():
            continue
        # The first op that is not frozen though all that it takes of the batch is: the obstacle is what else it takes.
        if taken <= analysis.by_example and op.name not in analysis.frozen_ops and op.type != "Placeholder":
            found |= dict.fromkeys(_obstacle(whole, analysis.variables, origin) for origin in analysis.origins(op))
        touched |= {output.name for output in op.outputs}
    if found:
        yield from found
    elif analysis.mixes_examples:
        outputs = (output for op in whole.ops for output in op.outputs)
        mixing = next(output.op.name for output in outputs if output.name in analysis.mixes_examples)
        yield Obstacle(mixing, "makes one thing of the examples of a batch, and comes first")
    else:
        yield Obstacle("", "reads no frozen weights on the way to what trains")


def _obstacle(whole: TracedGraph, variables: dict[str, VariableInfo], origin: tf.Operation) -> Obstacle:
    handle = next((taken.name for taken in origin.inputs if taken.name in whole.variables), None)
    if handle is None:
        return Obstacle(origin.name, f"(`{origin.type}`) may give something else each time, and comes first")
    variable = variables.get(handle)
    if variable is None:
        unknown = "is no variable of the model, so that nobody knows when it changes"
        return Obstacle(whole.variables[handle].name, unknown)
    if variable.seed:
        return Obstacle(variable.submodels[-1].path, "is random and comes first")
    return Obstacle(variable.path, f"{'trains' if variable.trainable else 'changes in each step'} and comes first")
