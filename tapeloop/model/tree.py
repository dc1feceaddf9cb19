"""A model as an ordered tree of submodels and variables with paths.

A path says where something stands: `backbone/stage1/conv/kernel`. Its segments are the layers' names in functional and
sequential models, the attributes' names elsewhere (`blocks/0` in lists, without leading underscores). The root's own
name is left out. What is shared stands once in the tree and keeps all its paths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals

Model: TypeAlias = Any  # what `AnyModel` is; Keras ships no types for what is done with it
Variable: TypeAlias = Any  # keras.Variable | tf.Variable


class HasVariables(Protocol):
    """A Keras layer or model, or a `tf.Module`, as far as a type checker can tell."""

    @property
    def variables(self) -> Sequence[Any]:
        """Its variables."""


AnyModel: TypeAlias = "HasVariables | Mapping[str, AnyModel]"  # as users pass it


@dataclass(frozen=True, eq=False)
class SubmodelInfo:
    """A layer, model or module, and where it stands; equal to another that wraps the same object.

    Attributes:
        object: The layer, model or module itself; the mapping, for the root of several models.
        paths: Its paths, in the order found; `""` is the root.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> [submodel.path for submodel in tl.Trainer(model).selection.tree.submodels]
        ['', 'head']
    """

    object: Any = field(repr=False)
    paths: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        # By identity: a mapping of models has no hash, and two layers that are set up alike are two layers.
        return self.object is other.object if isinstance(other, SubmodelInfo) else NotImplemented

    def __hash__(self) -> int:
        return id(self.object)

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    def is_inside(self, other: SubmodelInfo) -> bool:
        """Tell whether it stands in another submodel, which is not the root, at any of its paths.

        Args:
            other: The other submodel.

        Example:
            >>> base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")], name="base")
            >>> _, outer, inner = tl.Trainer(keras.Sequential([base])).selection.tree.submodels
            >>> inner.is_inside(outer), outer.is_inside(inner)
            (True, False)
        """
        return any(path.startswith(f"{above}/") for path in self.paths for above in other.paths)


@dataclass(frozen=True, eq=False)
class VariableInfo:
    """A variable, and where it stands; equal to another that wraps the same object.

    Attributes:
        variable: The `keras.Variable` or `tf.Variable` itself.
        paths: Its paths, in the order found: several, if it is tied or its submodel is shared.
        submodels: The submodels that hold it, at any depth, the root first.
        trainable: Whether Keras (for a `tf.Variable`, TensorFlow) says that it can train.
        seed: Whether it is the state of a `keras.random.SeedGenerator`.
        tree: The model that it is a part of.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> kernel = tl.Trainer(model).selection.trained[0]
        >>> kernel.path, kernel.name, kernel.shape, kernel.dtype, kernel.size
        ('head/kernel', 'kernel', (4, 2), 'float32', 8)
        >>> kernel.bytes, kernel.is_adapted, kernel.is_penalized, kernel.tf_variable.shape
        (32, False, False, TensorShape([4, 2]))
    """

    variable: Variable = field(repr=False)
    paths: tuple[str, ...] = ()
    submodels: tuple[SubmodelInfo, ...] = field(default=(), repr=False)
    trainable: bool = False
    seed: bool = False
    tree: Tree = field(init=False, repr=False)

    def __eq__(self, other: object) -> bool:
        # By identity: Keras and TensorFlow compare variables by value, element by element.
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
        return math.prod(self.shape)

    @property
    def is_adapted(self) -> bool:
        """Whether Keras' `enable_lora` holds it non-trainable: the weight to which its layer adds what trains."""
        owner = self.submodels[-1].object
        return not self.trainable and not self.seed and bool(getattr(owner, "lora_enabled", False))

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.size * tf.as_dtype(self.variable.dtype).size

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
        """The `tf.Variable` that holds the value, which a tape watches."""
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
            # The name becomes the first segment of paths, which a glob takes apart at slashes.
            if not isinstance(name, str) or not name or "/" in name or not _is_submodel(inner):
                raise TypeError(
                    "A mapping of several models must go from names without slashes to Keras models, layers or "
                    f"`tf.Module`s. Received: {name!r}: {inner!r}."
                )
        walk = _Walk()
        walk.enter(model, "", ())
        return walk.tree()

    @functools.cached_property
    def variables_in(self) -> Mapping[SubmodelInfo, tuple[VariableInfo, ...]]:
        """The variables in each submodel, at any depth."""
        return _grouped(self.submodels, ((submodel, v) for v in self.variables for submodel in v.submodels))

    @functools.cached_property
    def parents(self) -> Mapping[SubmodelInfo, tuple[SubmodelInfo, ...]]:
        """The submodels directly around each submodel: several, if it is shared."""
        return {s: tuple(dict.fromkeys(next(self.above(path)) for path in s.paths if path)) for s in self.submodels}

    @functools.cached_property
    def children(self) -> Mapping[SubmodelInfo, tuple[SubmodelInfo, ...]]:
        """The submodels directly in each submodel."""
        return _grouped(self.submodels, ((parent, s) for s, parents in self.parents.items() for parent in parents))

    @functools.cached_property
    def layers(self) -> tuple[SubmodelInfo, ...]:
        """The submodels that are Keras layers."""
        return tuple(submodel for submodel in self.submodels if isinstance(submodel.object, keras.Layer))

    @functools.cached_property
    def by_path(self) -> Mapping[str, SubmodelInfo]:
        """The submodel at each path."""
        return {path: submodel for submodel in self.submodels for path in submodel.paths}

    def above(self, path: str) -> Iterator[SubmodelInfo]:
        """Yield the submodels above a path, the innermost first. `blocks/0` is in the root if `blocks` is a list."""
        while path:
            path = path.rpartition("/")[0]
            # A list or a dict in between has a segment, and is no submodel.
            if path in self.by_path:
                yield self.by_path[path]


