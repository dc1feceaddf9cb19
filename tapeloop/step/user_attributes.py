"""What the user keeps among the trainer's own attributes: variables, metrics, models, and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tapeloop.model.tree import Model, Tree, raw
from tapeloop.step.context import StepContext


class UserAttributes:
    """Finds what the user keeps among the attributes of a trainer."""

    def __init__(self, attributes: Mapping[str, Any], model: Model) -> None:
        """Keep the attributes of a trainer, which go on changing, and its model, which is left out of the answers."""
        self._attributes = attributes
        self._model = model

    def metrics(self) -> list[keras.metrics.Metric]:
        """Return the metrics, through lists, tuples and mappings."""
        return self._found((keras.metrics.Metric,))

    def variables(self) -> list[tf.Variable]:
        """Return the counters, the variables of metrics, and the states of random generators."""
        kinds = keras.metrics.Metric, tf.random.Generator, keras.random.SeedGenerator, tf.Variable, keras.Variable
        found: list[Any] = []
        for value in self._found(kinds):
            if isinstance(value, keras.metrics.Metric):
                found += value.variables
            else:
                found.append(value.state if hasattr(value, "state") else value)
        return [raw(variable) for variable in found]

    def all_variables(self) -> list[tf.Variable]:
        """Return `variables()`, and the variables of models and layers beside the trainer's model."""
        # A target network, a second model: what a step moves there is rolled back too.
        beside = [part for part in self._found((keras.Layer, tf.Module)) if part is not self._model]
        return [*self.variables(), *(v.tf_variable for part in beside for v in Tree.of(part).variables)]

    def warn_stale(self, context: StepContext) -> None:
        """Warn of numbers among the attributes that have changed since a step was traced with them."""
        now = self._attributes
        changed = [name for name, value in context.numbers.items() if name in now and not _is_same(now[name], value)]
        for name in changed:
            # Taken out as it is said: once is enough, and only a new trace reads the number again.
            warnings.warn(
                f"`self.{name}` was {context.numbers.pop(name)!r} when the {context.kind} step was traced, and is "
                f"{now[name]!r} now: the compiled step goes on with the former. Make it a variable, `self.{name} = "
                f"tf.Variable({now[name]!r}, trainable=False)`, and `assign` to it.",
                stacklevel=2,
            )

    def _found(self, kinds: tuple[type, ...]) -> list[Any]:
        return [value for attribute in self._attributes.values() for value in _inside(attribute, kinds)]


def _inside(value: Any, kinds: tuple[type, ...]) -> list[Any]:
    """List the objects of some kinds in an attribute, through lists, tuples and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _inside(item, kinds)]
    return [value] if isinstance(value, kinds) else []


def _is_same(one: Any, other: Any) -> bool:
    # NaN is not equal to itself, and has not changed.
    return one is other or bool(one == other) or (one != one and other != other)
