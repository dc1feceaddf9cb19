"""The models and the data that benchmarks share, what a selection means for each, and a user's own model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.cases import TRANSFORMERS, UNFREEZE, Case, Transformer

layers = keras.layers

APPLICATIONS = {
    "mobilenetv2": "MobileNetV2", "resnet50": "ResNet50", "efficientnetv2b0": "EfficientNetV2B0",
    "efficientnetv2s": "EfficientNetV2S",
}  # fmt: skip
# By workload: what comes first, and what comes last before the head.
ENDS = {
    "mlp": (["dense_0"], ["dense_1"]),
    "lstm": (["embedding"], ["lstm_1"]),
    "unet": (["down_0_*"], ["up_0_*"]),
    "mobilenetv2": (["backbone/*Conv1", "backbone/expanded_conv*"], ["backbone/block_16_*", "backbone/Conv_1*"]),
    "resnet50": (["backbone/conv1_*"], ["backbone/conv5_block3*"]),
    "resnet50-blocks": (["backbone/block0_0"], ["backbone/block3_2"]),
    "efficientnetv2b0": (["backbone/stem*"], ["backbone/block6h*", "backbone/top*"]),
    "efficientnetv2s": (["backbone/stem*"], ["backbone/block6o*", "backbone/top*"]),
}
# What `unfreeze-3` trains of a MobileNetV2 beside the stage before, what `unfreeze-4` adds, and so on.
STAGES = [f"backbone/block_{stage}_*" for stage in ("1[345]", "1[012]", "[6789]", "[345]", "[12]")]
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
    optimizer: Callable[[], keras.optimizers.Optimizer] = adam


def make(case: Case) -> Workload:
    """Build what a case measures, on the data of one long round.

    Raises:
        ValueError: Of a user's own model a function, the policy, the loss or the optimizer cannot be had, or its data
            is unknown or too little.
    """
    keras.config.set_dtype_policy("mixed_bfloat16" if case.dtype == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)
    count, size, name = case.batch * case.steps, case.size, case.workload
    if case.own:
        return own(dict(case.own), count)
    if name == "gan":
        networks = gan(size)
        policy = tl.Groups({name: name for name in networks})
        return Workload(networks, tf.tanh(_drawn((count, size, size, 3))), None, policy)
    if name == "mlp":
        model, x, y = mlp(int(128 * case.width)), _drawn((count, 64)), _whole((count,), 10)
    elif name == "lstm":
        model, x, y = lstm(size), _whole((count, size), 1000, tf.int32), _whole((count,), 10)
    elif name in TRANSFORMERS:
        of = Transformer.of(case)
        model = transformer(of, size, case.selection)
        x = _whole((count, size), of.vocabulary, tf.int32) if of.vocabulary else _drawn((count, size, size, 3))
        y = _whole((count, size), of.vocabulary) if of.is_causal else _whole((count,), 10)
    elif name == "unet":
        model = unet(size, max(8, int(64 * case.scale)))
        x, y = _drawn((count, size, size, 3)), _whole((count, size, size), 10)
    else:
        backbone, head = backbone_of(name, (size, size, 3)), layers.Dense(10, name="head", dtype="float32")
        inputs = keras.Input((size, size, 3))
        model = keras.Model(inputs, head(backbone(inputs)))
        x, y = _drawn((count, size, size, 3)), _whole((count,), 10)
    return Workload(model, (x, y), cross_entropy(), policy_of(case))


def freeze(model: keras.Model, trained: Sequence[keras.Variable]) -> None:
    """Freeze all but some variables as one does in Keras: by flags, and submodels that are frozen as a whole infer.

    A flag alone leaves Dropout at work, and functional models do not heed `submodel(x, training=False)`.
    """
    chosen = {id(variable) for variable in trained}
    for layer in model.layers:
        is_frozen = chosen.isdisjoint(map(id, layer.trainable_variables))
        if isinstance(layer, keras.Model):
            if is_frozen and layer.trainable_variables:
                layer.call = functools.partial(_inferred, layer.call)
            freeze(layer, trained)
        elif layer.trainable_variables and is_frozen:
            layer.trainable = False
    for variable in model.trainable_variables:
        variable.trainable = id(variable) in chosen


def _inferred(call: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return call(*inputs, **{**options, "training": False})


# Drawn by TensorFlow: what NumPy draws is copied into its memory or not, by where it happens to lie; and as tensors,
# since to make them of NumPy arrays costs each fit a copy, which is no step's.
def _drawn(shape: Sequence[int]) -> tf.Tensor:
    return tf.random.stateless_normal(shape, (0, 1))


def _whole(shape: Sequence[int], below: int, dtype: tf.DType = tf.int64) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, (0, 2), 0, below, dtype)


def policy_of(case: Case) -> tl.VariablePolicy:
    """Return the policy that trains a selection of a workload."""
    if case.workload in TRANSFORMERS:
        of = Transformer.of(case)
        first, last = ["embedding" if of.vocabulary else "patches", "block_0"], [f"block_{of.depth - 1}"]
    else:
        first, last = ENDS[case.workload]
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
        **{name: tl.TrainOnly("head", *last, *STAGES[:count]) for count, name in enumerate(UNFREEZE[1:])},
    }
    return policies[case.selection]


def mlp(width: int = 128) -> keras.Model:
    """Build three dense layers."""
    dense = [layers.Dense(width, activation="relu", name=f"dense_{number}") for number in range(2)]
    return keras.Sequential([keras.Input((64,)), *dense, layers.Dense(10, name="head", dtype="float32")])


def backbone_of(name: str, shape: tuple[int, ...]) -> keras.Model:
    """Build an architecture with random weights, without its head."""
    if name == "resnet50-blocks":
        backbone = resnet_of_blocks(shape)
    else:
        application = getattr(keras.applications, APPLICATIONS[name])
        backbone = application(input_shape=shape, include_top=False, weights=None, pooling="avg")
    backbone.name = "backbone"
    return backbone


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


class Positions(layers.Layer):
    """Adds a vector of its own to each token."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Make the vectors."""
        self.vectors = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, x: Any) -> Any:
        """Add them."""
        return x + keras.ops.cast(self.vectors, x.dtype)


