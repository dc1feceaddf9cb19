"""Ways to go through an epoch: by tapeloop, by Keras, and by loops written by hand.

A loop by hand is what one would write with TensorFlow alone: a `tf.function` that loops over batches in the graph, a
tape that watches what trains, and weights that stay where the loss or a gradient is not finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks.workloads import cross_entropy

Arm = Callable[..., float]  # runs as many steps as it is told, or an epoch, and returns the mean loss, 0 where none is


class Adam(keras.optimizers.Adam):
    """Adam that can be asked how much state there is of it."""

    built_ones: list[keras.optimizers.Optimizer] = []

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the state, and note that it was made."""
        super().build(variables)
        self.built_ones.append(self)

    @classmethod
    def state_bytes(cls) -> int:
        """Return the bytes of all that was made in this process, step counts included."""
        variables = [variable for optimizer in cls.built_ones for variable in optimizer.variables]
        return sum(tf.as_dtype(v.dtype).size * tf.TensorShape(v.shape).num_elements() for v in variables)


def cut(data: Any, examples: int | None) -> Any:
    """Return the first examples of some data."""
    return data if examples is None else tf.nest.map_structure(lambda value: value[:examples], data)


def tapeloop(model: Any, policy: tl.VariablePolicy, data: Any, batch: int, **options: Any) -> Arm:
    """Return one epoch of a trainer, with a progress bar, and with what comes by default."""
    fitted = {"verbose": 1, "shuffle": True, "feature_cache": None}
    fitted |= {name: options.pop(name) for name in fitted if name in options}
    options = {"metrics": ["accuracy"], "loss": cross_entropy(), "optimizer": Adam(1e-4), **options}
    trainer = options.pop("trainer", tl.Trainer)(model, policy, **options)

    def run(steps: int | None = None) -> float:
        some = data if steps is None else cut(data, steps * batch)
        history = trainer.fit(some, batch_size=batch, **fitted)
        return float(history.history["loss"][-1])

    return run


def keras_fit(model: keras.Model, data: Any, batch: int | None, **options: Any) -> Arm:
    """Return one epoch of Keras' `fit` as it comes, on arrays, or on a tuple of a dataset of batches (`batch=None`)."""
    shuffle, verbose, loss = options.pop("shuffle", True), options.pop("verbose", "auto"), options.pop("loss", None)
    metrics = options.pop("metrics", ["accuracy"])
    model.compile(Adam(1e-4), loss or cross_entropy(), metrics=metrics, **options)

    def run(steps: int | None = None) -> float:
        some = data if steps is None else cut(data, steps * batch)
        return float(model.fit(*some, batch_size=batch, shuffle=shuffle, verbose=verbose).history["loss"][-1])

    return run


def by_hand(
    model: Callable[..., Any],
    trained: Sequence[keras.Variable],
    data: Any,
    batch: int,
    *,
    metrics: int = 1,
    loss: keras.losses.Loss | None = None,
    default_tape: bool = False,
    shuffle: bool = True,
    jit_compile: bool = False,
) -> Arm:
    """Return a loop over one epoch of arrays, or of a dataset of batches, written with TensorFlow alone.

    Args:
        model: What is called on a batch of inputs, with `training=True`.
        trained: What trains.
        data: Arrays `(x, y)`, or a dataset of batches.
        batch: Examples in a batch of arrays.
        metrics: How many metrics are kept.
        loss: The loss, of each output, to which what the model adds comes; by default that of classifiers.
        default_tape: Whether the tape watches whatever is trainable.
        shuffle: Whether arrays come in random order.
        jit_compile: Whether XLA compiles the step.
    """
    optimizer, loss_of = Adam(1e-4), loss or cross_entropy()
    optimizer.build(trained)
    sources = [variable.value for variable in trained]
    mean, kept = keras.metrics.Mean(), [keras.metrics.SparseCategoricalAccuracy() for _ in range(metrics)]

    def compute(x: Any, y: Any) -> tuple[tf.Tensor, Any]:
        with tf.GradientTape(watch_accessed_variables=default_tape) as tape:
            tape.watch(sources)
            outputs = model(x, training=True)
            parts = [loss_of(*both) for both in zip(tf.nest.flatten(y), tf.nest.flatten(outputs))]
            value = tf.add_n([*parts, *getattr(model, "losses", [])])
        gradients = tape.gradient(value, sources)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in [value, *gradients]])
        tf.cond(finite, lambda: [optimizer.apply(gradients, trained), True][1], lambda: False)
        return value, outputs

    compiled = tf.function(compute, jit_compile=True, autograph=False) if jit_compile else compute

    def step(x: Any, y: Any) -> None:
        value, outputs = compiled(x, y)
        mean.update_state(value, tf.shape(tf.nest.flatten(x)[0])[0])
        for metric in kept:
            metric.update_state(y, outputs)

    return looped(step, data, batch, mean, shuffle)


def forward(
    model: Callable[..., Any], data: Any, batch: int, *, shuffle: bool = True, jit_compile: bool = False
) -> Arm:
    """Return a loop of forward passes alone over one epoch of arrays."""
    seen = tf.Variable(0.0)

    def compute(x: Any) -> tf.Tensor:
        outputs = tf.nest.flatten(model(x, training=False))
        return tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32)) for output in outputs])

    compiled = tf.function(compute, jit_compile=True, autograph=False) if jit_compile else compute
    return looped(lambda x, y: seen.assign(compiled(x)), data, batch, seen, shuffle)


def looped(step: Callable[..., Any], data: Any, batch: int, seen: Any, shuffle: bool = True) -> Arm:
    """Return one epoch of a step, looped over in the graph: over a dataset, or gathered from arrays.

    Args:
        step: Takes a batch.
        data: Arrays, or a dataset of batches.
        batch: Examples in a batch of arrays.
        seen: What the step leaves behind, a mean or a variable: it is read at the end, for which a device must be done.
        shuffle: Whether arrays come in random order.
    """

    def finished() -> float:
        if isinstance(seen, tf.Variable):
            return 0.0 * float(seen)
        value = float(seen.result())
        seen.reset_state()
        return value

    if isinstance(data, tf.data.Dataset):
        steps_there = tf.constant(int(data.cardinality()))

        @tf.function
        def over_dataset(iterator: Any, steps: tf.Tensor) -> None:
            for _ in tf.range(steps):
                step(*next(iterator))

        def run_dataset() -> float:
            over_dataset(iter(data), steps_there)
            return finished()

        return run_dataset
    parts = tf.nest.map_structure(tf.constant, data if isinstance(data, tuple) else (data,))
    there = len(tf.nest.flatten(parts)[0])

    @tf.function
    def over_arrays(order: tf.Tensor, steps: tf.Tensor) -> None:
        for number in tf.range(steps):
            chosen = tf.ensure_shape(order[number * batch : (number + 1) * batch], [batch])
            step(*tf.nest.map_structure(functools.partial(tf.gather, indices=chosen), parts))

    def run(steps: int | None = None) -> float:
        order = tf.range(there)
        over_arrays(tf.random.shuffle(order) if shuffle else order, tf.constant(steps or there // batch))
        return finished()

    return run
