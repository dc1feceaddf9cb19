"""Filters that count submodels in the order of construction: the first blocks, the last two convolutions."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TypeAlias

import keras
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.model.filters import Filter, matches_whole
from tapeloop.model.tree import SubmodelInfo, Tree, VariableInfo

Of: TypeAlias = "type | str"

_CANDIDATES: weakref.WeakKeyDictionary[Tree, dict[Of, tuple[SubmodelInfo, ...]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Ordinal(Filter):
    """See `first` and `last`."""

    end: str
    n: int
    of: Of

    def __call__(self, variable: VariableInfo) -> bool:
        return any(submodel in variable.submodels for submodel in self.chosen(variable.tree))

    def chosen(self, tree: Tree) -> tuple[SubmodelInfo, ...]:
        """Return the submodels that it counts off."""
        found = candidates(tree, self.of)
        return found[: self.n] if self.end == "first" else found[-self.n :]

    def __repr__(self) -> str:
        return f"{self.end}({self.n}, of={said(self.of)})"

    def patterns(self) -> tuple[str, ...]:
        return (self.of,) if isinstance(self.of, str) else ()

    def parts(self) -> tuple[Filter, ...]:
        return (self,)


def first(n: int, *, of: Of) -> Filter:
    """Mean all under the first `n` submodels that `of` says, in order of construction.

    Args:
        n: How many; all of them, where there are fewer.
        of: A class of layers, or a path glob that names submodels: `first(2, of="encoder/blocks/*")`.

    Raises:
        TypeError: `of` is neither.
        ValueError: `n` is no whole number of 1 or more.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.Freeze(tl.first(1, of=dense))).selection.trained]
        ['head/kernel', 'head/bias']
    """
    return Ordinal("first", whole_number("n", n, 1), as_of(of))


def last(n: int, *, of: Of) -> Filter:
    """Mean all under the last `n` submodels that `of` says, in order of construction.

    Args:
        n: How many; all of them, where there are fewer.
        of: A class of layers, or a path glob that names submodels: `last(1, of=keras.layers.Conv2D)`.

    Raises:
        TypeError: `of` is neither.
        ValueError: `n` is no whole number of 1 or more.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> [variable.path for variable in tl.Trainer(model, tl.TrainOnly(tl.last(1, of=dense))).selection.trained]
        ['head/kernel', 'head/bias']
    """
    return Ordinal("last", whole_number("n", n, 1), as_of(of))


def candidates(tree: Tree, of: Of) -> tuple[SubmodelInfo, ...]:
    """Return the submodels of a class or at a glob's paths that hold variables that can train, in the tree's order."""
    known = _CANDIDATES.setdefault(tree, {})
    if of not in known:
        known[of] = tuple(
            submodel
            for submodel in tree.submodels
            if _is_meant(submodel, of) and any(variable.trainable for variable in tree.held[submodel])
        )
    return known[of]


def as_of(of: Of) -> Of:
    """Check what a user says to count.

    Raises:
        TypeError: It is no class of layers and no path glob.
    """
    if isinstance(of, str) or (isinstance(of, type) and issubclass(of, (keras.Layer, tf.Module))):
        return of
    raise TypeError(
        "`of` must be a class of layers, or a path glob that names submodels, as in 'encoder/blocks/*'. "
        f"Received: {of!r}."
    )


def said(of: Of) -> str:
    """Say what is counted as it was written."""
    return repr(of) if isinstance(of, str) else of.__name__


def _is_meant(submodel: SubmodelInfo, of: Of) -> bool:
    if isinstance(of, str):
        return any(path and matches_whole(of, path) for path in submodel.paths)
    return isinstance(submodel.object, of)
