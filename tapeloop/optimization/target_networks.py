"""Moving one submodel towards another: target networks, mean teachers, momentum encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tapeloop._validation import is_number
from tapeloop.errors import listed
from tapeloop.model.tree import Model, Tree, VariableInfo

Pair = tuple[VariableInfo, VariableInfo]


def paired(tree: Tree, target: Model | str, source: Model | str) -> list[Pair]:
    """Pair the variables of two submodels of one structure: weights and statistics, by path.

    If layers have other names in one than in the other, they are paired in the order of construction.

    Seeds and whole numbers are left out.

    Args:
        tree: The trainer's model, in which paths are looked up.
        target: The submodel that moves, or its path.
        source: The submodel that it moves towards, or its path.

    Raises:
        TypeError: One of them is neither a submodel nor a path.
        ValueError: A path is not one of a submodel, or the two are not of one structure.
    """
    targets, sources = _variables(tree, "target", target), _variables(tree, "source", source)
    by_path = {variable.path: variable for variable in sources}
    # A clone made by `clone_model` has the paths of its original; one made by calling a function twice has other names.
    if by_path.keys() == {variable.path for variable in targets}:
        sources = [by_path[variable.path] for variable in targets]
    shapes = [variable.shape for variable in targets], [variable.shape for variable in sources]
    if not targets or shapes[0] != shapes[1]:
        unlike = [
            f"`{t.path}` {t.shape} with `{s.path}` {s.shape}" for t, s in zip(targets, sources) if t.shape != s.shape
        ]
        raise ValueError(
            f"`follow` needs two submodels of one structure. Received: {len(targets)} variables to move and "
            f"{len(sources)} to move towards{f', of which {unlike[0]} do not fit' if unlike else ''}. Make the target "
            "as a copy, such as by `keras.models.clone_model`, and build it."
        )
    # What the two share, such as an embedding, follows itself.
    pairs = [(t, s) for t, s in zip(targets, sources) if t.variable is not s.variable]
    if not pairs:
        raise ValueError(f"`follow` was given one submodel as target and as source: {target!r}. Pass two.")
    return pairs


def checked_decay(decay: Any) -> tf.Tensor:
    """Return a decay as a scalar tensor.

    Raises:
        ValueError: It is a number outside of 0 to 1, or no scalar.
    """
    is_tensor = tf.is_tensor(decay) or isinstance(decay, (tf.Variable, keras.Variable))
    if not (0 <= decay <= 1 if is_number(decay) else is_tensor and not decay.shape.rank):
        raise ValueError(f"`decay` must be a number from 0 to 1, or a scalar tensor. Received: {decay!r}.")
    return tf.cast(tf.convert_to_tensor(decay), tf.float64)


def move(pairs: Sequence[Pair], decay: tf.Tensor) -> None:
    """Assign `decay * target + (1 - decay) * source` to each target.

    Source: Polyak averaging, as in Lillicrap et al., Continuous control with deep reinforcement learning, 2016.
    """
    for target, source in pairs:
        # In float16 a decay of 0.999 would move nothing: the step is below the resolution.
        dtype = tf.float64 if target.tf_variable.dtype == tf.float64 else tf.float32
        keep = tf.cast(decay, dtype)
        value = keep * tf.cast(target.tf_variable, dtype) + (1 - keep) * tf.cast(source.tf_variable, dtype)
        target.tf_variable.assign(tf.cast(value, target.tf_variable.dtype))


def _variables(tree: Tree, role: str, submodel: Model | str) -> list[VariableInfo]:
    if isinstance(submodel, str):
        found = next((one for one in tree.submodels if submodel in one.paths), None)
        if found is None:
            there = listed([one.path for one in tree.submodels if one.path], most=5)
            raise ValueError(f"`follow` found no submodel at the path {submodel!r}. There are {there}.")
        submodel = found.object
    if not isinstance(submodel, (keras.Layer, tf.Module)):
        raise TypeError(f"`{role}` must be a submodel or its path. Received: {submodel!r}.")
    variables = Tree.of(submodel).variables
    return [v for v in variables if not v.seed and tf.as_dtype(v.dtype).is_floating]
