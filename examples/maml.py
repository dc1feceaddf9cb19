"""Second-order MAML (Finn et al. 2017, arXiv:1703.03400): a start from which one step learns a new sine wave.

    python examples/maml.py

Each task is a wave of its own amplitude and phase, seen at ten points. The inner step is taken by a plain
`tf.GradientTape` on tensors computed from the weights; `self.tape()` around it sees through that step. The same network
trained as long on the same waves, without the inner step, has only learned their mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
WIDTH, SHOTS, TASKS, RATE = 40, 10, 32, 0.02


def network(weights: Sequence[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """Apply the model by hand, with a copy of the weights for each task: shapes (tasks, points, 1)."""
    for kernel, bias in zip(weights[:-2:2], weights[1:-2:2]):
        x = tf.nn.tanh(x @ kernel + bias[:, None])
    return x @ weights[-2] + weights[-1][:, None]


class MAML(tl.Trainer):
    def __init__(self, *args: object, inner_rate: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.inner_rate = inner_rate

    def adapted(self, x: tf.Tensor, y: tf.Tensor, rate: float) -> list[tf.Tensor]:
        """Return the weights after one step on each task, as a function of the model's."""
        tasks = tf.shape(x)[0]
        # One copy for each task, so that one gradient of the sum holds the gradients of all.
        copies = [tf.repeat(variable.value[None], tasks, axis=0) for variable in self.model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(copies)
            loss = tf.reduce_sum(tf.reduce_mean((network(copies, x) - y) ** 2, axis=[1, 2]))
        return [copy - rate * gradient for copy, gradient in zip(copies, inner.gradient(loss, copies))]

    def loss_after_a_step(self, batch: Sequence[tf.Tensor], rate: float) -> tf.Tensor:
        x, y, x_new, y_new = batch
        return tf.reduce_mean((network(self.adapted(x, y, rate), x_new) - y_new) ** 2)

    def train_step(self, batch: Sequence[tf.Tensor]) -> Mapping[str, tf.Tensor]:
        with self.tape() as tape:
            loss = self.loss_after_a_step(batch, self.inner_rate)
        self.update(tape, loss)
        return {"loss": loss}


def slope(trainer: MAML, batch: Sequence[tf.Tensor], length: float = 0.01) -> float:
    """Return the slope of the loss along its gradient, by differences, as a part of the gradient's norm: it is 1.

    A gradient of first order, which takes the inner gradient for a constant, is off by some tenths.
    """
    weights = [variable.value for variable in trainer.model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = trainer.loss_after_a_step(batch, RATE)
    gradients = tape.gradient(loss, weights)
    norm = tf.linalg.global_norm(gradients)
    losses = []
    for steps in (1, -2, 1):  # ahead, behind, and back to where they were
        for weight, gradient in zip(weights, gradients):
            weight.assign_add(steps * length / norm * gradient)
        losses.append(trainer.loss_after_a_step(batch, RATE))
    return float((losses[0] - losses[1]) / (2 * length * norm))


def waves(tasks: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return points of each task to learn from, and others to be judged by."""
    amplitude, phase = random.uniform(0.1, 5, (tasks, 1, 1)), random.uniform(0, np.pi, (tasks, 1, 1))
    x, x_new = random.uniform(-5, 5, (2, tasks, SHOTS, 1))
    return tuple(
        a.astype("float32") for a in (x, amplitude * np.sin(x - phase), x_new, amplitude * np.sin(x_new - phase))
    )


def main(seed: int = 0, steps: int = 2000) -> dict[str, float]:
    random = np.random.default_rng(seed)
    tasks, new_tasks = waves(TASKS * steps, random), waves(500, random)

    scores = {}
    for name, inner_rate in {"meta-trained": RATE, "trained without the inner step": 0.0}.items():
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((1,)), layers.Dense(WIDTH), layers.Dense(WIDTH), layers.Dense(1)])
        trainer = MAML(model, optimizer=keras.optimizers.Adam(3e-3), inner_rate=inner_rate, seed=seed)
        trainer.fit(tasks, batch_size=TASKS, verbose=0)
        before, after = (float(trainer.loss_after_a_step(new_tasks, rate)) for rate in (0.0, RATE))
        print(f"{name}: loss on new waves {before:.2f}, after one step {after:.2f}")
        scores[name] = after
        if inner_rate:
            found = slope(trainer, new_tasks)
            print(f"its gradient agrees with differences of the loss: {abs(found - 1) < 0.02} ({found:.4f})")
    return scores


if __name__ == "__main__":
    main()
