"""Replacing methods of objects and classes for as long as a step is traced or runs eagerly."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

from tapeloop._search import search

# What the names of the methods that assign to a `tf.Variable` begin with; `variable[0].assign(...)` calls the last.
ASSIGNING = ("assign", "scatter_", "batch_scatter_", "_strided_slice_assign")


def assigning_methods() -> list[tuple[type, str]]:
    """Return the methods that assign to a `tf.Variable`, each with the class that defines it.

    TensorFlow does not export the classes; variables made in a trace are of another one than those made outside.
    """
    classes = search([BaseResourceVariable], type.__subclasses__)
    return [(kind, name) for kind in classes for name in vars(kind) if name.startswith(ASSIGNING)]


Note = Callable[[tf.Variable], bool | None]  # called with a variable; True: it is not assigned to
_inlining = threading.RLock()


def noting_assignments(variables: Iterable[tf.Variable], note: Note) -> contextlib.AbstractContextManager[None]:
    """Call `note` before any of the variables is assigned to inside this context; if it says True, nothing happens."""
    return all_patched(
        (variable, name, _noting(variable, name, note))
        for variable in variables
        for name in assigning_names(variable.__class__)
    )


def noting_all_assignments(note: Note) -> contextlib.AbstractContextManager[None]:
    """Call `note` with any variable that this thread assigns to inside this context, when it does: for eager steps."""
    # On the classes and not on variables: what a step moves may be kept anywhere, as in a closure. Other threads, such
    # as those of `tf.data`, find the same classes.
    thread = threading.get_ident()

    def noting(assign: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(assign)
        def shadow(self: tf.Variable, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and tf.executing_eagerly():  # a trace assigns nothing
                note(self)
            return assign(self, *args, **kwargs)

        return shadow

    return all_patched((kind, name, noting(getattr(kind, name))) for kind, name in assigning_methods())


# What the methods that assign a whole value make of the old one and their argument.
_WHOLE = {"assign": lambda before, value: value, "assign_add": tf.add, "assign_sub": tf.subtract}


@contextlib.contextmanager
def masked_assignments(happens: tf.Tensor) -> Iterator[None]:
    """Have what is assigned to any variable inside this context take effect only if a tensor is True: when traced.

    If it is False, the variable is assigned the value that it has.
    """
    # On the classes, as an optimizer may keep its variables anywhere. Threads that trace take turns.
    thread = threading.get_ident()
    puts = {kind: getattr(kind, "assign") for kind, _ in assigning_methods()}  # noqa: B009 (not a name of every `type`)

    def masking(kind: Any, name: str) -> Callable[..., Any]:
        assign, put, whole = getattr(kind, name), puts[kind], _WHOLE.get(name)

        @functools.wraps(assign)
        def shadow(self: tf.Variable, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return assign(self, *args, **kwargs)
            before = self.read_value()
            if whole is not None and args:
                # No copy of the old value outlives this: it is given up as soon as the new one is chosen.
                value = whole(before, tf.convert_to_tensor(args[0], self.dtype))
            else:
                assign(self, *args, **kwargs)
                value = self.read_value()
            # The op of TensorFlow 1 takes one condition for all elements, and writes into what it takes; that of
            # `tf.where` broadcasts it, which on the CPU took 5 times as long as an addition.
            return put(self, tf.compat.v1.where(happens, value, before))

        return shadow

    with _inlining, all_patched([(kind, name, masking(kind, name)) for kind, name in assigning_methods()]):
        yield


@contextlib.contextmanager
def read_once(variable: tf.Variable) -> Iterator[None]:
    """Have whatever reads the variable inside this context share one read, until somebody assigns to it.

    What is computed of it several times in a graph can then be computed once.
    """
    # Until the first assignment, for after it the old value is wrong.
    shared, read = [variable.read_value()], variable.value

    def value() -> tf.Tensor:
        return shared[0] if shared else read()

    with noting_assignments([variable], lambda _: shared.clear()), patched(variable, "value", value):
        yield


@contextlib.contextmanager
def patched(target: Any, name: str, shadow: Any) -> Iterator[None]:
    """Let an object or a class find `shadow` under `name` inside this context.

    A special method such as `__call__` is replaced on the class, where alone Python looks it up.
    """
    missing = object()
    # Keras' own `__setattr__` would track the function, and wants `super().__init__` to have run.
    kind = type if isinstance(target, type) else object
    # What is inherited is deleted afterwards, not set: a copy would hide later changes of the base class.
    own = vars(target).get(name, missing)  # such as a method that the user has replaced on this very object
    kind.__setattr__(target, name, shadow)
    try:
        yield
    finally:
        kind.__delattr__(target, name) if own is missing else kind.__setattr__(target, name, own)


@contextlib.contextmanager
def all_patched(patches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Apply several patches, each the arguments of `patched`, inside this context."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patched(*patch))
        yield


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Trace what the user has decorated with `tf.function` as part of the step, not from a trace it may have kept.

    A kept trace knows nothing of this step's mode, and one made now would keep it beyond the step. The setting is that
    of the process, so threads take turns.
    """
    # Threads that trace take turns: the setting is the process's, and so are patches on layers.
    with _inlining:
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(before)


@functools.cache
def assigning_names(kind: Hashable) -> tuple[str, ...]:
    """Name the methods that assign to a variable of this class."""
    return tuple(name for name in dir(kind) if name.startswith(ASSIGNING))


def _noting(variable: tf.Variable, name: str, note: Note) -> Callable[..., Any]:
    own = vars(variable).get(name)  # of another such context

    def shadow(*args: Any, **kwargs: Any) -> Any:
        if note(variable):
            return variable
        # The class is asked now, since its methods may have been replaced meanwhile.
        return getattr(type(variable), name)(variable, *args, **kwargs) if own is None else own(*args, **kwargs)

    return shadow
