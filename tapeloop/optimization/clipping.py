"""Clipping gradients to a norm: one over all that an update touches, or one for each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tapeloop._validation import is_number
from tapeloop.errors import PolicyError
from tapeloop.model.selection import Selection
from tapeloop.model.tree import VariableInfo


class Clipping:
    """The norms to which gradients are clipped.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, 2013, section 3.2.
    """

    def __init__(self, norm: float | Mapping[str, float] | None) -> None:
        """Check and keep the norms.

        Args:
            norm: One norm over all that an update touches, or a norm for each of some groups, or None.

        Raises:
            TypeError: One of them is no number.
            ValueError: One of them is not above 0, or not finite.
        """
        self._norm = norm
        for value in norm.values() if isinstance(norm, Mapping) else [] if norm is None else [norm]:
            if not is_number(value):
                raise TypeError(f"`clip_norm` must be a number, or one for each of some groups. Received: {norm!r}.")
            if not 0 < value < math.inf:
                raise ValueError(f"`clip_norm` must be above 0 and finite. Received: {norm!r}.")

    def require_groups(self, selection: Selection, *, changing: bool) -> None:
        """Check that the norms are for groups of the selection, unless the policy is changing.

        Raises:
            PolicyError: They are not.
        """
        named = set(self._norm) if isinstance(self._norm, Mapping) else set()
        # A policy that changes may have the groups later.
        if not changing and not named <= set(selection.groups):
            raise PolicyError(
                f"`clip_norm` is for {sorted(named)}, but the groups are {sorted(selection.groups)}. "
                "Name some of these."
            )

    def clip(
        self, selection: Selection, gradients: Sequence[tuple[tf.Tensor, VariableInfo]]
    ) -> list[tuple[tf.Tensor, VariableInfo]]:
        """Return the gradients of one update, clipped."""
        if self._norm is None:
            return list(gradients)
        if not isinstance(self._norm, Mapping):
            return clip_by_global_norm(gradients, self._norm)
        # A group without a norm of its own is not clipped.
        by_group: dict[str, list[tuple[tf.Tensor, VariableInfo]]] = {}
        for gradient, variable in gradients:
            by_group.setdefault(selection.group_of[variable], []).append((gradient, variable))
        return [
            pair
            for group, pairs in by_group.items()
            for pair in (clip_by_global_norm(pairs, self._norm[group]) if group in self._norm else pairs)
        ]


def clip_by_global_norm(
    pairs: Sequence[tuple[tf.Tensor, VariableInfo]], norm: Any
) -> list[tuple[tf.Tensor, VariableInfo]]:
    """Return gradients scaled so that the norm over all of them is `norm` at most, by the formula of Keras' optimizers.

    What overwrites its variable is no gradient, and is neither counted nor scaled.
    """
    counted = [gradient for gradient, variable in pairs if not variable.is_overwritten]
    if not counted:
        return list(pairs)
    # Squares of float16 overflow at 256.
    dtype = tf.float64 if any(gradient.dtype == tf.float64 for gradient in counted) else tf.float32
    found = tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(tf.cast(gradient, dtype))) for gradient in counted]))
    scale = norm * tf.minimum(1.0 / found, 1.0 / norm) + (found - found)  # NaN, if the norm is not finite
    return [
        (gradient if variable.is_overwritten else gradient * tf.cast(scale, gradient.dtype), variable)
        for gradient, variable in pairs
    ]
