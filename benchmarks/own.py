"""A user's own model as a workload: its data, loss, optimizer and policy are asked for, not guessed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.cases import Case
from benchmarks.workloads import Workload, adam


def function_of(option: str, text: str) -> Callable[..., Any]:
    """Return the function that an option names as `package.module:function`.

    Raises:
        ValueError: There is no such function.
    """
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`{option}` must be `package.module:function`. Received: {text!r} ({error}).") from error


def make(case: Case) -> Workload:
    """Build a user's own model on data for so many steps.

    Raises:
        ValueError: A function, the policy, the loss or the optimizer cannot be had, or the data is unknown or too
            little.
    """
    options = dict(case.own)
    keras.config.set_dtype_policy("mixed_bfloat16" if case.dtype == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)
    model = function_of("--model", options["model"])()
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{options['model']}` must return a Keras model. It returned {model!r}.")
    count = case.batch * case.steps
    data = _given(options["data"], count) if options.get("data") else drawn(model, count)
    if not model.built:
        model(tf.nest.map_structure(lambda part: part[:1], data[0]))
    try:
        names = {name: getattr(tl, name) for name in tl.__all__}
        policy = eval(options["policy"], {"__builtins__": {}}, names)
    except Exception as error:
        said = options["policy"]
        raise ValueError(f"`--policy` must be a policy such as `Freeze('backbone')`. Received: {said!r}.") from error
    loss = _loss(options.get("loss") or "MeanSquaredError")
    return Workload(model, data, loss, policy, optimizer=_optimizer(options.get("optimizer") or ""))


def drawn(model: keras.Model, count: int) -> tuple[Any, Any]:
    """Draw data for the inputs and outputs of a model.

    Raises:
        ValueError: It does not say what its inputs are, or of which sizes.
    """
    give = (
        "Give data: `--data package.module:function` names what returns inputs and targets for a number of examples, "
        "of the sizes and values that you train on."
    )
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"The model {model.name!r} does not say what its inputs are, as a subclassed one does not. {give}"
        )

    def draw(spec: Any) -> tf.Tensor:
        if None in spec.shape[1:]:
            raise ValueError(
                f"The model {model.name!r} has a dimension that it does not know: {spec.name!r} is of shape "
                f"{tuple(spec.shape)}. {give}"
            )
        if tf.as_dtype(spec.dtype).is_integer:
            raise ValueError(
                f"{spec.name!r} of the model {model.name!r} is of whole numbers, and which of them is unknown. {give}"
            )
        return tf.cast(tf.random.stateless_normal([count, *spec.shape[1:]], (0, 1)), spec.dtype)

    inputs, outputs = ([draw(spec) for spec in specs] for specs in (model.inputs, model.outputs))
    x, y = (part[0] if len(part) == 1 else tuple(part) for part in (inputs, outputs))
    return x, y


def _given(text: str, count: int) -> tuple[Any, Any]:
    found = function_of("--data", text)(count)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"`--data` must name what returns `(inputs, targets)`. `{text}` returned {type(found)}.")
    found = tf.nest.map_structure(tf.convert_to_tensor, found)
    lengths = {len(part) for part in tf.nest.flatten(found)}
    if len(lengths) != 1 or min(lengths) < count:
        raise ValueError(f"`{text}({count})` must return {count} examples. Received: {sorted(lengths)}.")
    return tf.nest.map_structure(lambda part: part[:count], found)


def _loss(text: str) -> Any:
    if ":" in text:
        return function_of("--loss", text)()
    found = getattr(keras.losses, text, None)
    if not (isinstance(found, type) and issubclass(found, keras.losses.Loss)):
        known = "`--loss` must be a class of `keras.losses`, such as `MeanSquaredError`, or `package.module:function`"
        raise ValueError(f"{known} that returns one. Received: {text!r}.")
    return found()


def _optimizer(text: str) -> Callable[[], keras.optimizers.Optimizer]:
    if not text:
        return adam
    if ":" in text:
        return function_of("--optimizer", text)
    try:
        keras.optimizers.get(text)
    except ValueError as error:
        said = "`--optimizer` must be the name of a Keras optimizer or `package.module:function`."
        raise ValueError(f"{said} Received: {text!r}.") from error
    return lambda: keras.optimizers.get(text)
