"""The models and the data that benchmarks share."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers


def cross_entropy() -> keras.losses.Loss:
    """Return the loss of all classifiers here."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp() -> keras.Model:
    """Build three dense layers."""
    dense = [layers.Dense(128, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((64,)), *dense, layers.Dense(10)])


def classifier(application: str, size: int = 96) -> keras.Model:
    """Nest an architecture with random weights under a ten-class head."""
    backbone = getattr(keras.applications, application)(
        input_shape=(size, size, 3), include_top=False, weights=None, pooling="avg"
    )
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, layers.Dense(10, name="head")(backbone(inputs)))


def encoder(length: int = 64, width: int = 256, depth: int = 6) -> keras.Model:
    """Build a transformer encoder with an adapter in each block."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(1000, width, name="embedding")(inputs)
    for block in range(depth):
        attended = layers.MultiHeadAttention(4, width // 4, name=f"attention_{block}")(x, x)
        x = layers.LayerNormalization(name=f"norm_{block}a")(x + attended)
        hidden = layers.Dense(4 * width, activation="gelu", name=f"up_{block}")(x)
        x = layers.LayerNormalization(name=f"norm_{block}b")(x + layers.Dense(width, name=f"down_{block}")(hidden))
        adapted = layers.Dense(16, activation="gelu", name=f"adapter_{block}a")(x)
        x = x + layers.Dense(width, name=f"adapter_{block}b")(adapted)
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.GlobalAveragePooling1D()(x)))


def images(count: int, size: int = 96) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw images and labels, as tensors: to make them of NumPy arrays costs each fit a copy, which is no step's."""
    generator = np.random.default_rng(0)
    return tf.constant(generator.normal(size=(count, size, size, 3)), tf.float32), tf.constant(
        generator.integers(0, 10, count)
    )
