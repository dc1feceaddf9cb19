"""Rematerialization: chosen submodels compute their activations again for the gradient, and do not keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.errors import PolicyError
from tapeloop.modes import sealed, shadowed
from tapeloop.ordinal import Ordinal, candidates
from tapeloop.selection import Selection
from tapeloop.tree import SubmodelInfo, Tree
from tapeloop.where import Glob, Joined, Kind, Not, Under, Where, WhereLike, as_where, matches_whole


class Remat:
    """Chooses submodels, and makes them compute twice while a step is traced.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; `tf.recompute_grad`.
    """

    def __init__(self, where: WhereLike | type | Sequence[WhereLike | type] | None) -> None:
        """Check and keep what is chosen.

        Args:
            where: Which submodels: a path glob that names them, a class, a submodel, or several of these; or None.

        Raises:
            TypeError: It is none of these, or speaks of variables.
        """
        several = where if isinstance(where, (list, tuple)) else [] if where is None else [where]
        self._wheres = [Kind((one,)) if isinstance(one, type) else as_where(one) for one in several]

    def chosen(self, tree: Tree) -> list[SubmodelInfo]:
        """Return the layers that are chosen, but for those inside another that is.

        Raises:
            PolicyError: One of the wheres names no layer.
            TypeError: One of them speaks of variables.
        """
        found: dict[SubmodelInfo, None] = {}
        for where in self._wheres:
            named = [submodel for submodel in tree.layers if submodel.path and _names(where, submodel, tree)]
            if not named:
                raise PolicyError(
                    f"`remat` was asked for {where!r}, which names no layer of the model. It takes a path glob that "
                    "names layers to the end, as in 'encoder/blocks/*', a class of layers, or a layer; "
                    "`tl.paths(model)` prints what there is."
                )
            found.update(dict.fromkeys(named))
        return [one for one in found if not any(_is_inside(one, other) for other in found)]

    @contextlib.contextmanager
    def applied(self, selection: Selection) -> Iterator[None]:
        """Trace inside this context, and the chosen submodels compute twice."""
        with contextlib.ExitStack() as shadows:
            for submodel in self.chosen(selection.tree):
                layer = submodel.object
                for name in _compat.call_methods(layer):
                    shadow = _recomputing(submodel, selection, getattr(layer, name))
                    shadows.enter_context(shadowed(layer, name, shadow))
            yield


def _recomputing(submodel: SubmodelInfo, selection: Selection, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `call` of a layer so that its gradient computes it again, from the state that it first found."""
    layer = submodel.object
    inside = [one for one in selection.tree.layers if one is submodel or _is_inside(one, submodel)]
    still = [v for v in selection.tree.held[submodel] if v not in selection.group_of]
    raw_state = [v.tensor for v in still if not isinstance(v.variable, keras.Variable)]
    again = False

    def shadow(*args: Any, **kwargs: Any) -> Any:
        if again:
            return call(*args, **kwargs)
        flat = tf.nest.flatten((args, kwargs))
        places = [place for place, value in enumerate(flat) if tf.is_tensor(value) and value.dtype.is_floating]
        training = _compat.inherited_training(layer)
        found = [(v.variable, v.tensor.read_value()) for v in still if isinstance(v.variable, keras.Variable)]
        outputs: list[Any] = []
        masks: list[Any] = []

        def run(*tensors: tf.Tensor) -> list[tf.Tensor]:
            given = list(flat)
            for place, tensor in zip(places, tensors):
                _compat.copy_mask(flat[place], tensor)
                given[place] = tensor
            inner_args, inner_kwargs = tf.nest.pack_sequence_as((args, kwargs), given)
            if outputs:
                return tf.nest.flatten(replay(*inner_args, **inner_kwargs))
            before = [len(_compat.added_losses(one.object)) for one in inside]
            outputs.append(call(*inner_args, **inner_kwargs))
            _check_losses(submodel, inside, before)
            masks.extend(tf.nest.flatten(outputs[0]))
            return tf.nest.flatten(outputs[0])

        def replay(*args: Any, **kwargs: Any) -> Any:
            nonlocal again
            again = True
            try:
                # What does not train is read as it was found, and what it would become is dropped: it has become so.
                with _compat.within_call(training), keras.StatelessScope(state_mapping=found), sealed(raw_state):
                    return layer(*args, **kwargs)
            finally:
                again = False

        results = tf.recompute_grad(run)(*[flat[place] for place in places])
        for before, result in zip(masks, results):
            _compat.copy_mask(before, result)
        return tf.nest.pack_sequence_as(outputs[0], results)

    return shadow


def _check_losses(submodel: SubmodelInfo, inside: Sequence[SubmodelInfo], before: Sequence[int]) -> None:
    for one, count in zip(inside, before):
        if len(_compat.added_losses(one.object)) > count:
            raise ValueError(
                f"`remat` cannot hold for `{submodel.path}`: `{one.path}` in it adds a loss when it is called, which "
                "would have no gradient. Leave it out of `remat`, or add the loss in `compute_loss`."
            )


def _names(where: Where, submodel: SubmodelInfo, tree: Tree) -> bool:
    """Tell whether a where names this very submodel, and not only variables in it."""
    if isinstance(where, Glob):
        return any(matches_whole(where.pattern, path) for path in submodel.paths)
    if isinstance(where, Kind):
        return isinstance(submodel.object, where.types)
    if isinstance(where, Under):
        return submodel.object is where.submodel
    if isinstance(where, Ordinal):
        found = candidates(tree, where.of)
        return submodel in (found[: where.n] if where.end == "first" else found[-where.n :])
    if isinstance(where, Not):
        return not _names(where.where, submodel, tree)
    if isinstance(where, Joined):
        names = (_names(where.left, submodel, tree), _names(where.right, submodel, tree))
        return all(names) if where.sign == "&" else any(names)
    raise TypeError(
        "`remat` takes wheres that name layers: a path glob, a class, a layer, `first` or `last`. "
        f"Received: {where!r}, which speaks of variables."
    )


def _is_inside(inner: SubmodelInfo, outer: SubmodelInfo) -> bool:
    return any(path.startswith(f"{above}/") for path in inner.paths for above in outer.paths)
