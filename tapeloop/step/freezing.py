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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.patching import all_patched, inlined_functions, noting_assignments
from tapeloop._backend.tracing import op_count
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.optimization.untracked_variables import handles_read_since


@contextlib.contextmanager
def frozen(selection: Selection, assigned: set[VariableInfo], used: set[int]) -> Iterator[None]:
    """Trace inside this context, and no layer moves what `selection` leaves out.

    The submodels of `selection.inference` run in inference mode. What a layer assigns to a frozen variable inside its
    `call`, and what a frozen layer assigns to any variable of the model, goes nowhere, and neither do the losses that a
    frozen layer adds. What is assigned outside of all layers is the user's, and happens.

    Args:
        selection: What trains.
        assigned: Takes in the variables of the model that are assigned to.
        used: Takes in the identities of the handles of the variables that are read inside of calls.
    """
    # Inner `tf.function`s keep a trace of another mode, or would keep this one beyond the step: they are traced as part
    # of it. AutoGraph does not convert them then, and an inner `jit_compile` is ignored.
    with inlined_functions(), inference_mode(selection, used) as calls, read_only(selection, calls, assigned):
        yield


def read_only(
    selection: Selection, calls: Calls, assigned: set[VariableInfo]
) -> contextlib.AbstractContextManager[None]:
    """Drop, inside this context, what layers assign to what is frozen; see `frozen`."""
    # Inference mode is not enough: a stateful recurrent layer, a counter or a method beside `call` assigns in any mode.
    # A `keras.StatelessScope` around `call` was tried first: it reaches neither a `tf.Module` nor what is assigned
    # outside of `call`. What writes by a raw op (`tf.raw_ops.AssignVariableOp`) is out of reach.
    infos = {variable.tf_variable.ref(): variable for variable in selection.tree.variables}
    immutable = {variable.tf_variable.ref() for variable in immutable_variables(selection)}

    def is_dropped(tf_variable: tf.Variable) -> bool:
        # Outside of all calls it is the user who assigns: a target network, a codebook, a perturbation. That happens.
        if calls.in_idle or (calls.innermost is not None and tf_variable.ref() in immutable):
            return True
        assigned.add(infos[tf_variable.ref()])
        return False

    return noting_assignments([variable.tf_variable for variable in selection.tree.variables], is_dropped)


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
        innermost: The innermost of them, or None.
    """

    def __init__(self, used: set[int]) -> None:
        self.innermost: _Frame | None = None
        self._used = used

    @property
    def in_idle(self) -> bool:
        """Whether a submodel of which nothing trains is being called, or something inside it."""
        return self.innermost is not None and self.innermost.idle

    @contextlib.contextmanager
    def entered(self, frame: _Frame) -> Iterator[None]:
        """Have this call running inside the context."""
        around, self.innermost = self.innermost, frame
        # The outermost call sees all that the calls inside it read; to list a graph's ops takes long in a large one.
        start = None if around else op_count()
        try:
            yield
        finally:
            self.innermost = around
            if start is not None:
                self._used |= handles_read_since(start)


@contextlib.contextmanager
def inference_mode(selection: Selection, used: set[int]) -> Iterator[Calls]:
    """Run the submodels of `selection.inference` in inference mode inside this context.

    The layers around them get back the mode in which they were called themselves, which Keras 3 would otherwise
    overwrite with the mode of the child called last.
    """
    inference, idle = frozenset(selection.inference), selection.idle
    calls = Calls(used)
    patches = list(_module_patches(selection, calls))
    for submodel in selection.tree.layers:
        layer = submodel.object
        for name in keras_internals.call_methods(layer):
            shadow = _moded(layer, getattr(layer, name), calls, submodel in inference, submodel in idle)
            patches.append((layer, name, shadow))
        patches.append((layer, "add_loss", _unless_idle(calls, layer.add_loss)))
    with all_patched(patches):
        yield calls


def _moded(layer: keras.Layer, call: Callable[..., Any], calls: Calls, inference: bool, idle: bool) -> Any:
    """Wrap `call` so that in inference mode it and all that it calls see `training=False`, and none of it gets out."""

    def shadow(*args: Any, **kwargs: Any) -> Any:
        around = calls.innermost or _Frame(keras_internals.inherited_training(layer), False, False)
        forced = around.inference or inference
        if forced:
            args, kwargs = _without_training(call, args, kwargs)
            keras_internals.inherit_training(layer, False)
        try:
            with calls.entered(_Frame(keras_internals.inherited_training(layer), forced, around.idle or idle)):
                return call(*args, **kwargs)
        finally:
            # Keras 3 leaves the mode of the child called last to the layers called next: a frozen `base(x,
            # training=False)` would switch off the Dropout of the head behind it.
            if forced:
                keras_internals.inherit_training(layer, around.training)

    return shadow


def _without_training(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a call, with `training=False` where it takes that."""
    signature = inspect.signature(call)
    # A `call(self, inputs, **kwargs)` has it there, and not among its parameters.
    if "training" in kwargs:
        kwargs["training"] = False
    bound = signature.bind(*args, **kwargs)
    if "training" in signature.parameters:
        bound.arguments["training"] = False
    return bound.args, bound.kwargs


def _unless_idle(calls: Calls, add_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `add_loss` so that a layer that also stands in a trained part adds nothing inside a frozen one."""
    return lambda *args, **kwargs: None if calls.in_idle else add_loss(*args, **kwargs)


def _module_patches(selection: Selection, calls: Calls) -> Iterable[tuple[type, str, Any]]:
    """Give patches that note the calls of `tf.Module`s: of their classes, where Python looks `__call__` up."""
    modules = {id(s.object): s for s in selection.tree.submodels if _is_plain_module(s) and callable(s.object)}
    inference = frozenset(selection.inference)

    def watching(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def shadow(self: tf.Module, *args: Any, **kwargs: Any) -> Any:
            submodel = modules.get(id(self))
            if submodel is None:
                return call(self, *args, **kwargs)
            around = calls.innermost or _Frame(None, False, False)
            frame = _Frame(
                around.training, around.inference or submodel in inference, around.idle or submodel in selection.idle
            )
            with calls.entered(frame):
                return call(self, *args, **kwargs)

        return shadow

    kinds = {type(submodel.object) for submodel in modules.values()}
    return [(kind, "__call__", watching(kind.__call__)) for kind in kinds]


def _is_plain_module(submodel: SubmodelInfo) -> bool:
    return isinstance(submodel.object, tf.Module) and not isinstance(submodel.object, keras.Layer)


def immutable_variables(selection: Selection) -> list[VariableInfo]:
    """List what no layer may move: the frozen variables, and the state that stands in idle submodels alone.

    State that a frozen and a trained part share belongs to the trained one too, and moves with it.
    """
    # A layer that is shared by a frozen and a trained part goes on moving its state in the trained one.
    above, idle = selection.tree.above, selection.idle
    state = [v for v in selection.non_trainable if not any(idle.isdisjoint(above(path)) for path in v.paths)]
    return [*selection.frozen, *state]
