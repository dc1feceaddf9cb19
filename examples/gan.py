"""A DCGAN on handwritten digits: five updates of the discriminator for each of the generator, in one step.

    python examples/gan.py

Two groups, each with an optimizer of its own, on a mapping of two models (Radford et al. 2016, arXiv:1511.06434). Both
have BatchNormalization, whose statistics a call moves without any gradient: each step looks whether the generator's
update has left every bit of the discriminator alone. What comes out is judged by a classifier of the real digits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import tapeloop as tl

layers = keras.layers
NOISE, UPDATES, BATCH = 16, 5, 32


def make_models() -> dict[str, keras.Model]:
    generator = [
        keras.Input((NOISE,)),
        layers.Dense(2 * 2 * 64, use_bias=False),
        layers.Reshape((2, 2, 64)),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2DTranspose(32, 4, strides=2, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh"),
    ]
    discriminator = [
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 4, strides=2, padding="same"),
        layers.LeakyReLU(0.2),
        layers.Conv2D(64, 4, strides=2, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.LeakyReLU(0.2),
        layers.Flatten(),
        layers.Dense(1),
    ]
    return {"generator": keras.Sequential(generator), "discriminator": keras.Sequential(discriminator)}


class GAN(tl.Trainer):
    def train_step(self, images: tf.Tensor) -> Mapping[str, tf.Tensor]:
        generator, discriminator = self.model["generator"], self.model["discriminator"]
        entropy = tf.nn.sigmoid_cross_entropy_with_logits
        for real in tf.split(images, UPDATES):  # a list: Python unrolls the loop
            fake = generator(tf.random.normal((BATCH, NOISE)), training=True)
            with self.tape("discriminator") as tape:
                # Both in one batch, so that the moving statistics are of what the generator's update will see.
                logits = discriminator(tf.concat([real, fake], axis=0), training=True)
                labels = tf.concat([tf.fill((BATCH, 1), 0.9), tf.zeros((BATCH, 1))], axis=0)
                d_loss = tf.reduce_mean(entropy(labels, logits))
            self.update(tape, d_loss)

        before = [tf.identity(variable.value) for variable in discriminator.variables]
        with self.tape("generator") as tape:
            fake = generator(tf.random.normal((BATCH, NOISE)), training=True)
            logits = discriminator(fake, training=False)  # or its batch statistics would move
            g_loss = tf.reduce_mean(entropy(tf.ones_like(logits), logits))
        self.update(tape, g_loss)
        changed = [
            tf.reduce_any(tf.bitcast(variable.value, tf.uint8) != tf.bitcast(was, tf.uint8))
            for variable, was in zip(discriminator.variables, before)
        ]
        return {"d_loss": d_loss, "g_loss": g_loss, "disturbed": tf.cast(tf.reduce_any(changed), tf.float32)}


def judge(classifier: keras.Model, images: tf.Tensor) -> tuple[float, int]:
    """Return the share of images that are surely some digit, and how many digits make up 2% or more of the images."""
    probabilities = tf.nn.softmax(classifier(images)).numpy()
    sure = probabilities[probabilities.max(axis=-1) > 0.9].argmax(axis=-1)
    return len(sure) / len(images), int((np.bincount(sure, minlength=10) >= 0.02 * len(images)).sum())


def main(seed: int = 0, epochs: int = 50) -> dict[str, float]:
    keras.utils.set_random_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).reshape(-1, 8, 8, 1).astype("float32")
    classifier = keras.Sequential([layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    tl.Trainer(classifier, loss=loss, seed=seed).fit((images, labels), epochs=15, verbose=0)

    trainer = GAN(
        make_models(),
        tl.Groups({"generator": "generator", "discriminator": "discriminator"}),
        optimizer={
            "generator": keras.optimizers.Adam(2e-3, beta_1=0.5),
            "discriminator": keras.optimizers.Adam(2e-4, beta_1=0.5),
        },
    )
    noise = tf.random.normal((1000, NOISE))
    real, untrained = judge(classifier, images)[0], judge(classifier, trainer.model["generator"](noise))[0]
    batches = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images), seed=seed)
    history = trainer.fit(batches.batch(UPDATES * BATCH, drop_remainder=True), epochs=epochs, verbose=0).history
    share, digits = judge(classifier, trainer.model["generator"](noise))

    print(f"surely a digit: {share:.3f} of the generated images (untrained {untrained:.3f}, real {real:.3f})")
    print(f"kinds of digits: {digits} of 10")
    print(f"the generator's updates left the discriminator bit-identical: {not any(history['disturbed'])}")
    return {"share": share, "digits": digits}


if __name__ == "__main__":
    main()
