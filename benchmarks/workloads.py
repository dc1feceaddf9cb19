"""The models and the data that benchmarks share, and what a selection means for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.cases import TRANSFORMERS, UNFREEZE, Case, Transformer

layers = keras.layers

# By workload: the name in `keras.applications`, what comes first, and what comes last before the head.
APPLICATIONS = {
    "mobilenetv2": ("MobileNetV2", ["*Conv1", "expanded_conv*"], ["block_16_*", "Conv_1*"]),
    "resnet50": ("ResNet50", ["conv1_*"], ["conv5_block3*"]),
    "efficientnetv2b0": ("EfficientNetV2B0", ["stem*"], ["block6h*", "top*"]),
    "efficientnetv2s": ("EfficientNetV2S", ["stem*"], ["block6o*", "top*"]),
}
# What `unfreeze-3` trains of a MobileNetV2 beside the stage before, what `unfreeze-4` adds, and so on.
STAGES = ["block_1[345]_*", "block_1[012]_*", "block_[6789]_*", "block_[345]_*", "block_[12]_*"]
NOISE = 64  # numbers that a generator makes an image of


def adam() -> keras.optimizers.Optimizer:
    """Return the optimizer of all workloads here."""
    return keras.optimizers.Adam(1e-4)


def cross_entropy() -> keras.losses.Loss:
    """Return the loss of all classifiers here."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclass(frozen=True)
class Workload:
    """A model, what it is trained on, and what trains."""

    model: Any  # or a mapping with a generator and a discriminator
    data: Any  # inputs and targets, as tensors with the examples first; images alone for a GAN
    loss: keras.losses.Loss | None  # a GAN has its own
    policy: tl.VariablePolicy
    # Where all that trains comes after a frozen backbone: the model, its backbone called in inference mode. Keras'
    # functional models have no other way to say that.
    frozen_first: Callable[[Any], Any] | None = None
    optimizer: Callable[[], keras.optimizers.Optimizer] = adam


def make(case: Case) -> Workload:
    """Build what a case measures, on the data of one long round."""
    keras.config.set_dtype_policy("mixed_bfloat16" if case.dtype == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)
    count, name = case.batch * case.steps, case.workload
    if name == "gan":
        (real, _), networks = images(count, case.size), gan(case.size)
        return Workload(networks, tf.tanh(real), None, tl.Groups({name: name for name in networks}))
    frozen_first = None
    if name in APPLICATIONS or name == "resnet50-blocks":
        model, data = classifier(case), images(count, case.size)
        frozen_first = _frozen_first(model) if case.selection == "head" else None
    elif name == "mlp":
        model, data = mlp(int(128 * case.width)), _drawn((count, 64), count)
    elif name == "unet":
        model = unet(case.size, max(8, int(64 * case.scale)))
        data = images(count, case.size)[0], _whole((count, case.size, case.size), 10)
    elif name == "lstm":
        model, data = lstm(case.size), texts(count, case.size, 1000)
    else:
        of = Transformer.of(case)
        model = transformer(of, case.size, case.selection == "adapters")
        data = texts(count, case.size, of.vocabulary, of.is_causal) if of.vocabulary else images(count, case.size)
        if case.selection == "lora":
            adapt(model)
    return Workload(model, data, cross_entropy(), policy_of(case), frozen_first)


def policy_of(case: Case) -> tl.VariablePolicy:
    """Return the policy that trains a selection of a workload."""
    first, last = _ends(case)
    if case.selection in UNFREEZE[1:]:
        more = STAGES[: UNFREEZE.index(case.selection) - 1]
        return tl.TrainOnly("head", *last, *(f"backbone/{glob}" for glob in more))
    policies = {
        "all": tl.TrainAll(),
        "head": tl.TrainOnly("head"),
        "last_block": tl.TrainOnly(*last, "head"),
        "first_block": tl.TrainOnly(*first),
        "biases": tl.TrainOnly(tl.named("bias") | tl.named("beta")),
        "norm": tl.TrainOnly(tl.of_type(layers.BatchNormalization) | tl.of_type(layers.LayerNormalization)),
        "adapters": tl.TrainOnly("**/adapter*", "head"),
        "lora": tl.TrainOnly(tl.named("lora_kernel_a", "lora_kernel_b"), "head"),
        "middle": tl.TrainOnly(*first, "head"),
    }
    return policies[case.selection]