def transformer(of: Transformer, size: int, selection: str) -> keras.Model:
    """Build a transformer, each block of it a model of its own, with what is added to be trained alone, if that is.

    It is like a BERT, a vision transformer (Dosovitskiy et al., 2021) or a GPT-2 without what they have learnt. LoRA
    (Hu et al., 2021) is Keras' own, of the queries and values.
    """
    if of.vocabulary:
        inputs = keras.Input((size,), dtype="int32")
        x = layers.Embedding(of.vocabulary, of.width, name="embedding")(inputs)
    else:
        inputs = keras.Input((size, size, 3))
        x = layers.Conv2D(of.width, of.patch, strides=of.patch, name="patches")(inputs)
        x = layers.Reshape((-1, of.width))(x)
    x = Positions(name="positions")(x) if of.positions else x
    blocks = [_block(of, x.shape[1:], selection == "adapters", f"block_{number}") for number in range(of.depth)]
    for block in blocks:
        x = block(x)
    x = layers.LayerNormalization(name="norm")(x) if of.is_first_normed else x
    x = x if of.is_causal else layers.GlobalAveragePooling1D()(x)
    head = layers.Dense(of.vocabulary if of.is_causal else 10, name="head", dtype="float32")
    model = keras.Model(inputs, head(x))
    for block in blocks * (selection == "lora"):
        attention = block.get_layer("attention")
        attention.query_dense.enable_lora(8)
        attention.value_dense.enable_lora(8)
    return model


def _block(of: Transformer, shape: tuple[int, ...], has_adapter: bool, name: str) -> keras.Model:
    """Build a block: attention, then two dense layers, and an adapter after them or none (Houlsby et al., 2019)."""
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
    if has_adapter:
        adapted = layers.Dense(16, activation="gelu", name="adapter_a")(x)
        x = x + layers.Dense(of.width, name="adapter_b")(adapted)
    return keras.Model(inputs, x, name=name)


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
    small, halved = size // 4, {"kernel_size": 4, "strides": 2, "padding": "same"}
    made = [layers.Dense(small * small * 64), layers.Reshape((small, small, 64))]
    made += [layers.Conv2DTranspose(32, **halved, activation="relu")]
    made += [layers.Conv2DTranspose(3, **halved, activation="tanh", dtype="float32")]
    told = [layers.Conv2D(width, **halved, activation="relu") for width in (32, 64)]
    told += [layers.Flatten(), layers.Dense(1, dtype="float32")]
    return {
        "generator": keras.Sequential([keras.Input((NOISE,)), *made]),
        "discriminator": keras.Sequential([keras.Input((size, size, 3)), *told]),
    }


