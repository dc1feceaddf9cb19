"""The private names of Keras that tapeloop cannot do without, each in one function.

`tests/backend/` fails when one of them changes its meaning."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.layers.layer import CallContext

from tapeloop._backend.patching import patched


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that `layer` tracks directly, in the order in which it tracked them.

    `keras.Model.layers` is public; a plain `keras.Layer` that holds others has no public counterpart.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


_TRACKED = "_layers", "_trainable_variables", "_non_trainable_variables", "_seed_generators"


def structure(layers: Sequence[keras.Layer], variables: Sequence[keras.Variable]) -> Any:
    """Return what changes when a layer gets another sublayer, variable or attribute, or a `trainable` flag is set.

    The public `Layer.weights` goes through all sublayers each time, which takes far longer in a large model.
    """
    flag, attributes = operator.attrgetter("_trainable"), operator.attrgetter("__dict__")
    flags = [*map(flag, layers), *map(flag, variables)]
    # One list for each kind and none for each layer, or Python would collect garbage in each call.
    tracked = [list(map(id, itertools.chain.from_iterable(map(operator.attrgetter(n), layers)))) for n in _TRACKED]
    return flags, list(map(len, map(attributes, layers))), tracked


def inherited_training(layer: keras.Layer) -> bool | None:
    """Return the `training` that the layers called next inside `layer` would inherit.

    Keras keeps one value for a whole nest of calls, and offers no way to read it.
    """
    return getattr(layer._get_call_context(), "training", None)


def inherit_training(layer: keras.Layer, training: bool | None) -> None:
    """Set the `training` that the layers called next inside `layer` inherit.

    An explicit argument would do for layers that take one; those that do not are reached by this alone.
    """
    layer._get_call_context().training = training


def own_metrics(layer: keras.Layer) -> list[keras.metrics.Metric]:
    """Return the metrics that `layer` itself, without its sublayers, holds.

    The public `Layer.metrics` mixes in those of sublayers and, for a compiled model, those of `compile`.
    """
    return list(layer._metrics)


def call_methods(layer: keras.Layer) -> tuple[str, ...]:
    """Return the names of the methods by which Keras may run `layer`.

    A quantized layer runs `quantized_call` instead of `call`, which Keras decides in each call anew.
    """
    return ("call",) if layer.quantization_mode is None else ("call", "quantized_call")


def added_losses(layer: keras.Layer) -> list[tf.Tensor]:
    """Return what `layer` itself, without its sublayers, added to the losses when it was last called.

    The public `Layer.losses` mixes in those of sublayers and the weight penalties, unmarked.
    """
    return list(layer._get_own_losses())


def forget_added_losses(layer: keras.Layer) -> None:
    """Drop what `layer` added to the losses in earlier calls.

    Keras does so itself when a model is called from outside, but not for models that are not called this time.
    """
    layer._losses.clear()


@contextlib.contextmanager
def within_call(training: bool | None) -> Iterator[None]:
    """Call layers inside this context as if from within the call of another that has this `training`.

    Keras makes the context of a nest of calls by itself, for the outermost; a call that is repeated is not that.
    """
    # Without a context, the next layer would take itself for the outermost, and clear the losses of all layers in it.
    before = global_state.get_global_attribute("current_call_ctx")
    context = CallContext(entry_layer=None)
    context.training = training
    global_state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", before)


def copy_mask(source: Any, target: Any) -> None:
    """Give a tensor the mask that Keras has attached to another: an attribute, which identity ops lose."""
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        target._keras_mask = mask


def schedule_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Return the schedule or function that the learning rate of `optimizer` follows, or None where it is a number.

    The public `learning_rate` gives the number of the moment for each.
    """
    return None if isinstance(optimizer._learning_rate, keras.Variable) else optimizer._learning_rate


def learning_rate_variable(optimizer: keras.optimizers.Optimizer) -> keras.Variable | None:
    """Return the variable that holds the learning rate of `optimizer`, or None where it follows a schedule.

    The public `learning_rate` computes the number of the moment where there is a schedule, which in a trace adds ops.
    """
    return optimizer._learning_rate if isinstance(optimizer._learning_rate, keras.Variable) else None


def optimizer_config(optimizer: keras.optimizers.Optimizer, schedule: Any) -> dict[str, Any]:
    """Return the config of `optimizer` with the very schedule that its learning rate follows.

    `get_config` would serialize a schedule or a function, which only registered classes survive.
    """
    if schedule is None:
        return dict(optimizer.get_config())
    # Of a tensor `get_config` makes a number. It is set past the public setter, which refuses to put a number in the
    # place of a schedule.
    with patched(optimizer, "_learning_rate", tf.constant(0.0)):
        return optimizer.get_config() | {"learning_rate": schedule}


def clone_optimizer(optimizer: keras.optimizers.Optimizer, config: dict[str, Any]) -> keras.optimizers.Optimizer:
    """Return an unbuilt optimizer with the settings of `optimizer`.

    A config leaves out what `exclude_from_weight_decay` was told.
    """
    # A deep copy would share the schedule's variables and copy slots.
    clone = type(optimizer).from_config(dict(config))
    for name, told in vars(optimizer).items():
        if name.startswith("_exclude_from_weight_decay"):
            object.__setattr__(clone, name, copy.copy(told))
    return clone


@functools.cache
def optimizer_bookkeeping() -> frozenset[str]:
    """Return the names of the attributes that an optimizer has for what it has come to, and not for its settings."""
    # Of the optimizer with the fewest settings: whatever else it has, every optimizer has.
    plain = keras.optimizers.SGD(0.0)
    plain.build([])
    settings = {"weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "momentum", "nesterov"}
    return frozenset(vars(plain)) - settings - {name for name in vars(plain) if name.startswith("_exclude")}


def is_overridden(callback: keras.callbacks.Callback, name: str) -> bool:
    """Tell whether a callback does something at a moment, by its class or by an attribute of its own."""
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not vars(keras.callbacks.Callback)[name]


def needs_batches(callback: keras.callbacks.Callback, names: tuple[str, ...]) -> bool:
    """Tell whether a callback must be told of each batch.

    Two of Keras' own look at batches and do nothing with them, unless they are asked to: whether TensorBoard profiles
    is told by a private attribute alone.

    Args:
        callback: The callback.
        names: Its methods for batches.
    """
    if type(callback) is keras.callbacks.ModelCheckpoint:
        return bool(callback.save_freq != "epoch")
    if type(callback) is keras.callbacks.TensorBoard:
        return bool(callback.update_freq != "epoch" or callback.write_steps_per_second or callback._should_trace)
    return any(is_overridden(callback, name) for name in names)
