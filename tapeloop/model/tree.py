"""A model as an ordered tree of submodels and variables with paths.

A path says where something stands: `backbone/stage1/conv/kernel`. Its segments are the layers' names in functional and
sequential models, the attributes' names elsewhere (`blocks/0` in lists, without leading underscores). The root's own
name is left out. What is shared stands once in the tree and keeps all its paths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals

Model: TypeAlias = Any  # keras.Layer | tf.Module | Mapping[str, "Model"]: Keras ships no types to check against
Variable: TypeAlias = Any  # keras.Variable | tf.Variable


@dataclass(frozen=True, eq=False)
class SubmodelInfo:
    """A layer, model or module, and where it stands; equal to another that wraps the same object.

    Attributes:
        object: The layer, model or module itself; the mapping, for the root of several models.
        paths: Its paths, in the order found; `""` is the root.
    """

    object: Any = field(repr=False)
    paths: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return self.object is other.object if isinstance(other, SubmodelInfo) else NotImplemented

    def __hash__(self) -> int:
        return id(self.object)

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]


@dataclass(frozen=True, eq=False)
class VariableInfo:
    """A variable, and where it stands; equal to another that wraps the same object.

    Attributes:
        variable: The `keras.Variable` or `tf.Variable` itself.
        paths: Its paths, in the order found: several, where it is tied or its submodel is shared.
        submodels: The submodels that hold it, at any depth, the root first.
        trainable: Whether Keras (for a `tf.Variable`, TensorFlow) says that it can train.
        seed: Whether it is the state of a `keras.random.SeedGenerator`.
        tree: The model that it is a part of.
    """

    variable: Variable = field(repr=False)
    paths: tuple[str, ...]
    submodels: tuple[SubmodelInfo, ...] = field(repr=False)
    trainable: bool
    seed: bool = False
    tree: Tree = field(init=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return self.variable is other.variable if isinstance(other, VariableInfo) else NotImplemented

    def __hash__(self) -> int:
        return id(self.variable)

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    @property
    def name(self) -> str:
        """The last segment of its path: `kernel`."""
        return self.path.rpartition("/")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.variable.shape)

    @property
    def dtype(self) -> str:
        """The name of its dtype."""
        return tf.as_dtype(self.variable.dtype).name

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(tf.TensorShape(self.shape).num_elements())

    @property
    def is_overwritten(self) -> bool:
        """Whether its "gradient" is its next value, as for the scales of Keras' float8."""
        return bool(getattr(self.variable, "overwrite_with_gradient", False))

    @property
    def is_penalized(self) -> bool:
        """Whether the model puts a weight penalty on it."""
        return getattr(self.variable, "regularizer", None) is not None

    @property
    def tf_variable(self) -> tf.Variable:
        """The `tf.Variable` that holds the value: what a tape watches."""
        return raw(self.variable)


