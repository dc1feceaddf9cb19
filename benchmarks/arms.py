"""Ways to train: by tapeloop, by Keras, and by loops written by hand.

A loop by hand is what one would write with TensorFlow alone: a `tf.function` that loops over batches in the graph, and
a tape that watches what trains.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks import adversarial, own, workloads
from benchmarks.cases import Case
from benchmarks.workloads import Workload

METRICS = ("accuracy", "sparse_top_k_categorical_accuracy", "sparse_categorical_crossentropy")


@dataclass(frozen=True)
class Arm:
    """Something that trains."""

    # Goes through the first so many batches and returns the mean loss, 0 where none is: a device is done then.
    run: Callable[[int], float]
    work: Workload
    optimizers: tuple[keras.optimizers.Optimizer, ...] = ()

    def __call__(self, steps: int) -> float:
        """Go through so many batches."""
        return self.run(steps)


def make_work(case: Case) -> Workload:
    """Build what a case measures."""
    return own.make(case) if case.own else workloads.make(case)


def make_arm(case: Case, work: Workload | None = None) -> Arm:
    """Build an arm, of another workload than that of the case if it is given."""
    work = work or make_work(case)
    if case.workload == "gan":
        return _adversarial(case, work)
    made = work.optimizer()
    if case.base == "forward":
        return Arm(forward(case, work), work)
    if case.base == "tapeloop":
        return Arm(tapeloop(case, work, made), work, (made,))
    if case.base == "full":
        return Arm(by_hand(case, work, work.model, work.model.trainable_variables, made), work, (made,))
    trained = [entry.variable for entry in tl.Trainer(work.model, work.policy).selection.trained]
    if case.base == "subset":
        return Arm(by_hand(case, work, work.model, trained, made), work, (made,))
    if case.base == "hand" and "features" in case.changes:
        head = work.model.get_layer("head")
        features = tf.random.stateless_normal((case.batch * case.steps, head.kernel.shape[0]), (0, 1))
        work = Workload(head, (features, work.data[1]), work.loss, work.policy)
        return Arm(by_hand(case, work, head, head.trainable_variables, made), work, (made,))
    freeze(work.model, trained)
    if case.base == "hand":
        return Arm(by_hand(case, work, work.frozen_first or work.model, trained, made), work, (made,))
    return Arm(keras_fit(case, work, made), work, (made,))


def freeze(model: keras.Model, trained: Sequence[keras.Variable]) -> None:
    """Set Keras' flags so that nothing but `trained` trains, and what has nothing that trains is in inference mode."""
    chosen = {id(variable) for variable in trained}
    for layer in _leaves(model):
        if layer.trainable_variables and not any(id(variable) in chosen for variable in layer.trainable_variables):
            layer.trainable = False
    for variable in model.trainable_variables:
        variable.trainable = id(variable) in chosen