def _grouped(keys: Iterable[Any], pairs: Iterable[tuple[Any, Any]]) -> dict[Any, tuple[Any, ...]]:
    """Return the second members of pairs by their first, for all keys."""
    groups: dict[Any, list[Any]] = {key: [] for key in keys}
    for key, value in pairs:
        groups[key].append(value)
    return {key: tuple(values) for key, values in groups.items()}


def raw(variable: Variable) -> tf.Variable:
    """Return the `tf.Variable` under a Keras variable, or the variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _is_submodel(value: object) -> bool:
    return isinstance(value, (keras.Layer, tf.Module))


def _is_variable(value: object) -> bool:
    return isinstance(value, (keras.Variable, tf.Variable))


def _info(found: Any) -> SubmodelInfo | VariableInfo:
    """Return an info without paths. It stands for the object in sets: Keras' variables themselves have no hash."""
    return VariableInfo(found) if _is_variable(found) else SubmodelInfo(found)


class _Walk:
    """Visits a model by every path there is, and gathers the paths of its submodels and variables."""

    def __init__(self) -> None:
        self.paths: dict[SubmodelInfo | VariableInfo, list[str]] = {}
        self.trainable: set[VariableInfo] = set()
        self.seeds: set[VariableInfo] = set()

    def enter(self, found: Any, path: str, stack: tuple[SubmodelInfo, ...]) -> None:
        """Record a submodel or variable at a path, reached through the submodels of `stack`, and enter its children."""
        if isinstance(found, keras.random.SeedGenerator):
            found, path = found.state, f"{path}/state"
            self.seeds.add(VariableInfo(found))
        info = _info(found)
        if info in stack:  # a child that refers back to its parent
            return
        # Every path is followed, also of what is known already: a shared layer shows all the places where it stands.
        paths = self.paths.setdefault(info, [])
        if path not in paths:
            paths.append(path)
        layers = [submodel.object for submodel in stack if isinstance(submodel.object, keras.Layer)]
        if isinstance(info, VariableInfo):
            # Keras' flag on a layer holds for a raw variable in it as for the layer's own.
            if isinstance(found, tf.Variable) and found.trainable and all(layer.trainable for layer in layers):
                self.trainable.add(info)
            return
        if isinstance(found, keras.Layer) and not layers:
            # The flags of nested layers count together: Keras' own list of what trains settles them.
            self.trainable.update(map(VariableInfo, found.trainable_variables))
        for segment, child in _children(found):
            self.enter(child, f"{path}/{segment}".lstrip("/"), (*stack, info))

    def tree(self) -> Tree:
        """Return the tree, and complete its infos, which nobody has seen before."""
        for info, paths in self.paths.items():
            vars(info).update(paths=tuple(paths))
        submodels = tuple(info for info in self.paths if isinstance(info, SubmodelInfo))
        variables = tuple(info for info in self.paths if isinstance(info, VariableInfo))
        tree, order = Tree(submodels, variables), {submodel: number for number, submodel in enumerate(submodels)}
        for v in variables:
            above = sorted({submodel for path in v.paths for submodel in tree.above(path)}, key=order.__getitem__)
            vars(v).update(submodels=tuple(above), trainable=v in self.trainable, seed=v in self.seeds, tree=tree)
        return tree


