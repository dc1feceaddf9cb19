"""A Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028) on a ring of eight Gaussians.

    python examples/wgan_gp.py

The penalty needs a gradient inside the loss: a plain `tf.GradientTape` within `self.tape("critic")`. The critic has no
BatchNormalization, under which an example's score would depend on its batch (section 4 of the paper).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
NOISE, UPDATES, BATCH, PENALTY = 8, 5, 256, 1.0
ANGLES = 2 * np.pi * np.arange(8) / 8
MODES, SCALE = 2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1), 0.1


def make_network(inputs: int, outputs: int) -> keras.Model:
    hidden = [layers.Dense(64, activation="relu") for _ in range(3)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def adam(updates: int) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, updates), beta_1=0.5, beta_2=0.9)


class WGAN(tl.Trainer):
    def train_step(self, points: tf.Tensor) -> Mapping[str, tf.Tensor]:
        generator, critic = self.model["generator"], self.model["critic"]
        for real in tf.split(points, UPDATES):  # a list: Python unrolls the loop
            fake = generator(tf.random.normal((BATCH, NOISE)))
            with self.tape("critic") as tape:
                distance = tf.reduce_mean(critic(real)) - tf.reduce_mean(critic(fake))
                norms = self.gradient_norms(real, fake)
                loss = PENALTY * tf.reduce_mean((norms - 1.0) ** 2) - distance
            self.update(tape, loss)

        with self.tape("generator") as tape:
            loss = -tf.reduce_mean(critic(generator(tf.random.normal((BATCH, NOISE)))))
        self.update(tape, loss)
        return {"distance": distance, "norm": tf.reduce_mean(norms)}

    def gradient_norms(self, real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
        """Return the norms of the critic's gradient at random points between real and generated ones."""
        between = fake + tf.random.uniform((BATCH, 1)) * (real - fake)
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(between)
            scores = self.model["critic"](between)
        return tf.norm(inner.gradient(scores, between), axis=-1)


def judge(points: np.ndarray) -> tuple[float, int]:
    """Return the share of points within three standard deviations of a mode, and how many modes hold 3% or more."""
    distances = np.linalg.norm(points[:, None] - MODES, axis=-1)
    near = distances.argmin(axis=-1)[distances.min(axis=-1) < 3 * SCALE]
    return len(near) / len(points), int((np.bincount(near, minlength=8) >= 0.03 * len(points)).sum())


def main(seed: int = 0, steps: int = 1000) -> dict[str, float]:
    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    centres = MODES[random.integers(8, size=100 * UPDATES * BATCH)]
    points = (centres + SCALE * random.normal(size=centres.shape)).astype("float32")

    trainer = WGAN(
        {"generator": make_network(NOISE, 2), "critic": make_network(2, 1)},
        tl.Groups({"generator": "generator", "critic": "critic"}),
        # A group's schedule counts its own updates, of which the critic makes five in a step.
        optimizer={"generator": adam(steps), "critic": adam(UPDATES * steps)},
        seed=seed,
    )
    noise = tf.random.normal((2000, NOISE))
    untrained, _ = judge(trainer.model["generator"](noise).numpy())
    history = trainer.fit(points, batch_size=UPDATES * BATCH, epochs=steps // 100, verbose=0).history
    share, modes = judge(trainer.model["generator"](noise).numpy())
    norm = history["norm"][-1]

    print(f"near a mode: {share:.3f} of the generated points (untrained {untrained:.3f}), {modes} of 8 modes")
    print(
        f"the critic's gradient between real and generated has norm {norm:.2f}, within 0.2 of 1: {abs(norm - 1) < 0.2}"
    )
    return {"share": share, "modes": modes, "norm": norm}


if __name__ == "__main__":
    main()
