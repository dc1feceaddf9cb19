"""Calling a model on a batch of inputs, and saying what is wrong where they do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tapeloop._backend.assertions import require
from tapeloop.data.batch import map_tensors, shapes
from tapeloop.errors import DataError, TapeloopError
from tapeloop.model.tree import Model


def call_model(model: Model, inputs: Any, training: bool) -> Any:
    """Call `model`, with `training` where it takes it.

    Args:
        model: A Keras model or layer, or a `tf.Module` that can be called.
        inputs: A batch of inputs, as the data gives them.
        training: Whether to call it in training mode.

    Raises:
        DataError: The inputs do not fit the model.
        TypeError: `model` cannot be called.
    """
    if not callable(model):
        raise TypeError(
            f"The model {model!r} cannot be called: give {type(model).__name__} a `__call__`, or override `forward`."
        )
    inputs = _checked(model, inputs)
    # Keras passes `training` on to layers that do not take it; a `tf.Module` must be asked.
    parameters = inspect.signature(model).parameters
    any_keyword = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_training = "training" in parameters or (isinstance(model, keras.Layer) and any_keyword)
    try:
        return model(inputs, training=training) if takes_training else model(inputs)
    except TapeloopError:
        raise
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise DataError(
            f"The model cannot be called on a batch of inputs {shapes(inputs)}: {error}\n"
            "Pass inputs that fit the model, with the batch as the first dimension."
        ) from error


def _checked(model: Model, x: Any) -> Any:
    """Return a batch of inputs, checked against what a functional or sequential model declares.

    What is known only when the step runs is checked then.
    """
    declared = getattr(model, "inputs", None)
    if not declared:
        return x
    if isinstance(x, Mapping):
        by_name = {tensor.name: tensor for tensor in declared}
        pairs = [(by_name[name], given) for name, given in x.items() if name in by_name]
    else:
        flat = tf.nest.flatten(x)
        pairs = list(zip(declared, flat)) if len(flat) == len(declared) else [(declared[0], x)]
    if not all(_fits(tensor.shape, given) for tensor, given in pairs):
        raise DataError(
            f"The inputs do not fit the model `{model.name}`: it takes {shapes(declared)}, the batch has {shapes(x)}. "
            "Batches are `(inputs, targets)` with the batch as the first dimension."
        )
    checks = [_require(model, tensor.shape, given) for tensor, given in pairs if _is_open(tensor.shape, given)]
    if not checks:
        return x
    # Tied to the inputs, so that nothing is computed of a batch that does not fit.
    with tf.control_dependencies(checks):
        return map_tensors(tf.identity, x)


def _is_open(declared: tuple[int | None, ...], value: Any) -> bool:
    """Tell whether a tensor has a length that only the running step knows, where the model declares one."""
    if not isinstance(value, tf.Tensor) or value.shape.rank != len(declared):
        return False
    return any(length is not None and given is None for length, given in zip(declared[1:], value.shape[1:]))


def _require(model: Model, declared: tuple[int | None, ...], value: tf.Tensor) -> tf.Operation:
    """Have the running step fail where a tensor does not fit."""
    wanted = tf.constant([-1 if length is None else length for length in declared])
    fits = tf.reduce_all((wanted < 0) | (tf.shape(value) == wanted))
    text = f"The inputs do not fit the model `{model.name}`: it takes {declared}, the batch has the shape"
    return require(fits, text, tf.shape(value))


def _fits(declared: tuple[int | None, ...], value: Any) -> bool:
    """Tell whether a tensor fits; Keras lets a last dimension of one be left out, or be there unasked."""
    if not tf.is_tensor(value):
        return value is None  # Keras itself knows which inputs may be left out
    if value.shape.rank is None:  # only the model can tell
        return True
    given = tuple(value.shape)
    if len(given) == len(declared) + 1 and given[-1] == 1:
        given = given[:-1]
    elif len(given) == len(declared) - 1 and declared[-1] == 1:
        given = (*given, 1)
    return len(given) == len(declared) and all(d is None or g is None or d == g for d, g in zip(declared, given))
