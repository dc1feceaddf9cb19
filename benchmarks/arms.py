"""Ways to go through an epoch: by tapeloop, by Keras, and by loops written by hand.

A loop by hand is what one would write with TensorFlow alone: a `tf.function` that loops over batches in the graph, a
tape that watches what trains, and weights that stay where the loss or a gradient is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.workloads import cross_entropy

Arm = Callable[[], object]


def tapeloop(model: keras.Model, policy: tl.VariablePolicy, data: Any, batch: int, **options: Any) -> Arm:
    """Return one epoch of a trainer, with a progress bar, and with what comes by default."""
    progress = options.pop("progress", "bar")
    options.setdefault("metrics", ["accuracy"])
    trainer = tl.Trainer(model, policy, loss=cross_entropy(), optimizer=keras.optimizers.Adam(1e-4), **options)
    return lambda: trainer.fit(data, batch_size=batch, progress=progress)


def keras_fit(model: keras.Model, data: Any, batch: int, **options: Any) -> Arm:
    """Return one epoch of Keras' `fit` as it comes."""
    model.compile(keras.optimizers.Adam(1e-4), cross_entropy(), metrics=["accuracy"], **options)
    return lambda: model.fit(*data, batch_size=batch)


def by_hand(
    model: keras.Model, trained: list[keras.Variable], data: Any, batch: int, metrics: int = 1, training: bool = True
) -> Arm:
    """Return a loop over one epoch of arrays, or of a dataset of batches, written with TensorFlow alone."""
    optimizer, loss_of = keras.optimizers.Adam(1e-4), cross_entropy()
    optimizer.build(trained)
    sources = [variable.value for variable in trained]
    means = [keras.metrics.Mean()] + [keras.metrics.SparseCategoricalAccuracy() for _ in range(metrics)]

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            logits = model(x, training=training)
            loss = loss_of(y, logits)
        gradients = tape.gradient(loss, sources)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in [loss, *gradients]])
        tf.cond(finite, lambda: [optimizer.apply(gradients, trained), True][1], lambda: False)
        means[0].update_state(loss, tf.shape(x)[0])
        for metric in means[1:]:
            metric.update_state(y, logits)

    return looped(step, data, batch)


def forward(model: keras.Model, data: Any, batch: int) -> Arm:
    """Return a loop of forward passes alone over one epoch of arrays."""
    seen = tf.Variable(0.0)
    return looped(lambda x, y: seen.assign(tf.reduce_sum(model(x, training=False))), data, batch)


def looped(step: Callable[[tf.Tensor, tf.Tensor], Any], data: Any, batch: int) -> Arm:
    """Return one epoch of a step, looped over in the graph: over a dataset, or gathered from arrays in random order."""
    if isinstance(data, tf.data.Dataset):
        steps = tf.constant(int(data.cardinality()))

        @tf.function
        def over_dataset(iterator: Any, steps: tf.Tensor) -> None:
            for _ in tf.range(steps):
                step(*next(iterator))

        return lambda: over_dataset(iter(data), steps)
    x, y = map(tf.constant, data)

    @tf.function
    def over_arrays(order: tf.Tensor) -> None:
        for number in tf.range(len(x) // batch):
            chosen = tf.ensure_shape(order[number * batch : (number + 1) * batch], [batch])
            step(tf.gather(x, chosen), tf.gather(y, chosen))

    return lambda: over_arrays(tf.random.shuffle(tf.range(len(x))))
