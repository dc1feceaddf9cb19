"""A generator and a discriminator that train in turn on each batch, by tapeloop and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.workloads import NOISE

NAMES = ("discriminator", "generator")  # in the order of their updates


def loss_of(name: str, networks: dict[str, keras.Model], real: tf.Tensor) -> tf.Tensor:
    """Return how badly one of the two does, told by the discriminator (Goodfellow et al., 2014, section 3)."""
    noise = tf.reshape(real, [tf.shape(real)[0], -1])[:, :NOISE]  # numbers of the images: all arms have the same
    made = networks["generator"](noise, training=True)
    if name == "generator":
        return tf.reduce_mean(tf.nn.softplus(-networks["discriminator"](made, training=True)))
    told = [networks["discriminator"](images, training=True) for images in (real, made)]
    return tf.reduce_mean(tf.nn.softplus(-told[0])) + tf.reduce_mean(tf.nn.softplus(told[1]))


class AdversarialTrainer(tl.Trainer):
    """A step of the discriminator, then one of the generator, each on its own tape."""

    def train_step(self, batch: Any) -> dict[str, tf.Tensor]:
        """Train both on one batch of images."""
        total = 0.0
        for name in NAMES:
            with self.tape(name) as tape:
                loss = loss_of(name, self.model, batch)
            self.update(tape, loss)
            total += loss
        return {"loss": total}


def by_hand(
    networks: dict[str, keras.Model], optimizers: dict[str, Any], *, takes_all: bool
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return a step by hand, which may take gradients of both networks in each update, not of the updated one alone."""
    trained = {name: networks[name].trainable_variables for name in NAMES}
    for name, optimizer in optimizers.items():
        optimizer.build(trained[name])
    unused = tf.Variable(0.0)

    def compute(real: tf.Tensor) -> tf.Tensor:
        total = 0.0
        for name in NAMES:
            others = [variable for other in NAMES if takes_all and other != name for variable in trained[other]]
            sources = [variable.value for variable in (*trained[name], *others)]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                loss = loss_of(name, networks, real)
            gradients = tape.gradient(loss, sources)
            count = len(trained[name])
            optimizers[name].apply(gradients[:count], trained[name])
            for gradient in filter(lambda one: one is not None, gradients[count:]):
                unused.assign(tf.reduce_sum(gradient))  # or the graph would not compute it
            total += loss
        return total

    return compute
