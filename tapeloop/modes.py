"""Tracing a step so that what is frozen runs in inference mode and cannot move.

A Keras layer hands its `training` down in three ways: as an argument, as an argument spelled out in the parent's
`call`, and in a context that nested calls share. All three pass through `Layer.call`, so that is where the mode is
set: the bound `call` of each layer is shadowed on the instance for as long as the step is traced. The shadows also
know which layers are being called, so that what a frozen layer assigns inside its own `call` can be dropped, and what
the user assigns in a step can happen. Nothing is left behind; what runs afterwards is the traced graph, so all this
costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tapeloop import _compat
from tapeloop.selection import Selection
from tapeloop.tree import SubmodelInfo, VariableInfo
from tapeloop.untracked import handles_read_since, op_count

Note = Callable[[tf.Variable], None]
_inlining = threading.RLock()


@contextlib.contextmanager
def frozen(selection: Selection, note: Note = lambda variable: None) -> Iterator[Calls]:
    """Trace inside this context, and no layer moves what `selection` leaves out.

    The submodels of `selection.inference` run in inference mode. What a layer assigns to a frozen variable inside its
    `call`, and what a frozen layer assigns to any variable of the model, goes nowhere, and neither do the losses that a
    frozen layer adds. What is assigned outside of all layers is the user's, and happens.

    Args:
        selection: What trains.
        note: Called with each variable of the model that is about to be assigned to.
    """
    with inlined_functions(), inference_mode(selection) as calls, sealed(selection, calls, note):
        yield calls


@contextlib.contextmanager
def sealed(selection: Selection, calls: Calls, note: Note) -> Iterator[None]:
    """Drop, inside this context, what layers assign to what is frozen; see `frozen`."""
    immovable = set(still(selection))
    with contextlib.ExitStack() as shadows:
        for variable in selection.tree.variables:
            tensor, is_still = variable.tensor, variable in immovable
            for name in _assigning(tensor.__class__):
                shadow = _sealing(tensor, getattr(tensor, name), calls, is_still, note)
                shadows.enter_context(shadowed(tensor, name, shadow))
        yield


def _sealing(
    variable: tf.Variable, assign: Callable[..., Any], calls: Calls, is_still: bool, note: Note
) -> Callable[..., Any]:
    def shadow(*args: Any, **kwargs: Any) -> Any:
        if calls.in_idle or (is_still and calls.running):
            return variable
        note(variable)
        return assign(*args, **kwargs)

    return shadow


@contextlib.contextmanager
def noting_assignments(variables: Sequence[tf.Variable], note: Note) -> Iterator[None]:
    """Call `note` with each of the variables that is assigned to inside this context, when it is."""
    with contextlib.ExitStack() as shadows:
        for variable in variables:
            for name in _assigning(variable.__class__):
                shadows.enter_context(shadowed(variable, name, _noting(variable, getattr(variable, name), note)))
        yield


@contextlib.contextmanager
def noting_all_assignments(note: Note) -> Iterator[None]:
    """Call `note` with any variable that this thread assigns to inside this context, when it does: for eager steps."""
    thread = threading.get_ident()

    def noting(assign: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(assign)
        def shadow(self: tf.Variable, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                note(self)
            return assign(self, *args, **kwargs)

        return shadow

    with contextlib.ExitStack() as shadows:
        for kind, name in _compat.assigning_methods():
            shadows.enter_context(_compat.class_attribute(kind, name, noting(getattr(kind, name))))
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
def shadowed(target: Any, name: str, shadow: Any) -> Iterator[None]:
    """Let `target` find `shadow` under `name`, without the bookkeeping that Keras does when an attribute is set."""
    missing = object()
    own = vars(target).get(name, missing)  # such as a method that the user has replaced on this very object
    object.__setattr__(target, name, shadow)
    try:
        yield
    finally:
        object.__delattr__(target, name) if own is missing else object.__setattr__(target, name, own)


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


class _Frame(NamedTuple):
    """A call that is running.

    Attributes:
        training: The mode of what it calls.
        inference: Whether inference mode is forced on it and all that it calls.
        idle: Whether it, or a call around it, is that of a submodel of which nothing trains.
    """

    training: bool | None
    inference: bool
    idle: bool


class Calls:
    """The nest of calls of submodels that is running.

    Attributes:
        read: The identities of the handles of the variables that were read inside of calls.
    """

    def __init__(self) -> None:
        self._frames: list[_Frame] = []
        self.read: set[int] = set()

    @property
    def running(self) -> bool:
        """Whether any submodel is being called."""
        return bool(self._frames)

    @property
    def in_idle(self) -> bool:
        """Whether a submodel of which nothing trains is being called, or something inside it."""
        return bool(self._frames) and self._frames[-1].idle

    def within(self) -> _Frame | None:
        """Return the innermost call that is running."""
        return self._frames[-1] if self._frames else None

    @contextlib.contextmanager
    def entered(self, frame: _Frame) -> Iterator[None]:
        """Have this call running inside the context."""
        start = None if self._frames else op_count()
        self._frames.append(frame)
        try:
            yield
        finally:
            self._frames.pop()
            if start is not None:
                self.read |= handles_read_since(start)


@contextlib.contextmanager
def inference_mode(selection: Selection) -> Iterator[Calls]:
    """Run the submodels of `selection.inference` in inference mode inside this context.

    The layers around them get back the mode in which they were called themselves, which Keras 3 would otherwise
    overwrite with the mode of the child called last.
    """
    inference, idle = frozenset(selection.inference), selection.idle
    calls = Calls()
    with contextlib.ExitStack() as shadows:
        for submodel in selection.tree.layers:
            layer = submodel.object
            for name in _compat.call_methods(layer):
                shadow = _moded(layer, getattr(layer, name), calls, submodel in inference, submodel in idle)
                shadows.enter_context(shadowed(layer, name, shadow))
            shadows.enter_context(shadowed(layer, "add_loss", _unless_idle(calls, layer.add_loss)))
        shadows.enter_context(_watched_modules(selection, calls))
        yield calls


def _moded(layer: keras.Layer, call: Callable[..., Any], calls: Calls, inference: bool, idle: bool) -> Any:
    """Wrap `call` so that in inference mode it and all that it calls see `training=False`, and none of it gets out."""

    def shadow(*args: Any, **kwargs: Any) -> Any:
        around = calls.within() or _Frame(_compat.inherited_training(layer), False, False)
        forced = around.inference or inference
        if forced:
            args, kwargs = _without_training(call, args, kwargs)
            _compat.inherit_training(layer, False)
        try:
            with calls.entered(_Frame(_compat.inherited_training(layer), forced, around.idle or idle)):
                return call(*args, **kwargs)
        finally:
            if forced:
                _compat.inherit_training(layer, around.training)

    return shadow


def _without_training(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a call, with `training=False` where it takes that."""
    signature = inspect.signature(call)
    if "training" in kwargs:
        kwargs["training"] = False
    bound = signature.bind(*args, **kwargs)
    if "training" in signature.parameters:
        bound.arguments["training"] = False
    return bound.args, bound.kwargs