def _leaves(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def cuts(data: Any, batch: int) -> Callable[[int], Any]:
    """Return what gives the first so many batches of some data, the same arrays each time."""
    there = len(tf.nest.flatten(data)[0])

    @functools.cache
    def cut(steps: int) -> Any:
        count = steps * batch
        return data if count == there else tf.nest.map_structure(lambda part: part[:count], data)

    return cut


def datasets(data: Any, batch: int) -> Callable[[int], tf.data.Dataset]:
    """Return what gives the first so many batches as a dataset."""
    whole = tf.data.Dataset.from_tensor_slices(data).batch(batch, drop_remainder=True)
    return functools.cache(whole.take)


class Looks(keras.callbacks.Callback):
    """Looks at epochs."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the logs."""
        self.seen = logs


class Watches(keras.callbacks.Callback):
    """Looks at each batch."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the logs."""
        self.seen = logs


def _fitted(case: Case) -> dict[str, Any]:
    """Return the options of a fit, in tapeloop and in Keras."""
    kinds = [kind for change, kind in (("looks", Looks), ("watches", Watches)) if change in case.changes]
    verbose = int("metrics" in case.changes)
    return {"verbose": verbose, "shuffle": False, "callbacks": [kind() for kind in kinds]}


def tapeloop(case: Case, work: Workload, optimizer: Any, trainer_type: type[tl.Trainer] = tl.Trainer) -> Any:
    """Return a trainer's run, with what comes by default but for what the case changes."""
    changes, options = case.changes, _fitted(case)
    made: dict[str, Any] = {"loss": work.loss, "optimizer": optimizer}
    made |= {"jit_compile": True} if "xla" in changes else {}
    made |= {"fold_frozen": "fold" in changes} if {"fold", "plain"} & set(changes) else {}
    made |= {"remat": "**/block*" if case.workload == "resnet50-blocks" else "block*"} if "remat" in changes else {}
    micro = [int(change[5:]) for change in changes if change.startswith("micro")]
    made |= {"microbatches": micro[0]} if micro else {}
    made |= {"metrics": list(METRICS)} if "metrics" in changes else {}
    trainer = trainer_type(work.model, work.policy, **made)
    options |= {"feature_cache": "memory"} if "cache" in changes else {}
    from_data = datasets if "dataset" in changes else cuts
    options |= {"batch_size": case.batch} if from_data is cuts else {}
    some = from_data(work.data, case.batch)

    def run(steps: int) -> float:
        if "onbatch" in changes:
            return float(
                [trainer.train_on_batch(*batch) for batch in datasets(work.data, case.batch)(steps)][-1]["loss"]
            )
        if "saved" in changes:
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = tl.Checkpoints(folder, every_steps=50, every_epochs=None)
                return float(trainer.fit(some(steps), checkpoint=checkpoints, **options).history["loss"][-1])
        if "epochwise" in changes:
            return float(trainer.fit(some(1), epochs=steps, **options).history["loss"][-1])
        return float(trainer.fit(some(steps), **options).history["loss"][-1])

    return run


def keras_fit(case: Case, work: Workload, optimizer: Any) -> Callable[[int], float]:
    """Return Keras' `fit`: as it comes, or with several steps a call."""
    metrics = list(METRICS) if "metrics" in case.changes else None
    several = min(16, case.steps) if "tuned" in case.changes else 1
    work.model.compile(
        optimizer, work.loss, metrics=metrics, jit_compile="xla" in case.changes, steps_per_execution=several
    )
    some, batches = cuts(work.data, case.batch), datasets(work.data, case.batch)
    options = _fitted(case)

    def run(steps: int) -> float:
        if "onbatch" in case.changes:
            logs = [work.model.train_on_batch(*batch, return_dict=True) for batch in batches(steps)]
            return float(logs[-1]["loss"])
        if "dataset" in case.changes:
            return float(work.model.fit(batches(steps), **options).history["loss"][-1])
        return float(work.model.fit(*some(steps), batch_size=case.batch, **options).history["loss"][-1])

    return run


def by_hand(
    case: Case, work: Workload, model: Callable[..., Any], trained: Sequence[keras.Variable], optimizer: Any
) -> Callable[[int], float]:
    """Return a loop written with TensorFlow alone.

    The loss is that of each output, and what the model adds. `subset` has a default tape.
    """
    optimizer.build(trained)
    sources = [variable.value for variable in trained]
    mean, loss_of, is_guarded = keras.metrics.Mean(), work.loss, "guard" in case.changes

    def compute(x: Any, y: Any) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=case.base == "subset") as tape:
            tape.watch(sources)
            outputs = model(x, training=True)
            parts = [loss_of(*both) for both in zip(tf.nest.flatten(y), tf.nest.flatten(outputs))]
            value = tf.add_n([*parts, *getattr(model, "losses", [])])
        gradients = tape.gradient(value, sources)
        if is_guarded:
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in [value, *gradients]])
            tf.cond(finite, lambda: [optimizer.apply(gradients, trained), True][1], lambda: False)
        else:
            optimizer.apply(gradients, trained)
        return value

    compiled = tf.function(compute, jit_compile=True, autograph=False) if "xla" in case.changes else compute

    def step(x: Any, y: Any) -> None:
        mean.update_state(compiled(x, y), tf.shape(tf.nest.flatten(x)[0])[0])

    return looped(case, step, work.data, mean)


def forward(case: Case, work: Workload) -> Callable[[int], float]:
    """Return a loop of forward passes alone."""
    seen = tf.Variable(0.0)

    def compute(x: Any) -> tf.Tensor:
        outputs = tf.nest.flatten(work.model(x, training=False))
        return tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32)) for output in outputs])

    compiled = tf.function(compute, jit_compile=True, autograph=False) if "xla" in case.changes else compute
    return looped(case, lambda x, y: seen.assign(compiled(x)), work.data, seen)


def looped(case: Case, step: Callable[..., Any], data: Any, seen: Any) -> Callable[[int], float]:
    """Return a loop in the graph over the batches of some data: over a dataset, or gathered from arrays.

    At its end it reads `seen`, a mean or a variable that the step leaves behind, for which a device must be done.
    """
    parts = tf.nest.map_structure(tf.convert_to_tensor, data if isinstance(data, tuple) else (data,))
    order = tf.range(len(tf.nest.flatten(parts)[0]))

    @tf.function
    def over_arrays(order: tf.Tensor, steps: tf.Tensor) -> None:
        for number in tf.range(steps):
            chosen = tf.ensure_shape(order[number * case.batch : (number + 1) * case.batch], [case.batch])
            step(*tf.nest.map_structure(functools.partial(tf.gather, indices=chosen), parts))

    @tf.function
    def over_dataset(iterator: Any, steps: tf.Tensor) -> None:
        for _ in tf.range(steps):
            step(*next(iterator))

    batches = datasets(parts, case.batch) if "dataset" in case.changes else None

    def run(steps: int) -> float:
        if batches is not None:
            over_dataset(iter(batches(steps)), tf.constant(steps))
        elif "epochwise" in case.changes:
            for _ in range(steps):
                over_arrays(order, tf.constant(1))
        else:
            over_arrays(order, tf.constant(steps))
        if isinstance(seen, tf.Variable):
            return 0.0 * float(seen)
        value = float(seen.result())
        seen.reset_state()
        return value

    return run


def _adversarial(case: Case, work: Workload) -> Arm:
    optimizers = {name: work.optimizer() for name in work.model}
    if case.base == "tapeloop":
        run = tapeloop(case, work, optimizers, adversarial.AdversarialTrainer)
    else:
        mean = keras.metrics.Mean()
        step = adversarial.by_hand(work.model, optimizers, takes_all=case.base == "full", xla="xla" in case.changes)
        run = looped(case, lambda real: mean.update_state(step(real)), work.data, mean)
    return Arm(run, work, tuple(optimizers.values()))
