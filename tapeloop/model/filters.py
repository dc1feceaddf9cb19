"""Filters: frozen, hashable predicates on variables, combined with `&`, `|` and `~`.

Wherever a filter is taken, a string is a path glob, a submodel object means all under that very object, a class means
every layer of it, and a list means any of its entries.
"""

from __future__ import annotations

import abc
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import keras
import tensorflow as tf

from tapeloop.model.tree import Model, SubmodelInfo, VariableInfo

FilterLike: TypeAlias = "Filter | str | Model | type | Sequence[FilterLike]"


class Filter(abc.ABC):
    """A predicate on variables. True means that the variable is meant."""

    @abc.abstractmethod
    def __call__(self, variable: VariableInfo) -> bool:
        """Tell whether `variable` is meant."""

    def __and__(self, other: FilterLike) -> Filter:
        return Joined("&", self, to_filter(other))

    def __or__(self, other: FilterLike) -> Filter:
        return Joined("|", self, to_filter(other))

    def __rand__(self, other: FilterLike) -> Filter:
        return Joined("&", to_filter(other), self)

    def __ror__(self, other: FilterLike) -> Filter:
        return Joined("|", to_filter(other), self)

    def __invert__(self) -> Filter:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(f"A filter has no truth value: combine filters with `&`, `|` and `~`. Received: {self!r}.")

    def patterns(self) -> tuple[str, ...]:
        """The path globs in it, for errors that suggest what stands nearby."""
        return ()

    def parts(self) -> tuple[Filter, ...]:
        """The filters in it that name something in particular, and so must mean something by themselves."""
        return ()

    def __deepcopy__(self, memo: object) -> Filter:
        """Return the where itself: a copy would mean copies of layers, which are none of the model's."""
        return self


@dataclass(frozen=True)
class Glob(Filter):
    """See `glob`."""

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"`pattern` must be a string. Received: {self.pattern!r}.")
        if not all(self.pattern.split("/")):
            raise ValueError(
                f"`pattern` must be segments joined by single slashes, as in 'backbone/**'. Received: {self.pattern!r}."
            )

    def __call__(self, variable: VariableInfo) -> bool:
        pattern = tuple(self.pattern.split("/"))
        return any(_matches(pattern, tuple(path.split("/"))) for path in variable.paths)

    def __repr__(self) -> str:
        return f"glob({self.pattern!r})"

    def patterns(self) -> tuple[str, ...]:
        return (self.pattern,)

    def parts(self) -> tuple[Filter, ...]:
        return (self,)


@dataclass(frozen=True)
class OfType(Filter):
    """See `of_type`."""

    types: tuple[type, ...]

    def __call__(self, variable: VariableInfo) -> bool:
        return any(isinstance(submodel.object, self.types) for submodel in variable.submodels)

    def __repr__(self) -> str:
        return f"of_type({', '.join(kind.__name__ for kind in self.types)})"


@dataclass(frozen=True)
class Named(Filter):
    """See `named`."""

    names: tuple[str, ...]

    def __call__(self, variable: VariableInfo) -> bool:
        return any(path.rpartition("/")[2] in self.names for path in variable.paths)

    def __repr__(self) -> str:
        return f"named({', '.join(map(repr, self.names))})"

    def patterns(self) -> tuple[str, ...]:
        return self.names


@dataclass(frozen=True)
class Under(Filter):
    """See `under`."""

    submodel: Model

    def __call__(self, variable: VariableInfo) -> bool:
        return any(submodel.object is self.submodel for submodel in variable.submodels)

    def __repr__(self) -> str:
        name = getattr(self.submodel, "name", None)
        return f"under(<{type(self.submodel).__name__}{f' {name}' if name else ''}>)"

    def parts(self) -> tuple[Filter, ...]:
        return (self,)


@dataclass(frozen=True)
class Matching(Filter):
    """See `matching`."""

    function: Callable[[VariableInfo], bool]

    def __call__(self, variable: VariableInfo) -> bool:
        return bool(self.function(variable))

    def __repr__(self) -> str:
        return f"matching({getattr(self.function, '__qualname__', repr(self.function))})"


@dataclass(frozen=True)
class Joined(Filter):
    """Two filters joined by `&` or `|`."""

    sign: str
    left: Filter
    right: Filter

    def __call__(self, variable: VariableInfo) -> bool:
        if self.sign == "&":
            return self.left(variable) and self.right(variable)
        return self.left(variable) or self.right(variable)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.sign} {self.right!r})"

    def patterns(self) -> tuple[str, ...]:
        return (*self.left.patterns(), *self.right.patterns())

    def parts(self) -> tuple[Filter, ...]:
        return (*self.left.parts(), *self.right.parts())


@dataclass(frozen=True)
class AnyOf(Filter):
    """All that one of several filters means."""

    filters: tuple[Filter, ...]

    def __call__(self, variable: VariableInfo) -> bool:
        return any(filter_(variable) for filter_ in self.filters)

    def __repr__(self) -> str:
        return repr(list(self.filters))

    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern for filter_ in self.filters for pattern in filter_.patterns())

    def parts(self) -> tuple[Filter, ...]:
        return tuple(part for filter_ in self.filters for part in filter_.parts())


