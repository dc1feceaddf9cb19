"""Filters: frozen, hashable predicates on variables, combined with `&`, `|` and `~`; how a glob matches a path.

Wherever a filter is taken, a string is a path glob, a submodel object means all under that very object, a class means
every layer of it, and a list means any of its entries.
"""

from __future__ import annotations

import abc
import fnmatch
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import keras
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.model.tree import HasVariables, SubmodelInfo, Tree, VariableInfo

FilterLike: TypeAlias = "Filter | str | HasVariables | type | Sequence[FilterLike]"


class Filter(abc.ABC):
    """A predicate on variables: True means that the variable is chosen.

    Make filters with `glob`, `of_type`, `named`, `under`, `matching`, `first` and `last`, and combine them with `&`,
    `|` and `~`. For a predicate of your own, use `matching`, or subclass this and write `__call__(variable)`.

    Raises:
        TypeError: A filter is used as a truth value, as `and`, `or` and `not` do.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> kernels = tl.named("kernel") & ~tl.glob("head")
        >>> kernels
        (named('kernel') & ~glob('head'))
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(kernels)).selection.trained]
        ['base/kernel']
    """

    is_part = False  # whether it names something in particular: `named("bias")` may match nothing, a path may not

    @abc.abstractmethod
    def __call__(self, variable: VariableInfo) -> bool:
        """Tell whether `variable` is chosen."""

    def __and__(self, other: FilterLike) -> Filter:
        return Joined("&", (self, to_filter(other)))

    def __or__(self, other: FilterLike) -> Filter:
        return Joined("|", (self, to_filter(other)))

    # So that a filter may stand on the right, as in `"head" & tl.named("bias")`.
    def __rand__(self, other: FilterLike) -> Filter:
        return Joined("&", (to_filter(other), self))

    def __ror__(self, other: FilterLike) -> Filter:
        return Joined("|", (to_filter(other), self))

    def __invert__(self) -> Filter:
        return Not(self)

    def __bool__(self) -> bool:
        # Every object is true by default, so that `a and b` would be `b`, and `not a` False, without a word.
        raise TypeError(f"A filter has no truth value: combine filters with `&`, `|` and `~`. Received: {self!r}.")

    def __deepcopy__(self, memo: object) -> Filter:
        return self  # a copy would hold copies of layers, which the model does not have

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        """Tell whether it names this very submodel of a model, and not only variables in it, as `remat` asks."""
        raise TypeError(
            "`remat` takes filters that name layers: a path glob, a class, a layer, `first` or `last`. "
            f"Received: {self!r}, which speaks of variables."
        )

    def operands(self) -> tuple[Filter, ...]:
        """The filters that it is made of."""
        return ()

    def patterns(self) -> tuple[str, ...]:
        """The paths and names that it looks for, so that an error can suggest similar ones."""
        return tuple(pattern for operand in self.operands() for pattern in operand.patterns())

    def parts(self) -> tuple[Filter, ...]:
        """The filters in it that name something in particular, and so must match something by themselves."""
        return (self,) if self.is_part else tuple(part for operand in self.operands() for part in operand.parts())


@dataclass(frozen=True)
class Glob(Filter):
    """See `glob`."""

    is_part = True
    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"`pattern` must be a string. Received: {self.pattern!r}.")
        if not all(self.pattern.split("/")):
            raise ValueError(
                f"`pattern` must be segments joined by single slashes, as in 'backbone/**'. Received: {self.pattern!r}."
            )

    def __call__(self, variable: VariableInfo) -> bool:
        # A shared layer or a tied weight is meant by any of its paths.
        return any(_matches(self.pattern.split("/"), path.split("/")) for path in variable.paths)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        # To the end: 'blocks/*' means the blocks, and not every layer in them. The root is never one of several.
        pattern = self.pattern.split("/")
        return any(path and _matches(pattern, path.split("/"), whole=True) for path in submodel.paths)

    def __repr__(self) -> str:
        return f"glob({self.pattern!r})"

    def patterns(self) -> tuple[str, ...]:
        return (self.pattern,)


@dataclass(frozen=True)
class OfType(Filter):
    """See `of_type`."""

    types: tuple[type, ...]

    def __call__(self, variable: VariableInfo) -> bool:
        return any(self.identifies(submodel, variable.tree) for submodel in variable.submodels)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        return isinstance(submodel.object, self.types)

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

    is_part = True
    submodel: HasVariables

    def __call__(self, variable: VariableInfo) -> bool:
        return any(self.identifies(submodel, variable.tree) for submodel in variable.submodels)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        # The very object: a layer of the same name in another model is not meant.
        return submodel.object is self.submodel

    def __repr__(self) -> str:
        name = getattr(self.submodel, "name", None)
        return f"under(<{type(self.submodel).__name__}{f' {name}' if name else ''}>)"


