"""The same models on JAX, by Keras' backend for it, trained by a jitted step and Optax: what another framework takes.

A process of its own, in which Keras runs on JAX. Gradients are not compared: weights are drawn by another generator.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import jax
import keras
import numpy as np
import optax
import tensorflow as tf

from benchmarks import devices
from benchmarks.cases import Case
from benchmarks.measure import rounds
from benchmarks.workloads import make


def make_arm(case: Case) -> Callable[[int], float]:
    """Build an arm, which goes through the data in its order and returns the mean loss."""
    work = make(case)
    model, call = work.model, work.frozen_first or work.model
    trained = (model if case.selection == "all" else model.get_layer("head")).trainable_variables
    chosen = set(map(id, trained))
    others = [variable for variable in model.variables if id(variable) not in chosen]
    data = jax.device_put(tuple(np.asarray(part) for part in work.data))
    optimizer, values = optax.adam(1e-4), [variable.value for variable in trained]

    def loss_of(values: Any, kept: Any, x: Any, y: Any) -> tuple[Any, Any]:
        with keras.StatelessScope([*zip(trained, values), *zip(others, kept)]) as scope:
            outputs = call(x, training=True).astype("float32")
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
        return loss, [scope.get_current_value(variable) for variable in others]

    def train(state: Any, data: Any, number: Any) -> Any:
        values, kept, moments, total = state
        batch = [jax.lax.dynamic_slice_in_dim(part, number * case.batch, case.batch) for part in data]
        (loss, kept), gradients = jax.value_and_grad(loss_of, has_aux=True)(values, kept, *batch)
        updates, moments = optimizer.update(gradients, moments, values)
        return optax.apply_updates(values, updates), kept, moments, total + loss

    compiled = jax.jit(train, donate_argnums=0)
    state = (values, [variable.value for variable in others], optimizer.init(values), jax.numpy.zeros(()))

    def run(steps: int) -> float:
        nonlocal state
        for number in range(steps):
            state = compiled(state, data, number)
        total = float(state[3])
        state = (*state[:3], jax.numpy.zeros(()))
        return total / steps

    run.data_bytes = sum(part.nbytes for part in data)
    return run


def step(case: Case) -> Generator[None, None, dict[str, Any]]:
    """Time an arm; on a GPU, read JAX's allocator too, less the data of steps but two, as for TensorFlow."""
    if devices.gpus() and jax.default_backend() == "cpu":
        raise RuntimeError("JAX does not see the GPU: install `jax[cuda12]`, or whatever its CUDA is.")
    tf.config.set_visible_devices([], "GPU")  # which draws the data, and must not take a GPU's memory
    arm, figures = yield from rounds(case, lambda: make_arm(case))
    said = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in said:
        spare = int(arm.data_bytes * (1 - min(case.steps, 2) / case.steps))
        figures["peak"] = said["peak_bytes_in_use"] - spare
    return figures
