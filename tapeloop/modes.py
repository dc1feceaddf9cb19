"""Running chosen submodels in inference mode while a step is traced.

A Keras layer hands its `training` down in three ways: as an argument, as an argument spelled out in the parent's
`call`, and in a context that nested calls share. All three pass through `Layer.call`, so that is where the mode is
set: the bound `call` of each chosen layer is shadowed on the instance for as long as the step is traced, and
nothing is left behind. What runs afterwards is the traced graph, so the mode costs nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tapeloop import _compat
from tapeloop.selection import Selection


@contextlib.contextmanager
def inference_mode(selection: Selection) -> Iterator[None]:
    """Run the submodels of `selection.inference` in inference mode inside this context.

    Those under which nothing trains are sealed as well: what they assign to a Keras variable, and what they add to
    the losses, is dropped. The layers around them get back the mode in which they were called themselves, which
    Keras 3 would otherwise overwrite with the mode of the child called last.
    """
    inference = frozenset(selection.inference)
    around = {parent for submodel in inference for parent in selection.tree.parents[submodel]} - inference
    modes: list[bool | None] = []
    with contextlib.ExitStack() as shadows:
        for submodel in selection.tree.layers:
            layer = submodel.object
            for name in _compat.call_methods(layer):
                if submodel in inference:
                    sealed = selection.group_of.keys().isdisjoint(selection.tree.held[submodel])
                    shadow = _in_inference(layer, getattr(layer, name), modes, sealed)
                elif submodel in around:
                    shadow = _remembering(layer, getattr(layer, name), modes)
                else:
                    continue
                shadows.enter_context(_shadowed(layer, name, shadow))
        yield


@contextlib.contextmanager
def _shadowed(layer: keras.Layer, name: str, shadow: Callable[..., Any]) -> Iterator[None]:
    """Let `layer` find `shadow` under `name`, without the bookkeeping that Keras does when an attribute is set."""
    own = vars(layer).get(name)  # a method that the user has replaced on this very layer
    object.__setattr__(layer, name, shadow)
    try:
        yield
    finally:
        object.__delattr__(layer, name) if own is None else object.__setattr__(layer, name, own)


def _in_inference(
    layer: keras.Layer, call: Callable[..., Any], modes: list[bool | None], sealed: bool
) -> Callable[..., Any]:
    """Wrap `call` so that it and all that it calls see `training=False`."""
    signature = inspect.signature(call)

    def shadow(*args: Any, **kwargs: Any) -> Any:
        if "training" in kwargs:
            kwargs["training"] = False
        bound = signature.bind(*args, **kwargs)
        if "training" in signature.parameters:
            bound.arguments["training"] = False
        before = modes[-1] if modes else _compat.inherited_training(layer)
        _compat.inherit_training(layer, False)
        modes.append(False)
        try:
            with _compat.sealed_scope() if sealed else contextlib.nullcontext():
                return call(*bound.args, **bound.kwargs)
        finally:
            modes.pop()
            _compat.inherit_training(layer, before)

    return shadow


def _remembering(layer: keras.Layer, call: Callable[..., Any], modes: list[bool | None]) -> Callable[..., Any]:
    """Wrap `call` so that the layers in inference mode inside it know which mode to give back."""

    def shadow(*args: Any, **kwargs: Any) -> Any:
        modes.append(_compat.inherited_training(layer))
        try:
            return call(*args, **kwargs)
        finally:
            modes.pop()

    return shadow