def _unless_idle(calls: Calls, add_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `add_loss` so that a layer that also stands in a trained part adds nothing inside a frozen one."""
    return lambda *args, **kwargs: None if calls.in_idle else add_loss(*args, **kwargs)


@contextlib.contextmanager
def _watched_modules(selection: Selection, calls: Calls) -> Iterator[None]:
    """Note the calls of `tf.Module`s, which Python looks up on their class and not on the object."""
    modules = {id(s.object): s for s in selection.tree.submodels if _is_plain_module(s) and callable(s.object)}
    inference = frozenset(selection.inference)

    def watching(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def shadow(self: tf.Module, *args: Any, **kwargs: Any) -> Any:
            submodel = modules.get(id(self))
            if submodel is None:
                return call(self, *args, **kwargs)
            around = calls.within() or _Frame(None, False, False)
            frame = _Frame(
                around.training, around.inference or submodel in inference, around.idle or submodel in selection.idle
            )
            with calls.entered(frame):
                return call(self, *args, **kwargs)

        return shadow

    with contextlib.ExitStack() as shadows:
        for kind in {type(submodel.object) for submodel in modules.values()}:
            shadows.enter_context(_compat.class_attribute(kind, "__call__", watching(kind.__call__)))
        yield


def _is_plain_module(submodel: SubmodelInfo) -> bool:
    return isinstance(submodel.object, tf.Module) and not isinstance(submodel.object, keras.Layer)


def still(selection: Selection) -> list[VariableInfo]:
    """List what no layer may move: the frozen variables, and the state that stands in idle submodels alone.

    State that a frozen and a trained part share belongs to the trained one too, and moves with it.
    """
    places, idle = selection.tree.places, selection.idle
    state = [v for v in selection.non_trainable if all(not idle.isdisjoint(place) for place in places[v])]
    return [*selection.frozen, *state]


@functools.cache
def _assigning(kind: Hashable) -> tuple[str, ...]:
    """Name the methods that assign to a variable of this class."""
    return tuple(name for name in dir(kind) if name.startswith(_compat.ASSIGNING))


def _noting(variable: tf.Variable, assign: Callable[..., Any], note: Note) -> Callable[..., Any]:
    def shadow(*args: Any, **kwargs: Any) -> Any:
        note(variable)
        return assign(*args, **kwargs)

    return shadow