@dataclass(frozen=True)
class Not(Filter):
    """All that a filter does not mean."""

    inner: Filter

    def __call__(self, variable: VariableInfo) -> bool:
        return not self.inner(variable)

    def __repr__(self) -> str:
        return f"~{self.inner!r}"

    def patterns(self) -> tuple[str, ...]:
        return self.inner.patterns()

    def parts(self) -> tuple[Filter, ...]:
        return self.inner.parts()


def glob(pattern: str) -> Filter:
    """Mean the variables at the paths that `pattern` matches, and all under the submodels that it matches.

    Args:
        pattern: Segments joined by slashes. `*`, `?` and `[...]` match within a segment, `**` matches any
            number of segments: `"backbone"` and `"backbone/**"` are all under the backbone, `"**/bias"` every bias. A
            segment that is the very name matches, brackets included.

    Raises:
        TypeError: `pattern` is no string.
        ValueError: A segment of it is empty.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.glob("*/bias"))).selection.trained]
        ['base/bias', 'head/bias']
    """
    return Glob(pattern)


def of_type(*types: type) -> Filter:
    """Mean the variables in submodels of these classes, at any depth: `of_type(keras.layers.BatchNormalization)`.

    Args:
        *types: Classes of layers, models or modules; subclasses are meant too.

    Raises:
        TypeError: There is none, or one of them is no class.

    Example:
        >>> layers = keras.layers
        >>> inside = [layers.Dense(3, name="base"), layers.BatchNormalization(name="bn")]
        >>> model = keras.Sequential([keras.Input((4,)), *inside])
        >>> policy = tl.TrainOnly(tl.of_type(layers.BatchNormalization))
        >>> [variable.path for variable in tl.Trainer(model, policy).selection.trained]
        ['bn/gamma', 'bn/beta']
    """
    if not types or not all(isinstance(kind, type) for kind in types):
        raise TypeError(f"`of_type` takes one or more classes of layers. Received: {types!r}.")
    return OfType(types)


def named(*names: str) -> Filter:
    """Mean the variables whose last path segment is one of `names`: `named("bias")`.

    Args:
        *names: Names of variables, as they end a path.

    Raises:
        TypeError: There is none, or one of them is no string.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.named("kernel"))).selection.trained]
        ['base/kernel', 'head/kernel']
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`named` takes one or more names of variables. Received: {names!r}.")
    return Named(names)


def under(submodel: Model) -> Filter:
    """Mean the variables under this very submodel, wherever it stands.

    Args:
        submodel: A layer, model or module of the model.

    Raises:
        TypeError: It is none of these.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> policy = tl.TrainOnly(tl.under(model.layers[-1]) & ~tl.named("bias"))
        >>> [variable.path for variable in tl.Trainer(model, policy).selection.trained]
        ['head/kernel']
    """
    if not isinstance(submodel, (keras.Layer, tf.Module)):
        raise TypeError(f"`submodel` must be a Keras model or layer, or a `tf.Module`. Received: {submodel!r}.")
    return Under(submodel)


def matching(function: Callable[[VariableInfo], bool]) -> Filter:
    """Mean the variables for which `function` returns True: `matching(lambda v: v.size > 10_000)`.

    Args:
        function: Takes a `VariableInfo` and returns a bool. It is asked about variables that cannot train too.

    Raises:
        TypeError: It cannot be called.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> policy = tl.TrainOnly(tl.matching(lambda variable: variable.size > 6))
        >>> [variable.path for variable in tl.Trainer(model, policy).selection.trained]
        ['base/kernel']
    """
    if not callable(function):
        raise TypeError(f"`function` must take a `VariableInfo` and return a bool. Received: {function!r}.")
    return Matching(function)


def to_filter(value: FilterLike) -> Filter:
    """Turn what a user may write for a filter into one.

    A string is a glob, a submodel all that is under it, a class every layer of it, a list any of its entries.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(value, Filter):
        return value
    if isinstance(value, str):
        return Glob(value)
    if isinstance(value, (keras.Layer, tf.Module)):
        return Under(value)
    if isinstance(value, type) and issubclass(value, (keras.Layer, tf.Module)):
        return OfType((value,))
    if isinstance(value, (list, tuple)) and value:
        return AnyOf(tuple(map(to_filter, value)))
    hint = ""
    if isinstance(value, (list, tuple)):
        hint = " A list must hold one or more."
    elif callable(value):
        hint = " For a function of a variable, write `matching(function)`."
    raise TypeError(
        "A filter must be a path glob, a submodel, a class of layers, a list of these, or a `Filter`. "
        f"Received: {value!r}.{hint}"
    )


def matches_whole(pattern: str, path: str) -> bool:
    """Tell whether a glob matches a path to its end, and not only the first segments of it."""
    return _matches(tuple(pattern.split("/")), tuple(path.split("/")), whole=True)


def is_inside(inner: SubmodelInfo, outer: SubmodelInfo) -> bool:
    """Tell whether a submodel stands in another, at any of its paths."""
    return any(path.startswith(f"{above}/") for path in inner.paths for above in outer.paths)


def _matches(pattern: tuple[str, ...], path: tuple[str, ...], whole: bool = False) -> bool:
    """Tell whether a glob's segments match the path or, unless `whole`, the first segments of it."""
    if not pattern:
        return not (whole and path)
    if pattern[0] == "**":
        return _matches(pattern[1:], path, whole) or (bool(path) and _matches(pattern, path[1:], whole))
    if not path or not (path[0] == pattern[0] or fnmatch.fnmatchcase(path[0], pattern[0])):
        return False
    return _matches(pattern[1:], path[1:], whole)
