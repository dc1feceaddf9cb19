"""Reading the tree of a model, and only where the model has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from tapeloop._backend import keras_internals
from tapeloop.model.tree import Model, Tree


class TreeReader:
    """Reads the tree of a model: walking a large one takes hundreds of times as long as seeing that it is the same."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tree: Tree | None = None
        self._look: Callable[[], Any] | None = None
        self._seen: Any = None

    def read(self) -> Tree:
        """Return the tree of the model as it is now: the same object as before, if nothing has changed."""
        if self._tree is None or self._look is None or self._seen != self._look():
            self._tree = Tree.of(self._model)
            self._look = _look_at(self._tree)
            self._seen = None if self._look is None else self._look()
        return self._tree


def _look_at(tree: Tree) -> Callable[[], Any] | None:
    """Return what gives something else once the model has other layers, variables or flags; None if nothing tells."""
    objects = [submodel.object for submodel in tree.submodels]
    layers = [each for each in objects if isinstance(each, keras.Layer)]
    mappings = [each for each in objects if isinstance(each, Mapping)]
    variables = [variable.variable for variable in tree.variables]
    # Nobody notes what is set on a `tf.Module`, or that a layer has another raw variable.
    if len(layers) + len(mappings) < len(objects) or not all(isinstance(each, keras.Variable) for each in variables):
        return None

    def look() -> Any:
        named = [(name, id(each)) for mapping in mappings for name, each in mapping.items()]
        return named, keras_internals.structure(layers, variables)

    return look