@dataclass(frozen=True, eq=False)
class Tree:
    """Every submodel and variable of a model, each once, in the order in which they are reached.

    Attributes:
        submodels: The root first, parents before children.
        variables: All variables, seed states and batch statistics included; metrics and optimizers are not part.
    """

    submodels: tuple[SubmodelInfo, ...]
    variables: tuple[VariableInfo, ...]

    @classmethod
    def of(cls, model: Model) -> Tree:
        """Read the tree off a model as it is now.

        Args:
            model: A Keras layer or model, a `tf.Module`, or a mapping from names to such.

        Raises:
            TypeError: `model` is none of these.
        """
        if not _is_submodel(model) and not isinstance(model, Mapping):
            raise TypeError(
                "`model` must be a Keras model or layer, a `tf.Module`, or a mapping from names to such. "
                f"Received: {model!r} of type {type(model).__name__}."
            )
        for name, inner in model.items() if isinstance(model, Mapping) else ():
            if not isinstance(name, str) or not name or "/" in name or not _is_submodel(inner):
                raise TypeError(
                    "A mapping of several models must go from names without slashes to Keras models, layers or "
                    f"`tf.Module`s. Received: {name!r}: {inner!r}."
                )
        walk = _Walk()
        walk.enter(model, "", ())
        return walk.tree()

    @functools.cached_property
    def held(self) -> Mapping[SubmodelInfo, tuple[VariableInfo, ...]]:
        """The variables under each submodel, at any depth."""
        held: dict[SubmodelInfo, list[VariableInfo]] = {submodel: [] for submodel in self.submodels}
        for variable in self.variables:
            for submodel in variable.submodels:
                held[submodel].append(variable)
        return {submodel: tuple(variables) for submodel, variables in held.items()}

    @functools.cached_property
    def places(self) -> Mapping[VariableInfo, tuple[frozenset[SubmodelInfo], ...]]:
        """For each variable and each of its paths, the submodels that enclose it along that path."""
        at = {path: submodel for submodel in self.submodels for path in submodel.paths}
        return {v: tuple(frozenset(_enclosing(path, at)) for path in v.paths) for v in self.variables}

    @functools.cached_property
    def parents(self) -> Mapping[SubmodelInfo, tuple[SubmodelInfo, ...]]:
        """The submodels directly around each submodel: several, where it is shared."""
        at = {path: submodel for submodel in self.submodels for path in submodel.paths}
        return {
            submodel: tuple(dict.fromkeys(at[_above(path, at)] for path in submodel.paths if path))
            for submodel in self.submodels
        }

    @functools.cached_property
    def children(self) -> Mapping[SubmodelInfo, tuple[SubmodelInfo, ...]]:
        """The submodels directly in each submodel."""
        children: dict[SubmodelInfo, list[SubmodelInfo]] = {submodel: [] for submodel in self.submodels}
        for submodel, parents in self.parents.items():
            for parent in parents:
                children[parent].append(submodel)
        return {submodel: tuple(inside) for submodel, inside in children.items()}

    @functools.cached_property
    def layers(self) -> tuple[SubmodelInfo, ...]:
        """The submodels that are Keras layers."""
        return tuple(submodel for submodel in self.submodels if isinstance(submodel.object, keras.Layer))


def raw(variable: Variable) -> tf.Variable:
    """Return the `tf.Variable` under a Keras variable, or the variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _above(path: str, at: Mapping[str, SubmodelInfo]) -> str:
    """Return the nearest path above that is a submodel's: `blocks/0` stands in the root, `blocks` being a list."""
    while path:
        path = path.rpartition("/")[0]
        if path in at:
            return path
    return ""


def _enclosing(path: str, at: Mapping[str, SubmodelInfo]) -> Iterator[SubmodelInfo]:
    """Yield the submodels above a path, the innermost first."""
    while path:
        path = path.rpartition("/")[0]
        if path in at:
            yield at[path]


def _is_submodel(value: object) -> bool:
    return isinstance(value, (keras.Layer, tf.Module))


def _is_plain_module(value: object) -> bool:
    return isinstance(value, tf.Module) and not isinstance(value, keras.Layer)


def _is_variable(value: object) -> bool:
    return isinstance(value, (keras.Variable, tf.Variable))