def _children(parent: Any) -> Iterator[tuple[str, Any]]:
    """Yield the submodels and variables directly in `parent`, each with its segment."""
    if isinstance(parent, keras.Layer):
        named = _layer_children(parent)
    elif isinstance(parent, Mapping):
        named = ((str(name), model) for name, model in parent.items())
    else:
        named = _attributes(parent)
    taken: dict[str, Any] = {}
    for segment, child in named:
        unique, copies = segment, 1
        # Leading underscores are dropped from attributes, so that `Dense._kernel` is `kernel`; two may then collide.
        while taken.setdefault(unique, child) is not child:
            copies += 1
            unique = f"{segment}_{copies}"
        yield unique, child


def _layer_children(layer: keras.Layer) -> Iterator[tuple[str, Any]]:
    """Yield the children that Keras tracks, by name in a graph of layers and else by attribute, and untracked state."""
    sublayers = [child for child in keras_internals.sublayers(layer) if not isinstance(child, keras.layers.InputLayer)]
    # By `id`, and not by infos: a MobileNetV2 would need thousands of them, more than half of the walk. What the layer
    # holds keeps its `id` as long as this takes.
    tracked = set(map(id, (*sublayers, *layer.variables)))
    # Paths come from names and attributes, since Keras' `Variable.path` does not say where a layer is nested. Of a
    # graph of layers users know the names, as `summary()` shows them, and not the attributes.
    operations = layer.layers if isinstance(layer, keras.Sequential) else getattr(layer, "operations", ())
    graph = {id(child): child for child in operations if id(child) in tracked}
    yield from ((child.name, child) for child in graph.values())
    yielded = set(graph)
    for segment, child in _attributes(layer):
        state = child.state if isinstance(child, keras.random.SeedGenerator) else child
        # Keras tracks neither the states of a recurrent layer nor a module that is no layer.
        is_untracked = not (
            child.trainable if _is_variable(child) else isinstance(child, (keras.Layer, keras.random.SeedGenerator))
        )
        if id(child) not in graph and (id(state) in tracked or is_untracked):
            yielded.add(id(state))
            yield segment, child
    yielded.update(map(id, (variable for child in sublayers for variable in child.variables)))
    for child in (*sublayers, *layer.variables):
        if id(child) not in yielded:  # its attribute is gone, or it was made by `add_weight` and never had one
            yield child.name, child


def _attributes(parent: keras.Layer | tf.Module) -> Iterator[tuple[str, Any]]:
    """Yield the submodels and variables among the attributes of `parent`, but for the bookkeeping of TF and Keras."""
    for segment, value in vars(parent).items():
        # `_self_...` is the bookkeeping of TensorFlow, which tracks attributes too.
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