def _ends(case: Case) -> tuple[list[str], list[str]]:
    """Return globs of what comes first in a workload, and of what comes last before its head."""
    if case.workload in APPLICATIONS:
        first, last = ([f"backbone/{glob}" for glob in globs] for globs in APPLICATIONS[case.workload][1:])
        return first, last
    if case.workload in TRANSFORMERS:
        of = Transformer.of(case)
        return ["embedding" if of.vocabulary else "patches", "block_0"], [f"block_{of.depth - 1}"]
    return {
        "mlp": (["dense_0"], ["dense_1"]),
        "lstm": (["embedding"], ["lstm_1"]),
        "unet": (["down_0_*"], ["up_0_*"]),
        "resnet50-blocks": (["backbone/block0_0"], ["backbone/block3_2"]),
    }[case.workload]


def mlp(width: int = 128) -> keras.Model:
    """Build three dense layers."""
    dense = [layers.Dense(width, activation="relu", name=f"dense_{number}") for number in range(2)]
    return keras.Sequential([keras.Input((64,)), *dense, layers.Dense(10, name="head", dtype="float32")])


def classifier(case: Case) -> keras.Model:
    """Nest an architecture with random weights under a ten-class head."""
    shape = (case.size, case.size, 3)
    if case.workload == "resnet50-blocks":
        backbone = resnet_of_blocks(shape)
    else:
        application = getattr(keras.applications, APPLICATIONS[case.workload][0])
        backbone = application(input_shape=shape, include_top=False, weights=None, pooling="avg")
    backbone.name = "backbone"
    inputs = keras.Input(shape)
    return keras.Model(inputs, layers.Dense(10, name="head", dtype="float32")(backbone(inputs)))


def resnet_of_blocks(shape: tuple[int, ...]) -> keras.Model:
    """Build a ResNet50 whose blocks are nested models, so that they can be named (He et al., 2015, table 1)."""

    def convolved(x: Any, width: int, kernel: int, stride: int) -> Any:
        return layers.BatchNormalization()(layers.Conv2D(width, kernel, strides=stride, padding="same")(x))

    def block(shape: tuple[int, ...], filters: int, stride: int, name: str) -> keras.Model:
        inputs = keras.Input(shape)
        x = layers.ReLU()(convolved(inputs, filters, 1, stride))
        x = convolved(layers.ReLU()(convolved(x, filters, 3, 1)), 4 * filters, 1, 1)
        is_same = stride == 1 and shape[-1] == 4 * filters
        shortcut = inputs if is_same else convolved(inputs, 4 * filters, 1, stride)
        return keras.Model(inputs, layers.ReLU()(x + shortcut), name=name)

    inputs = keras.Input(shape)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(layers.ReLU()(convolved(inputs, 64, 7, 2)))
    for stage, (filters, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for number in range(count):
            x = block(x.shape[1:], filters, 2 if stage and not number else 1, f"block{stage}_{number}")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def _frozen_first(model: keras.Model) -> Callable[[Any], Any]:
    backbone, head = model.get_layer("backbone"), model.get_layer("head")
    return lambda x, training: head(backbone(x, training=False), training=training)


class Positions(layers.Layer):
    """Adds a vector of its own to each token."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Make the vectors."""
        self.vectors = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, x: Any) -> Any:
        """Add them."""
        return x + keras.ops.cast(self.vectors, x.dtype)


