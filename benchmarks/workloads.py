"""The models and the data that benchmarks share, and what a selection means for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.cases import UNFREEZE, Group

layers = keras.layers

APPLICATIONS = {"mobilenetv2": "MobileNetV2", "resnet50": "ResNet50", "efficientnetv2b0": "EfficientNetV2B0"}
TOKENS = 1000  # in the vocabulary of the models of text
NOISE = 64  # numbers that a generator makes an image of


@dataclass(frozen=True)
class Workload:
    """A model, what it is trained on, and what trains.

    Attributes:
        model: The model, or a mapping with a generator and a discriminator.
        data: Inputs and targets, as tensors with the examples first; images alone for a GAN.
        loss: The loss; None for a GAN, which has its own.
        policy: What trains.
        frozen_first: Where all that trains comes after a frozen backbone: the model, its backbone called in inference
            mode. Keras' functional models have no other way to say that.
    """

    model: Any
    data: Any
    loss: keras.losses.Loss | None
    policy: tl.VariablePolicy
    frozen_first: Callable[[Any], Any] | None = None


def make(group: Group, policy: str = "") -> Workload:
    """Build what a group measures.

    Args:
        group: The group.
        policy: For a user's own model: a policy in the names of tapeloop, such as `Freeze("backbone")`.
    """
    keras.config.set_dtype_policy("mixed_bfloat16" if group.dtype == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)
    count, adapters = group.batch * group.steps, group.selection == "adapters"
    if group.model:
        return _own(group, policy, count)
    if group.workload == "gan":
        (real, _), networks = images(count, group.size), gan(group.size)
        return Workload(networks, tf.tanh(real), None, tl.Groups({name: name for name in networks}))
    if group.workload in APPLICATIONS:
        model = classifier(APPLICATIONS[group.workload], group.size)
        data, frozen_first = images(count, group.size), _frozen_first(model) if group.selection == "head" else None
        return Workload(model, data, cross_entropy(), policy_of(group), frozen_first)
    if group.workload == "mlp":
        model, data = mlp(int(128 * group.width)), vectors(count)
    elif group.workload == "vit":
        model, data = vit(group.size, adapters), images(count, group.size)
    elif group.workload == "lstm":
        model, data = lstm(group.size), texts(count, group.size)
    else:
        model, data = encoder(group.size, adapters=adapters), texts(count, group.size)
    if group.selection == "lora":
        adapt(model)
    return Workload(model, data, cross_entropy(), policy_of(group))


def policy_of(group: Group) -> tl.VariablePolicy:
    """Return the policy that trains a selection of a workload."""
    first, last, stages = {
        "mlp": (["dense_0"], ["dense_1"], []),
        "mobilenetv2": (["backbone/*Conv1", "backbone/expanded_conv*"], [], MOBILENET_STAGES),
        "resnet50": (["backbone/conv1_*"], ["backbone/conv5_block3*"], []),
        "efficientnetv2b0": (["backbone/stem*"], ["backbone/block6h*", "backbone/top*"], []),
        "vit": (["patches", "*_0*"], ["*_5*"], []),
        "encoder": (["embedding", "*_0*"], ["*_5*"], []),
        "lstm": (["embedding"], ["lstm_1"], []),
    }[group.workload]
    if group.workload == "mobilenetv2" and group.selection in UNFREEZE:
        depth = UNFREEZE.index(group.selection)
        return tl.TrainOnly("head", *(glob for stage in stages[:depth] for glob in stage))
    last = last or stages[0]
    norms = tl.of_type(layers.BatchNormalization) | tl.of_type(layers.LayerNormalization)
    policies = {
        "all": tl.TrainAll(),
        "head": tl.TrainOnly("head"),
        "last_block": tl.TrainOnly(*last, "head"),
        "first_block": tl.TrainOnly(*first),
        "biases": tl.TrainOnly(tl.named("bias") | tl.named("beta")),
        "norm": tl.TrainOnly(norms),
        "adapters": tl.TrainOnly("adapter*", "head"),
        "lora": tl.TrainOnly(tl.named("lora_kernel_a", "lora_kernel_b"), "head"),
        "middle": tl.TrainOnly(*first, "head"),
    }
    return policies[group.selection]


# From the output back to the input: what `unfreeze-2` trains beside the head, what `unfreeze-3` adds, and so on.
MOBILENET_STAGES = [
    ["backbone/block_16_*", "backbone/Conv_1*"],
    ["backbone/block_1[345]_*"],
    ["backbone/block_1[012]_*"],
    ["backbone/block_[6789]_*"],
    ["backbone/block_[345]_*"],
    ["backbone/block_[12]_*"],
]


def cross_entropy() -> keras.losses.Loss:
    """Return the loss of all classifiers here."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(width: int = 128) -> keras.Model:
    """Build three dense layers."""
    dense = [layers.Dense(width, activation="relu", name=f"dense_{number}") for number in range(2)]
    return keras.Sequential([keras.Input((64,)), *dense, layers.Dense(10, name="head", dtype="float32")])


def classifier(application: str, size: int = 96) -> keras.Model:
    """Nest an architecture with random weights under a ten-class head."""
    backbone = getattr(keras.applications, application)(
        input_shape=(size, size, 3), include_top=False, weights=None, pooling="avg"
    )
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, layers.Dense(10, name="head", dtype="float32")(backbone(inputs)))


def _frozen_first(model: keras.Model) -> Callable[[Any], Any]:
    backbone, head = model.get_layer("backbone"), model.get_layer("head")
    return lambda x, training: head(backbone(x, training=False), training=training)


