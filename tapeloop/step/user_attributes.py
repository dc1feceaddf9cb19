"""What the user keeps among the trainer's own attributes: variables, metrics, models, and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tapeloop.model.tree import Model, Tree, raw
from tapeloop.step.context import StepContext


class UserAttributes:
    """Finds what the user keeps among the attributes of a trainer."""

    def __init__(self, attributes: Mapping[str, Any], model: Model, kind: type) -> None:
        """Keep the attributes of a trainer, which go on changing.

        Args:
            attributes: The attributes.
            model: Its model, which is left out of the answers.
            kind: Its class, whose attributes stand for those that it has not itself.
        """
        self._attributes = attributes
        self._kind = kind
        self._model = model

    def metrics(self) -> list[keras.metrics.Metric]:
        """Return the metrics, through lists, tuples and mappings."""
        return list(self.named_metrics().values())

    def named_metrics(self) -> dict[str, keras.metrics.Metric]:
        """Return the metrics by the names of the attributes that hold them: `seen`, `seen/0`, `seen/key`."""
        return self._found((keras.metrics.Metric,))

    def variables(self) -> list[tf.Variable]:
        """Return the counters, the variables of metrics, and the states of random generators."""
        of_metrics = [raw(variable) for metric in self.metrics() for variable in metric.variables]
        return [*self._own().values(), *of_metrics]

    def all_variables(self) -> list[tf.Variable]:
        """Return `variables()`, and the variables of models and layers beside the trainer's model."""
        # A target network, a second model: what a step moves there is rolled back too.
        return [*self.variables(), *self._beside().values()]

    def named_variables(self) -> dict[str, tf.Variable]:
        """Return what `all_variables` returns but for the metrics, by the names of the attributes that hold it."""
        mine = {id(variable.tf_variable) for variable in Tree.of(self._model).variables}
        # A part of the model may be an attribute too, for short.
        return {name: v for name, v in {**self._own(), **self._beside()}.items() if id(v) not in mine}

    def unbuilt(self) -> list[str]:
        """Return the names of the attributes that hold a layer or model without its variables."""
        parts = {name: part for name, part in self._found((keras.Layer,)).items() if part is not self._model}
        return [name for name, part in parts.items() if not all(layer.object.built for layer in Tree.of(part).layers)]

    def _own(self) -> dict[str, tf.Variable]:
        kinds = tf.random.Generator, keras.random.SeedGenerator, tf.Variable, keras.Variable
        return {name: raw(getattr(found, "state", found)) for name, found in self._found(kinds).items()}

    def _beside(self) -> dict[str, tf.Variable]:
        beside = {name: p for name, p in self._found((keras.Layer, tf.Module)).items() if p is not self._model}
        return {f"{name}/{v.path}": v.tf_variable for name, part in beside.items() for v in Tree.of(part).variables}

    def warn_stale(self, context: StepContext) -> None:
        """Warn of numbers among the attributes that have changed since a step was traced with them."""
        now = {
            name: self._attributes.get(name, getattr(self._kind, name, value))
            for name, value in context.numbers.items()
        }
        changed = [name for name, value in context.numbers.items() if not _is_same(now[name], value)]
        for name in changed:
            # Taken out as it is said: once is enough, and only a new trace reads the number again.
            warnings.warn(
                f"`self.{name}` was {context.numbers.pop(name)!r} when the {context.kind} step was traced, and is "
                f"{now[name]!r} now: the compiled step goes on with the former. Make it a variable, `self.{name} = "
                f"tf.Variable({now[name]!r}, trainable=False)`, and `assign` to it.",
                stacklevel=2,
            )

    def _found(self, kinds: tuple[type, ...]) -> dict[str, Any]:
        return {at: found for name, value in self._attributes.items() for at, found in _inside(name, value, kinds)}


def _inside(name: str, value: Any, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the objects of some kinds in an attribute, through lists, tuples and mappings, each with its name."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(f"{name}/{key}", item, kinds)
    elif isinstance(value, kinds):
        yield name, value


def _is_same(one: Any, other: Any) -> bool:
    # NaN is not equal to itself, and has not changed.
    return one is other or bool(one == other) or (one != one and other != other)
