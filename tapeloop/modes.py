"""Tracing a step so that what is frozen runs in inference mode and cannot move.

A Keras layer hands its `training` down in three ways: as an argument, as an argument spelled out in the parent's
`call`, and in a context that nested calls share. All three pass through `Layer.call`, so that is where the mode is
set: the bound `call` of each chosen layer is shadowed on the instance for as long as the step is traced. The frozen
variables are sealed the same way, by shadows of the methods that assign to them. Nothing is left behind; what runs
afterwards is the traced graph, so all this costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.selection import Selection
from tapeloop.tree import VariableInfo

_inlining = threading.RLock()


@contextlib.contextmanager
def frozen(selection: Selection) -> Iterator[None]:
    """Trace inside this context, and what `selection` leaves out stays as it is.

    The submodels of `selection.inference` run in inference mode, and what is assigned to a frozen variable, or to the
    state of a submodel of which nothing trains, goes nowhere. The layers around them get back the mode in which they
    were called themselves, which Keras 3 would otherwise overwrite with the mode of the child called last.
    """
    with inlined_functions(), inference_mode(selection), sealed([v.tensor for v in still(selection)]):
        yield


@contextlib.contextmanager
def sealed(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Drop what is assigned to the variables inside this context."""
    with contextlib.ExitStack() as shadows:
        for variable in variables:
            for name in _assigning(variable.__class__):
                shadows.enter_context(shadowed(variable, name, _dropping(variable)))
        yield


@contextlib.contextmanager
def noting_assignments(variables: Sequence[tf.Variable], note: Callable[[tf.Variable], None]) -> Iterator[None]:
    """Call `note` with each of the variables that is assigned to inside this context, when it is."""
    with contextlib.ExitStack() as shadows:
        for variable in variables:
            for name in _assigning(variable.__class__):
                shadows.enter_context(shadowed(variable, name, _noting(variable, getattr(variable, name), note)))
        yield


@contextlib.contextmanager
def read_once(variable: tf.Variable) -> Iterator[None]:
    """Have whatever reads the variable inside this context share one read, until somebody assigns to it.

    What is computed of it several times in a graph can then be computed once.
    """
    shared, read = [variable.read_value()], variable.value

    def value() -> tf.Tensor:
        return shared[0] if shared else read()

    with noting_assignments([variable], lambda _: shared.clear()), shadowed(variable, "value", value):
        yield


@contextlib.contextmanager
def shadowed(target: Any, name: str, shadow: Callable[..., Any]) -> Iterator[None]:
    """Let `target` find `shadow` under `name`, without the bookkeeping that Keras does when an attribute is set."""
    own = vars(target).get(name)  # a method that the user has replaced on this very object
    object.__setattr__(target, name, shadow)
    try:
        yield
    finally:
        object.__delattr__(target, name) if own is None else object.__setattr__(target, name, own)


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Trace what the user has decorated with `tf.function` as part of the step, not from a trace it may have kept.

    A kept trace knows nothing of this step's mode, and one made now would keep it beyond the step. The setting is that
    of the process, so threads take turns.
    """
    with _inlining:
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def inference_mode(selection: Selection) -> Iterator[None]:
    """Run the submodels of `selection.inference` in inference mode inside this context."""
    tree = selection.tree
    inference = frozenset(selection.inference)
    around = {relative for submodel in inference for relative in (*tree.parents[submodel], *tree.children[submodel])}
    modes = _Modes()
    with contextlib.ExitStack() as shadows:
        for submodel in tree.layers:
            if submodel in inference or submodel in around:
                for name in _compat.call_methods(submodel.object):
                    call = getattr(submodel.object, name)
                    shadow = _moded(submodel.object, call, modes, submodel in inference)
                    shadows.enter_context(shadowed(submodel.object, name, shadow))
        yield


class _Modes:
    """The modes of the nest of calls that is running: each one's `training`, and whether inference is forced on it."""

    def __init__(self) -> None:
        self.stack: list[tuple[bool | None, bool]] = []


def _moded(layer: keras.Layer, call: Callable[..., Any], modes: _Modes, inference: bool) -> Callable[..., Any]:
    """Wrap `call` so that in inference mode it and all that it calls see `training=False`, and none of it gets out."""
    signature = inspect.signature(call)

    def shadow(*args: Any, **kwargs: Any) -> Any:
        outer, forced = modes.stack[-1] if modes.stack else (_compat.inherited_training(layer), False)
        forced = forced or inference
        if forced:
            if "training" in kwargs:
                kwargs["training"] = False
            bound = signature.bind(*args, **kwargs)
            if "training" in signature.parameters:
                bound.arguments["training"] = False
            args, kwargs = bound.args, bound.kwargs
            _compat.inherit_training(layer, False)
        modes.stack.append((_compat.inherited_training(layer), forced))
        try:
            return call(*args, **kwargs)
        finally:
            modes.stack.pop()
            if forced:
                _compat.inherit_training(layer, outer)

    return shadow


def still(selection: Selection) -> list[VariableInfo]:
    """List the frozen variables, and the state under submodels of which nothing trains."""
    held = selection.tree.held
    idle = {submodel for submodel in selection.inference if selection.group_of.keys().isdisjoint(held[submodel])}
    state = [v for v in selection.non_trainable if not idle.isdisjoint(v.submodels)]
    return [*selection.frozen, *state]


@functools.cache
def _assigning(kind: Hashable) -> tuple[str, ...]:
    """Name the methods that assign to a variable of this class."""
    return tuple(name for name in dir(kind) if name.startswith(("assign", "scatter_", "batch_scatter_")))


def _noting(
    variable: tf.Variable, assign: Callable[..., Any], note: Callable[[tf.Variable], None]
) -> Callable[..., Any]:
    def shadow(*args: Any, **kwargs: Any) -> Any:
        note(variable)
        return assign(*args, **kwargs)

    return shadow


def _dropping(variable: tf.Variable) -> Callable[..., Any]:
    return lambda *args, **kwargs: variable