class _Walk:
    """Visits a model by every path there is, and gathers the paths of what it meets."""

    def __init__(self) -> None:
        self.paths: dict[int, list[str]] = {}
        self.found: dict[int, Any] = {}
        self.above: dict[int, dict[int, None]] = {}
        self.trainable: set[int] = set()
        self.seeds: set[int] = set()

    def enter(self, found: Any, path: str, stack: tuple[int, ...]) -> None:
        """Record `found` at `path`, reached through the objects of `stack`, and go on to what it holds."""
        if isinstance(found, keras.random.SeedGenerator):
            found, path = found.state, f"{path}/state"
            self.seeds.add(id(found))
        key = id(found)
        if key in stack:  # a child that refers back to its parent
            return
        paths = self.paths.setdefault(key, [])
        if path not in paths:
            paths.append(path)
        self.found[key] = found
        self.above.setdefault(key, {}).update(dict.fromkeys(stack))
        if _is_variable(found):
            if not isinstance(found, keras.Variable) and found.trainable and not self._is_flagged_off(stack):
                self.trainable.add(key)
            return
        if isinstance(found, keras.Layer) and not any(isinstance(self.found[k], keras.Layer) for k in stack):
            # The flags of nested layers count together: Keras' own list of what trains settles them.
            self.trainable.update(id(variable) for variable in found.trainable_variables)
        for segment, child in _children(found):
            self.enter(child, f"{path}/{segment}".lstrip("/"), (*stack, key))

    def _is_flagged_off(self, stack: tuple[int, ...]) -> bool:
        """Tell whether a layer around holds what is in it non-trainable, as Keras' flag does for its own variables."""
        around = [self.found[key] for key in stack]
        return any(isinstance(one, keras.Layer) and not one.trainable for one in around)

    def tree(self) -> Tree:
        apart = [(key, found) for key, found in self.found.items() if not _is_variable(found)]
        submodels = {key: SubmodelInfo(found, tuple(self.paths[key])) for key, found in apart}
        variables = tuple(
            VariableInfo(
                found,
                tuple(self.paths[key]),
                tuple(submodel for above, submodel in submodels.items() if above in self.above[key]),
                key in self.trainable,
                key in self.seeds,
            )
            for key, found in self.found.items()
            if _is_variable(found)
        )
        tree = Tree(tuple(submodels.values()), variables)
        for variable in variables:
            object.__setattr__(variable, "tree", tree)
        return tree


def _children(parent: Any) -> Iterator[tuple[str, Any]]:
    """Yield the submodels and variables directly in `parent`, each with its segment."""
    if isinstance(parent, keras.Layer):
        named = _layer_children(parent)
    elif isinstance(parent, Mapping):
        named = ((str(name), model) for name, model in parent.items())
    else:
        named = _attributes(parent)
    taken: dict[str, int] = {}
    for segment, child in named:
        unique, copies = segment, 1
        while taken.setdefault(unique, id(child)) != id(child):  # `_dense` beside `dense`
            copies += 1
            unique = f"{segment}_{copies}"
        yield unique, child


def _layer_children(layer: keras.Layer) -> Iterator[tuple[str, Any]]:
    """Yield what Keras tracks in `layer`, and other state: by name in a graph of layers, else by attribute."""
    sublayers = [child for child in keras_internals.sublayers(layer) if not isinstance(child, keras.layers.InputLayer)]
    tracked = {id(child) for child in (*sublayers, *layer.variables)}
    graph = layer.layers if isinstance(layer, keras.Sequential) else getattr(layer, "operations", ())
    graph_ids = {id(child) for child in graph if id(child) in tracked}
    yield from ((child.name, child) for child in graph if id(child) in graph_ids)
    yielded = set(graph_ids)
    for segment, child in _attributes(layer):
        state = child.state if isinstance(child, keras.random.SeedGenerator) else child
        # Of a recurrent layer, say, or a module: Keras tracks neither the state nor the module.
        is_untracked = not child.trainable if _is_variable(child) else _is_plain_module(child)
        if id(child) not in graph_ids and (id(state) in tracked or is_untracked):
            yielded.add(id(state))
            yield segment, child
    for child in sublayers:  # tracked through an attribute that is gone
        if id(child) not in yielded:
            yield child.name, child
    yielded |= {id(variable) for child in sublayers for variable in child.variables}
    for variable in layer.variables:
        if id(variable) not in yielded:  # made by `add_weight` and kept in no attribute
            yield variable.name, variable


def _attributes(parent: keras.Layer | tf.Module) -> Iterator[tuple[str, Any]]:
    """Yield the submodels and variables among the attributes of `parent`, but for the bookkeeping of TF and Keras."""
    for segment, value in vars(parent).items():
        if not segment.startswith("_self_") and not (isinstance(parent, keras.Layer) and segment in _bookkeeping()):
            yield from _flatten(segment.lstrip("_"), value)


def _flatten(segment: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the submodels and variables in an attribute, through lists, tuples and mappings."""
    if _is_submodel(value) or _is_variable(value) or isinstance(value, keras.random.SeedGenerator):
        yield segment, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{segment}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flatten(f"{segment}/{index}", item)


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """The attributes that every Keras layer and model has for its own use."""
    return frozenset(vars(keras.Model()))
