"""A generator and a discriminator that train in turn on each batch, by tapeloop and by hand."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import Adam, Arm, looped
from benchmarks.workloads import NOISE


def noise(real: tf.Tensor) -> tf.Tensor:
    """Return as much noise as there are images: numbers of theirs, so that all arms have the same."""
    return tf.reshape(real, [tf.shape(real)[0], -1])[:, :NOISE]


def discriminator_loss(networks: dict[str, keras.Model], real: tf.Tensor) -> tf.Tensor:
    """Return how badly the discriminator tells images from the generator's."""
    made = networks["generator"](noise(real), training=True)
    told = [networks["discriminator"](images, training=True) for images in (real, made)]
    return tf.reduce_mean(tf.nn.softplus(-told[0])) + tf.reduce_mean(tf.nn.softplus(told[1]))


def generator_loss(networks: dict[str, keras.Model], real: tf.Tensor) -> tf.Tensor:
    """Return how well the discriminator tells the generator's images (Goodfellow et al., 2014, section 3)."""
    return tf.reduce_mean(
        tf.nn.softplus(-networks["discriminator"](networks["generator"](noise(real), training=True), training=True))
    )


LOSSES = {"discriminator": discriminator_loss, "generator": generator_loss}


class AdversarialTrainer(tl.Trainer):
    """A step of the discriminator, then one of the generator, each on its own tape."""

    def train_step(self, batch: Any) -> dict[str, tf.Tensor]:
        """Train both on one batch of images."""
        total = 0.0
        for name, loss_of in LOSSES.items():
            with self.tape(name) as tape:
                loss = loss_of(self.model, batch)
            self.update(tape, loss)
            total += loss
        return {"loss": total}


def by_hand(
    networks: dict[str, keras.Model], data: tf.Tensor, batch: int, *, sources: str, default_tape: bool, xla: bool
) -> Arm:
    """Return the same by hand.

    Args:
        networks: The generator and the discriminator.
        data: Images.
        batch: Examples in a batch.
        sources: `"all"` takes gradients for both in each of the two updates, `"group"` for the one that is updated.
        default_tape: Whether tapes watch whatever is trainable.
        xla: Whether XLA compiles the step.
    """
    trained = {name: networks[name].trainable_variables for name in LOSSES}
    optimizers = {name: Adam(1e-4) for name in LOSSES}
    for name, optimizer in optimizers.items():
        optimizer.build(trained[name])
    mean, unused = keras.metrics.Mean(), tf.Variable(0.0)

    def compute(real: tf.Tensor) -> tf.Tensor:
        total = 0.0
        for name, loss_of in LOSSES.items():
            taken = [v for other in LOSSES for v in trained[other] if sources == "all" or other == name]
            with tf.GradientTape(watch_accessed_variables=default_tape) as tape:
                tape.watch([variable.value for variable in taken])
                loss = loss_of(networks, real)
            found = tape.gradient(loss, [variable.value for variable in taken])
            gradients = {id(variable): gradient for variable, gradient in zip(taken, found)}
            mine = [gradients.pop(id(variable)) for variable in trained[name]]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in [loss, *mine]])
            update = functools.partial(optimizers[name].apply, mine, trained[name])
            tf.cond(finite, lambda update=update: [update(), True][1], lambda: False)
            for gradient in gradients.values():  # kept, or the graph would not compute it
                unused.assign(tf.reduce_sum(gradient))
            total += loss
        return total

    compiled = tf.function(compute, jit_compile=True, autograph=False) if xla else compute
    return looped(lambda real: mean.update_state(compiled(real)), data, batch, mean, shuffle=False)