def transformer(of: Transformer, size: int, adapters: bool = False) -> keras.Model:
    """Build a transformer, each block of it a model of its own, with an adapter in each or without.

    It is like a BERT, a vision transformer (Dosovitskiy et al., 2021) or a GPT-2 without what they have learnt.
    """
    if of.vocabulary:
        inputs = keras.Input((size,), dtype="int32")
        x = layers.Embedding(of.vocabulary, of.width, name="embedding")(inputs)
    else:
        inputs = keras.Input((size, size, 3))
        x = layers.Conv2D(of.width, of.patch, strides=of.patch, name="patches")(inputs)
        x = layers.Reshape((-1, of.width))(x)
    x = Positions(name="positions")(x) if of.positions else x
    for number in range(of.depth):
        x = _block(of, x.shape[1:], adapters, f"block_{number}")(x)
    x = layers.LayerNormalization(name="norm")(x) if of.is_first_normed else x
    if of.is_causal:
        return keras.Model(inputs, layers.Dense(of.vocabulary, name="head", dtype="float32")(x))
    return keras.Model(inputs, layers.Dense(10, name="head", dtype="float32")(layers.GlobalAveragePooling1D()(x)))


def _block(of: Transformer, shape: tuple[int, ...], adapters: bool, name: str) -> keras.Model:
    """Build a block: attention, then two dense layers, and what adapters come after them (Houlsby et al., 2019)."""
    attention = layers.MultiHeadAttention(of.heads, of.width // of.heads, name="attention")
    norms = [layers.LayerNormalization(name=f"norm_{letter}") for letter in "ab"]
    up, down = layers.Dense(4 * of.width, activation="gelu", name="up"), layers.Dense(of.width, name="down")
    x = inputs = keras.Input(shape)
    if of.is_first_normed:
        normed = norms[0](x)
        x = x + attention(normed, normed, use_causal_mask=of.is_causal)
        x = x + down(up(norms[1](x)))
    else:
        x = norms[0](x + attention(x, x, use_causal_mask=of.is_causal))
        x = norms[1](x + down(up(x)))
    if adapters:
        adapted = layers.Dense(16, activation="gelu", name="adapter_a")(x)
        x = x + layers.Dense(of.width, name="adapter_b")(adapted)
    return keras.Model(inputs, x, name=name)


def adapt(model: keras.Model, rank: int = 8) -> None:
    """Give the queries and values of all attention low-rank adapters (Hu et al., 2021, LoRA), by Keras' own means."""
    for block in model.layers:
        if isinstance(block, keras.Model):
            attention = block.get_layer("attention")
            attention.query_dense.enable_lora(rank)
            attention.value_dense.enable_lora(rank)


def unet(size: int, width: int, depth: int = 4) -> keras.Model:
    """Build a U-Net of ten classes, with batch normalization (Ronneberger et al., 2015)."""

    def convolved(x: Any, width: int, name: str) -> Any:
        for number in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"{name}_{number}")(x)
            x = layers.ReLU()(layers.BatchNormalization(name=f"{name}_norm_{number}")(x))
        return x

    x = inputs = keras.Input((size, size, 3))
    kept = []
    for level in range(depth):
        x = convolved(x, width * 2**level, f"down_{level}")
        kept.append(x)
        x = layers.MaxPooling2D()(x)
    x = convolved(x, width * 2**depth, "middle")
    for level in reversed(range(depth)):
        x = layers.Conv2DTranspose(width * 2**level, 2, strides=2, name=f"up_{level}_grow")(x)
        x = convolved(layers.Concatenate()([kept[level], x]), width * 2**level, f"up_{level}")
    return keras.Model(inputs, layers.Conv2D(10, 1, name="head", dtype="float32")(x))


def lstm(length: int, width: int = 128) -> keras.Model:
    """Build two recurrent layers over an embedding."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(1000, width, name="embedding")(inputs)
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


def images(count: int, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw images and labels, as tensors: to make them of NumPy arrays costs each fit a copy, which is no step's."""
    return _drawn((count, size, size, 3), count)


def texts(count: int, length: int, vocabulary: int, is_causal: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw sequences of tokens, and a label for each, or for each token."""
    labels = _whole((count, length), vocabulary) if is_causal else _whole((count,), 10)
    return _whole((count, length), vocabulary, tf.int32), labels


# Drawn by TensorFlow: what NumPy draws is copied into its memory or not, by where it happens to lie.
def _drawn(shape: tuple[int, ...], count: int) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.random.stateless_normal(shape, (0, 1)), _whole((count,), 10)


def _whole(shape: Sequence[int], below: int, dtype: tf.DType = tf.int64) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, (0, 2), 0, below, dtype)
