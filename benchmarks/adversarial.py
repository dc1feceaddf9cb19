"""A generator and a discriminator that train in turn on each batch, by tapeloop and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
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
    networks: dict[str, keras.Model], optimizers: dict[str, Any], *, takes_all: bool, xla: bool
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return a step by hand, which may take gradients of both networks in each update, not of the updated one alone."""
    trained = {name: networks[name].trainable_variables for name in LOSSES}
    for name, optimizer in optimizers.items():
        optimizer.build(trained[name])
    unused = tf.Variable(0.0)

    def compute(real: tf.Tensor) -> tf.Tensor:
        total = 0.0
        for name, loss_of in LOSSES.items():
            taken = [v for other in LOSSES for v in trained[other] if takes_all or other == name]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([variable.value for variable in taken])
                loss = loss_of(networks, real)
            found = tape.gradient(loss, [variable.value for variable in taken])
            gradients = {id(variable): gradient for variable, gradient in zip(taken, found)}
            optimizers[name].apply([gradients.pop(id(variable)) for variable in trained[name]], trained[name])
            for gradient in gradients.values():  # kept, or the graph would not compute it
                if gradient is not None:
                    unused.assign(tf.reduce_sum(gradient))
            total += loss
        return total

    return tf.function(compute, jit_compile=True, autograph=False) if xla else compute
