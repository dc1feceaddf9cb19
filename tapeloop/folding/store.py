"""Folded values: variables with what is computed of frozen weights, anew when these may have moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tapeloop._backend.fingerprint import fingerprint
from tapeloop.step.plan import Interventions

# Traces that keep kernels, each of which takes as much memory as frozen weights: to train, to evaluate, to predict, and
# one more. Images of many sizes are as many traces.
MOST_KEEPING = 4


@dataclass(eq=False)
class FoldedValue:
    """A value that is computed of frozen weights.

    Attributes:
        variable: What holds it.
        sources: What it is computed of, which must live as long as the value: its key has their `id`s.
        weights: The fingerprint of the weights of the step that computed it last.
    """

    variable: tf.Variable
    sources: tuple[Any, ...]
    weights: bytes = b""


@dataclass
class FoldedValues:
    """The folded values of a trainer. Steps that compute the same of the same weights share them.

    Attributes:
        have_moved: Whether weights moved after a step had kept kernels of them: from then on, no step keeps any.
        keeping: What belongs to steps that keep kernels, each a copy.
    """

    have_moved: bool = False
    keeping: weakref.WeakSet[FoldedPart] = field(default_factory=weakref.WeakSet)
    _values: weakref.WeakValueDictionary[Hashable, FoldedValue] = field(default_factory=weakref.WeakValueDictionary)

    @property
    def may_keep_filters(self) -> bool:
        """Whether another step may keep kernels."""
        return not self.have_moved and len(self.keeping) < MOST_KEEPING

    def known(self) -> list[FoldedValue]:
        """Return the values that some step uses."""
        return list(self._values.values())

    def made(
        self, keys: Sequence[Hashable], sources: Sequence[tuple[Any, ...]], compute: Callable[[], Sequence[tf.Tensor]]
    ) -> list[FoldedValue]:
        """Return the values with some keys, up to date.

        Args:
            keys: What tells the values apart.
            sources: What each is computed of.
            compute: Computes all of them.
        """
        made = []
        for key, behind, computed in zip(keys, sources, compute()):
            value = self._values.get(key)
            if value is None:
                variable = tf.Variable(computed, trainable=False, name="folded")
                value = self._values[key] = FoldedValue(variable, behind)
            else:
                value.variable.assign(computed)
            made.append(value)
        return made


class FoldedPart:
    """The folded values of one step, kept up to date with the weights.

    Attributes:
        keeps_filters: Whether convolutions keep kernels as they are when the step runs first.
    """

    def __init__(
        self,
        values: Sequence[FoldedValue],
        weights: Sequence[tf.Variable],
        compute: Callable[[], Sequence[tf.Tensor]],
        interventions: Interventions,
        keeps_filters: bool,
    ) -> None:
        """Keep the values, which are up to date now.

        Args:
            values: The values.
            weights: The frozen weights that they are computed of.
            compute: Computes them.
            interventions: Tells when weights may have moved.
            keeps_filters: Whether convolutions of the step keep kernels as they are when it runs first.
        """
        self.keeps_filters = keeps_filters
        self._values = values
        self._weights = weights
        self._compute = compute
        self._interventions = interventions
        self._seen = interventions.count
        self._built_of = fingerprint(weights)
        self._has_run = False
        for value in values:
            value.weights = self._built_of

    def has_current_kernels(self) -> bool:
        """Tell whether the kernels that the step keeps are those that it was built with; call it after each run."""
        # The first run alone copies kernels, and data may run code of the user's meanwhile.
        is_first, self._has_run = not self._has_run, True
        return not (is_first and self.keeps_filters) or fingerprint(self._weights) == self._built_of

    def refresh(self) -> bool:
        """Compute the values anew if the weights have moved since they were computed.

        Returns:
            Whether the step may run. It may not if it keeps kernels, and weights have moved.
        """
        if self._seen == self._interventions.count:
            return True
        self._seen = self._interventions.count
        found = fingerprint(self._weights)
        if self.keeps_filters and found != self._built_of:
            return False
        # Another step that shares a value may have computed it of weights that have been put back since.
        if any(value.weights != found for value in self._values):
            for value, computed in zip(self._values, self._compute()):
                value.variable.assign(computed)
                value.weights = found
        return True