def blocks(x: Any, width: int, depth: int, adapters: bool) -> Any:
    """Add the blocks of a transformer encoder, with an adapter in each (Houlsby et al., 2019) or without."""
    for block in range(depth):
        attended = layers.MultiHeadAttention(4, width // 4, name=f"attention_{block}")(x, x)
        x = layers.LayerNormalization(name=f"norm_{block}a")(x + attended)
        hidden = layers.Dense(4 * width, activation="gelu", name=f"up_{block}")(x)
        x = layers.LayerNormalization(name=f"norm_{block}b")(x + layers.Dense(width, name=f"down_{block}")(hidden))
        if adapters:
            adapted = layers.Dense(16, activation="gelu", name=f"adapter_{block}a")(x)
            x = x + layers.Dense(width, name=f"adapter_{block}b")(adapted)
    return layers.Dense(10, name="head", dtype="float32")(layers.GlobalAveragePooling1D()(x))


def encoder(length: int = 64, width: int = 256, depth: int = 6, adapters: bool = True) -> keras.Model:
    """Build a transformer encoder of tokens, like a BERT without its pretraining."""
    inputs = keras.Input((length,), dtype="int32")
    return keras.Model(
        inputs, blocks(layers.Embedding(TOKENS, width, name="embedding")(inputs), width, depth, adapters)
    )


def vit(size: int, adapters: bool, width: int = 192, depth: int = 6) -> keras.Model:
    """Build a vision transformer on patches of 8 by 8 pixels (Dosovitskiy et al., 2021, without position codes)."""
    inputs = keras.Input((size, size, 3))
    patches = layers.Conv2D(width, 8, strides=8, name="patches")(inputs)
    return keras.Model(inputs, blocks(layers.Reshape((-1, width))(patches), width, depth, adapters))


def adapt(model: keras.Model, rank: int = 8) -> None:
    """Give the queries and values of all attention low-rank adapters (Hu et al., 2021, LoRA), by Keras' own means."""
    for layer in model.layers:
        if isinstance(layer, layers.MultiHeadAttention):
            layer.query_dense.enable_lora(rank)
            layer.value_dense.enable_lora(rank)


def lstm(length: int, width: int = 128) -> keras.Model:
    """Build two recurrent layers over an embedding."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(TOKENS, width, name="embedding")(inputs)
    x = layers.LSTM(width, return_sequences=True, name="lstm_0")(x)
    return keras.Model(inputs, layers.Dense(10, name="head", dtype="float32")(layers.LSTM(width, name="lstm_1")(x)))


def gan(size: int) -> dict[str, keras.Model]:
    """Build a generator and a discriminator of images (after Radford et al., 2016)."""
    small = size // 4
    generator = keras.Sequential(
        [
            keras.Input((NOISE,)),
            layers.Dense(small * small * 64),
            layers.Reshape((small, small, 64)),
            layers.Conv2DTranspose(32, 4, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(3, 4, strides=2, padding="same", activation="tanh", dtype="float32"),
        ]
    )
    convolutions = [layers.Conv2D(width, 4, strides=2, padding="same", activation="relu") for width in (32, 64)]
    discriminator = keras.Sequential(
        [keras.Input((size, size, 3)), *convolutions, layers.Flatten(), layers.Dense(1, dtype="float32")]
    )
    return {"generator": generator, "discriminator": discriminator}


def images(count: int, size: int = 96) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw images and labels, as tensors: to make them of NumPy arrays costs each fit a copy, which is no step's."""
    return _drawn((count, size, size, 3), count)


def vectors(count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw vectors and labels."""
    return _drawn((count, 64), count)


def texts(count: int, length: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw sequences of tokens, and labels."""
    return _whole((count, length), TOKENS, tf.int32), _whole((count,), 10)


# Drawn by TensorFlow: what NumPy draws is copied into its memory or not, by where it happens to lie.
def _drawn(shape: tuple[int, ...], count: int) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.random.stateless_normal(shape, (0, 1)), _whole((count,), 10)


def _whole(shape: Sequence[int], below: int, dtype: tf.DType = tf.int64) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, (0, 2), 0, below, dtype)


def _own(group: Group, policy: str, count: int) -> Workload:
    """Build a user's own model, with data drawn for its inputs and outputs.

    Raises:
        ValueError: The function or the policy cannot be had, or the model says nothing of its inputs.
    """
    module, _, name = group.model.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`--model` must be `package.module:function`. Received: {group.model!r} ({error})."
        ) from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise ValueError(f"`{group.model}` must return a functional or sequential Keras model. It returned {model!r}.")
    try:
        chosen = eval(policy, {"__builtins__": {}}, {name: getattr(tl, name) for name in tl.__all__})
    except Exception as error:
        raise ValueError(f"`--policy` must be a policy such as `Freeze('backbone')`. Received: {policy!r}.") from error

    def draw(spec: Any) -> tf.Tensor:
        shape = [count, *(length or 1 for length in spec.shape[1:])]
        whole = tf.as_dtype(spec.dtype).is_integer
        return tf.cast(_whole(shape, 2), spec.dtype) if whole else tf.random.stateless_normal(shape, (0, 1))

    inputs, outputs = ([draw(spec) for spec in specs] for specs in (model.inputs, model.outputs))
    data = tuple(part[0] if len(part) == 1 else tuple(part) for part in (inputs, outputs))
    return Workload(model, data, keras.losses.MeanSquaredError(), chosen)