@dataclass(frozen=True)
class Matching(Filter):
    """See `matching`."""

    function: Callable[[VariableInfo], bool]

    def __call__(self, variable: VariableInfo) -> bool:
        # The function may return a NumPy bool, which is no `bool`.
        return bool(self.function(variable))

    def __repr__(self) -> str:
        return f"matching({getattr(self.function, '__qualname__', repr(self.function))})"


@dataclass(frozen=True)
class SubmodelKind:
    """Which submodels are counted or drawn: those of a class of layers, or at the paths of a glob."""

    of: type | str

    def __post_init__(self) -> None:
        if not isinstance(self.of, str) and not _is_submodel_class(self.of):
            raise TypeError(
                "`of` must be a class of layers, or a path glob that names submodels, as in 'encoder/blocks/*'. "
                f"Received: {self.of!r}."
            )

    def __repr__(self) -> str:
        return repr(self.of) if isinstance(self.of, str) else self.of.__name__

    def found_in(self, tree: Tree) -> tuple[SubmodelInfo, ...]:
        """Return the submodels of this kind that hold variables that can train, in order of construction."""
        # Submodels without weights are left out: a Dropout between two blocks is no block that could train.
        known = _FOUND.setdefault(tree, {})
        if self not in known:
            kind = to_filter(self.of)
            known[self] = tuple(
                submodel
                for submodel in tree.submodels
                if kind.identifies(submodel, tree)
                and any(variable.trainable for variable in tree.variables_in[submodel])
            )
        return known[self]


# A filter is asked about one variable at a time: without this, each would be looked for among all submodels again.
_FOUND: weakref.WeakKeyDictionary[Tree, dict[SubmodelKind, tuple[SubmodelInfo, ...]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Ordinal(Filter):
    """See `first` and `last`."""

    is_part = True
    end: str
    n: int
    kind: SubmodelKind

    def __call__(self, variable: VariableInfo) -> bool:
        return any(self.identifies(submodel, variable.tree) for submodel in variable.submodels)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        found = self.kind.found_in(tree)
        return submodel in (found[: self.n] if self.end == "first" else found[-self.n :])

    def __repr__(self) -> str:
        return f"{self.end}({self.n}, of={self.kind!r})"

    def patterns(self) -> tuple[str, ...]:
        return (self.kind.of,) if isinstance(self.kind.of, str) else ()


@dataclass(frozen=True)
class Joined(Filter):
    """Filters joined by `&`, by `|` or, as a list, by `,`, which means what `|` does."""

    sign: str
    filters: tuple[Filter, ...]

    def __call__(self, variable: VariableInfo) -> bool:
        return (all if self.sign == "&" else any)(filter_(variable) for filter_ in self.filters)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        # All are asked, for one of them may speak of variables.
        return (all if self.sign == "&" else any)([each.identifies(submodel, tree) for each in self.filters])

    def __repr__(self) -> str:
        return repr(list(self.filters)) if self.sign == "," else f"({f' {self.sign} '.join(map(repr, self.filters))})"

    def operands(self) -> tuple[Filter, ...]:
        return self.filters


@dataclass(frozen=True)
class Not(Filter):
    """The variables that a filter does not choose."""

    inner: Filter

    def __call__(self, variable: VariableInfo) -> bool:
        return not self.inner(variable)

    def identifies(self, submodel: SubmodelInfo, tree: Tree) -> bool:
        return not self.inner.identifies(submodel, tree)

    def __repr__(self) -> str:
        return f"~{self.inner!r}"

    def operands(self) -> tuple[Filter, ...]:
        return (self.inner,)


def glob(pattern: str) -> Filter:
    """Choose the variables at the paths that `pattern` matches, and all under the submodels that it matches.

    Args:
        pattern: Segments joined by slashes. `*`, `?` and `[...]` match within a segment, `**` matches any
            number of segments: `"backbone"` and `"backbone/**"` are all under the backbone, `"**/bias"` every bias. A
            segment that is the very name matches, brackets included.

    Returns:
        The filter.

    Raises:
        TypeError: `pattern` is no string.
        ValueError: A segment of `pattern` is empty.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.glob("*/bias"))).selection.trained]
        ['base/bias', 'head/bias']
    """
    return Glob(pattern)


def of_type(*types: type) -> Filter:
    """Choose the variables in submodels of these classes, at any depth: `of_type(keras.layers.BatchNormalization)`.

    Args:
        *types: Classes of layers, models or modules; their subclasses count too.

    Returns:
        The filter.

    Raises:
        TypeError: `types` is empty, or holds something that is no class.

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
    """Choose the variables whose last path segment is one of `names`: `named("bias")`.

    Args:
        *names: Names of variables, as they end a path.

    Returns:
        The filter.

    Raises:
        TypeError: `names` is empty, or holds something that is no string.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.named("kernel"))).selection.trained]
        ['base/kernel', 'head/kernel']
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`named` takes one or more names of variables. Received: {names!r}.")
    return Named(names)