def own(options: dict[str, str], count: int) -> Workload:
    """Build a user's own model: its data, loss, optimizer and policy are asked for, not guessed."""
    model = function_of("--model", options["model"])()
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{options['model']}` must return a Keras model. It returned {model!r}.")
    x, y = _given(options["data"], count) if options.get("data") else _drawn_for(model, count)
    if not model.built:
        model(tf.nest.map_structure(lambda part: part[:1], x))
    policy = _policy_of(options["policy"])
    said = "a class of `keras.losses`, such as `MeanSquaredError`"
    loss = _asked("--loss", options.get("loss") or "MeanSquaredError", keras.losses.get, said)
    optimizer: Callable[[], Any] = adam
    if name := options.get("optimizer"):
        optimizer = functools.partial(
            _asked, "--optimizer", name, keras.optimizers.get, "the name of a Keras optimizer"
        )
        optimizer()  # that it cannot be had is better said now
    return Workload(model, (x, y), loss, policy, optimizer=optimizer)


def _policy_of(text: str) -> tl.VariablePolicy:
    """Return the policy that an expression in tapeloop's names stands for, or that a function of the user's returns."""
    if re.fullmatch(r"[\w.]+:\w+", text):
        return function_of("--policy", text)()
    try:
        return eval(text, {"__builtins__": {}}, {name: getattr(tl, name) for name in tl.__all__})
    except Exception as error:
        asked = "`--policy` must be a policy such as `Freeze('backbone')`, or `package.module:function`."
        raise ValueError(f"{asked} Received: {text!r}.") from error


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


def _asked(option: str, text: str, find: Callable[[str], Any], said: str) -> Any:
    """Return what an option asks for, by the name that Keras has for it or by a function of the user's."""
    if ":" in text:
        return function_of(option, text)()
    with contextlib.suppress(ValueError):
        found = find(text)
        if isinstance(found, (keras.losses.Loss, keras.optimizers.Optimizer)):
            return found
    raise ValueError(f"`{option}` must be {said}, or `package.module:function`. Received: {text!r}.")


def _drawn_for(model: keras.Model, count: int) -> tuple[Any, Any]:
    """Draw data for the inputs and outputs of a model that says what they are."""

    def unknown(why: str) -> ValueError:
        return ValueError(
            f"The model {model.name!r} {why}. Give data: `--data package.module:function` names what returns inputs "
            "and targets for a number of examples, of the sizes and values that you train on."
        )

    if not getattr(model, "inputs", None):
        raise unknown("does not say what its inputs are, as a subclassed one does not")
    sides = []
    for specs in (model.inputs, model.outputs):
        for spec in specs:
            if None in spec.shape[1:]:
                raise unknown(f"has a dimension that it does not know: {spec.name!r} is of shape {tuple(spec.shape)}")
            if tf.as_dtype(spec.dtype).is_integer:
                raise unknown(f"has {spec.name!r}, which is of whole numbers, and which of them is unknown")
        parts = [tf.cast(_drawn([count, *spec.shape[1:]]), spec.dtype) for spec in specs]
        sides.append(parts[0] if len(parts) == 1 else tuple(parts))
    return sides[0], sides[1]


def _given(text: str, count: int) -> tuple[Any, Any]:
    found = function_of("--data", text)(count)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"`--data` must name what returns `(inputs, targets)`. `{text}` returned {type(found)}.")
    found = tf.nest.map_structure(tf.convert_to_tensor, found)
    lengths = {len(part) for part in tf.nest.flatten(found)}
    if len(lengths) != 1 or min(lengths) < count:
        raise ValueError(f"`{text}({count})` must return {count} examples. Received: {sorted(lengths)}.")
    return tf.nest.map_structure(lambda part: part[:count], found)
