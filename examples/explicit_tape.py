"""A training step written with the tape: two groups, each with its own loss, in one step.

    python examples/explicit_tape.py

A classifier learns from the features of an encoder; the encoder itself learns only to rebuild its input, so its
gradients come from the decoder and never from the classifier. `self.tape(group)` watches one group's variables, and
`self.update(tape, loss)` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import tapeloop as tl

layers = keras.layers


class TwoLosses(tl.Trainer):
    def train_step(self, batch: tuple[tf.Tensor, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        images, labels = batch
        with self.tape("autoencoder") as tape:
            features = self.model["encoder"](images, training=True)
            rebuilding = tf.reduce_mean((self.model["decoder"](features, training=True) - images) ** 2)
        self.update(tape, rebuilding)

        with self.tape("classifier") as tape:  # the features are a constant to this tape
            logits = self.model["classifier"](features, training=True)
            entropy = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            classifying = tf.reduce_mean(entropy)
        self.update(tape, classifying)

        hits = tf.equal(tf.argmax(logits, axis=-1), tf.cast(labels, tf.int64))
        return {
            "rebuilding": rebuilding,
            "classifying": classifying,
            "accuracy": tf.reduce_mean(tf.cast(hits, tf.float32)),
        }


def main() -> dict[str, float]:
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    models = {
        "encoder": keras.Sequential([layers.Dense(64, activation="relu"), layers.Dense(32)]),
        "decoder": keras.Sequential([layers.Dense(64, activation="relu"), layers.Dense(64)]),
        "classifier": keras.Sequential([layers.Dense(10)]),
    }
    trainer = TwoLosses(
        models,
        tl.Groups({"autoencoder": tl.glob("encoder") | "decoder", "classifier": "classifier"}),
        optimizer={"autoencoder": keras.optimizers.Adam(1e-3), "classifier": keras.optimizers.Adam(1e-2)},
        seed=0,
    )
    history = trainer.fit((images / 16.0, labels), epochs=15, batch_size=64).history
    print(trainer.explain())
    return {name: values[-1] for name, values in history.items()}


if __name__ == "__main__":
    main()
