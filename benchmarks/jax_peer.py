"""The same models on JAX, by Keras' backend for it, trained by a jitted loop and Optax: what another framework takes.

A process of its own, in which Keras runs on JAX. Gradients are not compared: weights are drawn by another generator.
"""

from __future__ import annotations

import functools
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
from benchmarks.workloads import freeze, make


def make_arm(case: Case) -> Callable[[int], float]:
    """Build an arm, which goes through the data in its order and returns the mean loss."""
    work = make(case)
    model = work.model
    trained = (model if case.selection == "all" else model.get_layer("head")).trainable_variables
    freeze(model, trained)
    chosen = set(map(id, trained))
    others = [variable for variable in model.variables if id(variable) not in chosen]
    data = jax.device_put(tuple(np.asarray(part) for part in work.data))
    optimizer, values = optax.adam(1e-4), [variable.value for variable in trained]

    def loss_of(values: Any, kept: Any, x: Any, y: Any) -> tuple[Any, Any]:
        with keras.StatelessScope([*zip(trained, values), *zip(others, kept)]) as scope:
            outputs = model(x, training=True).astype("float32")
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
        return loss, [scope.get_current_value(variable) for variable in others]

    def train(data: Any, number: Any, state: Any) -> Any:
        values, kept, moments, total = state
        batch = [jax.lax.dynamic_slice_in_dim(part, number * case.batch, case.batch) for part in data]
        (loss, kept), gradients = jax.value_and_grad(loss_of, has_aux=True)(values, kept, *batch)
        updates, moments = optimizer.update(gradients, moments, values)
        return optax.apply_updates(values, updates), kept, moments, total + loss

    @functools.partial(jax.jit, donate_argnums=0)
    def several(state: Any, data: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, functools.partial(train, data), state)

    state = (values, [variable.value for variable in others], optimizer.init(values), jax.numpy.zeros(()))

    def run(steps: int) -> float:
        nonlocal state
        state = several(state, data, steps)
        total = float(state[3])
        state = (*state[:3], jax.numpy.zeros(()))
        return total / steps

    return run


def step(case: Case) -> Generator[None, None, dict[str, Any]]:
    """Time an arm. Its peak is not told: JAX cannot begin it anew after the warm-up, as is done for the others."""
    if devices.gpus() and jax.default_backend() == "cpu":
        raise RuntimeError("JAX does not see the GPU: install `jax[cuda12]`, or whatever its CUDA is.")
    tf.config.set_visible_devices([], "GPU")  # of TensorFlow, which draws the data and must not take a GPU's memory
    _, figures = yield from rounds(case, lambda: make_arm(case))
    return figures