def under(submodel: HasVariables) -> Filter:
    """Choose the variables under this very submodel, wherever it stands.

    Args:
        submodel: A layer, model or module of the model.

    Returns:
        The filter.

    Raises:
        TypeError: `submodel` is no Keras layer or model and no `tf.Module`.

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
    """Choose the variables for which `function` returns True: `matching(lambda v: v.size > 10_000)`.

    Args:
        function: Takes a `VariableInfo` and returns a bool. It is asked about variables that cannot train too.

    Returns:
        The filter.

    Raises:
        TypeError: `function` cannot be called.

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


def first(n: int, *, of: type | str) -> Filter:
    """Choose all variables under the first `n` submodels of a kind, in order of construction.

    Args:
        n: How many submodels; if there are fewer, all of them.
        of: A class of layers, or a path glob that names submodels: `first(2, of="encoder/blocks/*")`. Only submodels
            that hold variables that can train are counted.

    Returns:
        The filter.

    Raises:
        TypeError: `of` is no class of layers and no path glob.
        ValueError: `n` is no whole number of 1 or more.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze(tl.first(1, of=dense))).selection.trained]
        ['head/kernel', 'head/bias']
    """
    return Ordinal("first", whole_number("n", n, 1), SubmodelKind(of))


def last(n: int, *, of: type | str) -> Filter:
    """Choose all variables under the last `n` submodels of a kind, in order of construction.

    Args:
        n: How many submodels; if there are fewer, all of them.
        of: A class of layers, or a path glob that names submodels: `last(1, of=keras.layers.Conv2D)`. Only submodels
            that hold variables that can train are counted.

    Returns:
        The filter.

    Raises:
        TypeError: `of` is no class of layers and no path glob.
        ValueError: `n` is no whole number of 1 or more.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.last(1, of=dense))).selection.trained]
        ['head/kernel', 'head/bias']
    """
    return Ordinal("last", whole_number("n", n, 1), SubmodelKind(of))


def to_filter(value: FilterLike) -> Filter:
    """Return the filter that a user's value stands for.

    A string is a glob, a submodel all that is under it, a class every layer of it, a list any of its entries.

    Raises:
        TypeError: `value` is none of these.
    """
    if isinstance(value, Filter):
        return value
    # Strings before sequences: a string is a sequence of strings.
    if isinstance(value, str):
        return Glob(value)
    if isinstance(value, (keras.Layer, tf.Module)):
        return Under(value)
    if _is_submodel_class(value):
        return OfType((value,))
    hint = " For a function of a variable, write `matching(function)`." if callable(value) else ""
    if isinstance(value, (list, tuple)):
        if value:
            return Joined(",", tuple(map(to_filter, value)))
        hint = " A list must hold one or more."
    raise TypeError(
        "A filter must be a path glob, a submodel, a class of layers, a list of these, or a `Filter`. "
        f"Received: {value!r}.{hint}"
    )


def _is_submodel_class(value: object) -> TypeGuard[type]:
    return isinstance(value, type) and issubclass(value, (keras.Layer, tf.Module))


def _matches(pattern: list[str], path: list[str], whole: bool = False) -> bool:
    """Tell whether a glob's segments match the segments of a path: the first of them or, if `whole`, all of them."""
    if not pattern:
        return not (whole and path)
    if pattern[0] == "**":  # no segment, or one and perhaps more
        return _matches(pattern[1:], path, whole) or (bool(path) and _matches(pattern, path[1:], whole))
    # A layer's name may hold brackets, which a glob would take for a set of characters.
    if not path or not (path[0] == pattern[0] or fnmatch.fnmatchcase(path[0], pattern[0])):
        return False
    return _matches(pattern[1:], path[1:], whole)
