"""Weights of examples by the class of their target."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tapeloop.data.batch import shapes
from tapeloop.errors import DataError


class ClassWeights(NamedTuple):
    """Weights of examples by the class of their target.

    Attributes:
        classes: The classes, `[n]`.
        weights: The weight of each class, `[n]`; examples of other classes have the weight 1.
    """

    classes: tf.Tensor
    weights: tf.Tensor


def class_weights_of(weights: Mapping[int, float]) -> ClassWeights:
    """Check a user's weights of classes, and return them as tensors.

    Raises:
        TypeError: `weights` is no mapping from whole numbers to numbers.
        ValueError: `weights` is empty.
    """
    if not isinstance(weights, Mapping) or not all(
        isinstance(label, numbers.Real) and label == int(label) and isinstance(weight, numbers.Real)
        for label, weight in weights.items()
    ):
        raise TypeError(
            "`class_weight` must be a mapping from classes, which are whole numbers, to weights. "
            f"Received: {weights!r}."
        )
    if not weights:
        raise ValueError("`class_weight` is empty. Name a class with its weight, or leave it out.")
    classes, values = map(int, weights), weights.values()
    return ClassWeights(tf.constant(list(classes), tf.int64), tf.constant(list(values), keras.config.floatx()))


def with_class_weights(batch: Any, class_weights: ClassWeights | None) -> Any:
    """Return a batch `(inputs, targets)` with the weights of its examples; without class weights, the batch itself.

    Raises:
        DataError: The batch has sample weights already, or its targets are not one class for each example.
    """
    if class_weights is None:
        return batch
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    if sample_weight is not None:
        raise DataError("`class_weight` was given, and the data has sample weights already: leave one of them out.")
    if not isinstance(y, tf.Tensor) or y.shape.rank not in (1, 2):
        raise DataError(
            "`class_weight` needs one target for each example: its class, of the shape `[examples]` or "
            f"`[examples, 1]`, or its one-hot vector. The targets are {shapes(y)}."
        )
    # The batch keeps the targets as they were given: only the class is read off them.
    targets = y
    if y.shape.rank == 2:
        y = tf.squeeze(y, 1) if y.shape[1] == 1 else tf.argmax(y, 1)
    # Labels may come in float, where a cast alone would turn 0.9999 into class 0.
    label = tf.cast(tf.round(y) if y.dtype.is_floating else y, tf.int64)
    # A table of all classes would need as many rows as the largest label: labels may be large, or negative.
    matches = tf.equal(label[:, tf.newaxis], class_weights.classes)
    weight = tf.gather(class_weights.weights, tf.argmax(tf.cast(matches, tf.int32), 1))
    return x, targets, tf.where(tf.reduce_any(matches, 1), weight, 1.0)
