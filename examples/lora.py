"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank adapters in a frozen transformer.

    python examples/lora.py

A small encoder reads a digit as its eight rows of eight pixels. It is pretrained on 0 to 4, then frozen, and adapted to
5 to 9 twice: by a new head alone, and by a new head and a low-rank update in each of its projections.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tapeloop as tl

layers = keras.layers
WIDTH, HEADS, RANK = 64, 4, 2
ADAPTERS = tl.named("lora_a", "lora_b")


class Projection(layers.Dense):
    """A dense layer whose kernel has a low-rank update beside it; B is zero at first, so it changes nothing."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        super().build(input_shape)
        self.lora_a = self.add_weight((input_shape[-1], RANK), initializer="he_normal", name="lora_a")
        self.lora_b = self.add_weight((RANK, self.units), initializer="zeros", name="lora_b")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().call(inputs) + inputs @ self.lora_a @ self.lora_b


class Block(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.query, self.key, self.value, self.output_projection = (Projection(WIDTH) for _ in range(4))
        self.wide, self.narrow = Projection(2 * WIDTH), Projection(WIDTH)
        self.dropout = layers.Dropout(0.1)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        y = self.norms[0](x)
        q, k, v = (tf.stack(tf.split(f(y), HEADS, axis=-1), axis=1) for f in (self.query, self.key, self.value))
        weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True) * (WIDTH / HEADS) ** -0.5)
        heads = tf.concat(tf.unstack(weights @ v, axis=1), axis=-1)
        x = x + self.dropout(self.output_projection(heads))
        return x + self.dropout(self.narrow(keras.ops.gelu(self.wide(self.norms[1](x)))))


class Encoder(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="encoder")
        self.embedding, self.norm = Projection(WIDTH), layers.LayerNormalization()
        self.positions = layers.Embedding(8, WIDTH)
        self.blocks = [Block(), Block()]

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        x = self.embedding(rows) + self.positions(tf.range(8))
        for block in self.blocks:
            x = block(x)
        return tf.reduce_mean(self.norm(x), axis=1)


def load(digits: range) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the digits as rows with labels from 0, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, digits)
    x, y = (images[chosen] / 16.0).reshape(-1, 8, 8), labels[chosen] - digits[0]
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    return (x_train, y_train), (x_test, y_test)


def bits(encoder: keras.Model) -> list[bytes]:
    """Return every bit of an encoder's weights but for its adapters."""
    return [v.numpy().tobytes() for v in encoder.trainable_variables if v.name not in ("lora_a", "lora_b")]


def main(seed: int = 0) -> dict[str, float]:
    keras.utils.set_random_seed(seed)
    encoder = Encoder()

    def fit(policy: tl.VariablePolicy, digits: range, epochs: int) -> tuple[tl.Trainer, float]:
        """Train under a new head, and return the trainer and its test accuracy."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model = keras.Sequential([keras.Input((8, 8)), encoder, layers.Dense(5, name="head")])
        optimizer = keras.optimizers.Adam(3e-3)
        trainer = tl.Trainer(model, policy, loss=loss, optimizer=optimizer, metrics=["accuracy"], seed=seed)
        train, test = load(digits)
        trainer.fit(train, epochs=epochs, batch_size=64, verbose=0)
        return trainer, trainer.evaluate(test, verbose=0)["accuracy"]

    scores = {"pretrained on 0-4": fit(tl.Freeze(ADAPTERS), range(5), 15)[1]}
    before = bits(encoder)
    scores["head only"] = fit(tl.TrainOnly("head"), range(5, 10), 12)[1]
    trainer, scores["LoRA"] = fit(tl.TrainOnly("head", ADAPTERS), range(5, 10), 12)

    print(trainer.explain(depth=1))
    share = sum(v.size for v in trainer.selection.trained) / trainer.model.count_params()
    print(f"test accuracy: {', '.join(f'{name} {value:.3f}' for name, value in scores.items())}")
    print(f"LoRA trains {share:.1%} of the parameters; the base is bit-identical: {bits(encoder) == before}")
    return {**scores, "share": share}


if __name__ == "__main__":
    main()
