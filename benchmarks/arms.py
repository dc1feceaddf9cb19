"""Ways to train: by tapeloop, by Keras, and by loops written by hand.

A loop by hand is what one would write with TensorFlow alone: a `tf.function` that loops over batches in the graph, and
a tape that watches what trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

import tapeloop as tl
from benchmarks import workloads
from benchmarks.cases import Case
from benchmarks.measure import short_of
from benchmarks.workloads import Workload

METRICS = ("accuracy", "sparse_top_k_categorical_accuracy", "sparse_categorical_crossentropy")
NETWORKS = ("discriminator", "generator")  # of a GAN, in the order of their updates
TRAINER_OPTIONS: dict[str, dict[str, Any]] = {  # by what is changed of tapeloop's arm
    "xla": {"jit_compile": True}, "plain": {"fold_frozen": False},
    "metrics": {"metrics": list(METRICS)}, **{f"micro{number}": {"microbatches": number} for number in (2, 4, 8)},
}  # fmt: skip


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


def make_arm(case: Case, work: Workload | None = None) -> Arm:
    """Build an arm, of another workload than that of the case if it is given."""
    work = work or workloads.make(case)
    if case.workload == "gan":
        return adversarial(case, work)
    if case.base == "forward":
        return Arm(forward(case, work), work)
    made, model = work.optimizer(), work.model
    if case.base == "tapeloop":
        return Arm(tapeloop(case, work, made), work, (made,))
    if case.base == "full":
        return Arm(by_hand(case, work, model, model.trainable_variables, made), work, (made,))
    trained = [entry.variable for entry in tl.Trainer(model, work.policy).selection.trained]
    if "features" in case.changes:
        model = model.get_layer("head")
        trained = model.trainable_variables
        features = tf.random.stateless_normal((case.batch * case.steps, model.kernel.shape[0]), (0, 1))
        work = dataclasses.replace(work, model=model, data=(features, work.data[1]))
    elif case.base != "subset":
        workloads.freeze(model, trained)
    run = keras_fit(case, work, made) if case.base == "keras" else by_hand(case, work, model, trained, made)
    return Arm(run, work, (made,))


def cuts(data: Any, batch: int) -> Callable[[int], Any]:
    """Return what gives the first so many batches of some data, the same arrays each time."""

    def cut(steps: int) -> Any:
        count = steps * batch
        return tf.nest.map_structure(lambda part: part if len(part) == count else part[:count], data)

    return functools.cache(cut)


def datasets(data: Any, batch: int) -> Callable[[int], tf.data.Dataset]:
    """Return what gives the first so many batches as a dataset."""
    return functools.cache(lambda steps: tf.data.Dataset.from_tensor_slices(data).batch(batch, True).take(steps))


def epoch_of(case: Case, steps: int) -> int:
    """Return how many steps the epochs of a round have in which an arm goes through features again and again.

    A long round has more of them than a short one, over the same data: it takes features to be computed once for both.
    """
    return math.gcd(case.steps, short_of(case.steps), steps)


def _look(self: keras.callbacks.Callback, number: int, logs: dict[str, Any] | None = None) -> None:
    self.seen = logs


# Callbacks that have a look at what they are told, after each epoch or after each batch.
CALLBACKS = {
    change: type(change, (keras.callbacks.Callback,), {event: _look})
    for change, event in (("looks", "on_epoch_end"), ("watches", "on_train_batch_end"))
}


def _fitted(case: Case) -> dict[str, Any]:
    """Return the options of a fit, in tapeloop and in Keras."""
    callbacks = [kind() for change, kind in CALLBACKS.items() if change in case.changes]
    return {"verbose": int("metrics" in case.changes), "shuffle": False, "callbacks": callbacks}


def tapeloop(case: Case, work: Workload, optimizer: Any, trainer_type: type[tl.Trainer] = tl.Trainer) -> Any:
    """Return a trainer's run, with what comes by default in a long fit but for what the case changes.

    A fit of 50 steps or more is folded by default. Rounds may be shorter, and stand for such a fit.
    """
    changes, options = case.changes, _fitted(case)
    is_long = not {"onbatch", "watches"} & {*changes}  # the host has a look at each batch: never folded by default
    made = {"loss": work.loss, "optimizer": optimizer, "fold_frozen": True if is_long else "auto"}
    for change in changes:
        made |= TRAINER_OPTIONS.get(change, {})
    if "remat" in changes:
        made["remat"] = "**/block*" if case.workload == "resnet50-blocks" else "block*"
    trainer = trainer_type(work.model, work.policy, **made)
    options |= {"feature_cache": "memory"} if "cache" in changes else {}
    options |= {} if "dataset" in changes else {"batch_size": case.batch}
    batches = datasets(work.data, case.batch)
    some = batches if "dataset" in changes else cuts(work.data, case.batch)

    def run(steps: int) -> float:
        if "onbatch" in changes:
            return float([trainer.train_on_batch(*batch) for batch in batches(steps)][-1]["loss"])
        epoch = 1 if "epochwise" in changes else epoch_of(case, steps)
        if "epochwise" in changes or "cache" in changes:
            return float(trainer.fit(some(epoch), epochs=steps // epoch, **options).history["loss"][-1])
        with tempfile.TemporaryDirectory() if "saved" in changes else contextlib.nullcontext() as folder:
            saved = {"checkpoint": tl.Checkpoints(folder, every_steps=50, every_epochs=None)} if folder else {}
            return float(trainer.fit(some(steps), **saved, **options).history["loss"][-1])

    return run


def keras_fit(case: Case, work: Workload, optimizer: Any) -> Callable[[int], float]:
    """Return Keras' `fit`: as it comes, or with several steps a call."""
    model = work.model
    metrics = list(METRICS) if "metrics" in case.changes else None
    several = min(16, case.steps) if "tuned" in case.changes else 1
    xla = True if "xla" in case.changes else "auto"
    model.compile(optimizer, work.loss, metrics=metrics, jit_compile=xla, steps_per_execution=several)
    with tf.device("CPU:0"):  # from where Keras reads; of data on a GPU it would make a copy in each fit
        data = tf.nest.map_structure(tf.identity, work.data)
    some, batches = cuts(data, case.batch), datasets(data, case.batch)
    options = _fitted(case)

    def run(steps: int) -> float:
        if "onbatch" in case.changes:
            logs = [model.train_on_batch(*batch, return_dict=True) for batch in batches(steps)]
            return float(logs[-1]["loss"])
        if "dataset" in case.changes:
            return float(model.fit(batches(steps), **options).history["loss"][-1])
        return float(model.fit(*some(steps), batch_size=case.batch, **options).history["loss"][-1])

    return run


def by_hand(
    case: Case, work: Workload, model: Callable[..., Any], trained: Sequence[keras.Variable], optimizer: Any
) -> Callable[[int], float]:
    """Return a loop written with TensorFlow alone.

    The loss is that of each output, and what the model adds. `subset` has a default tape.
    """
    optimizer.build(trained)
    sources = [variable.value for variable in trained]
    mean, is_guarded = keras.metrics.Mean(), "guard" in case.changes

    def compute(x: Any, y: Any) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=case.base == "subset") as tape:
            tape.watch(sources)
            outputs = model(x, training=True)
            parts = [work.loss(*both) for both in zip(tf.nest.flatten(y), tf.nest.flatten(outputs))]
            value = tf.add_n([*parts, *getattr(model, "losses", [])])
        gradients = tape.gradient(value, sources)
        if is_guarded:
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in [value, *gradients]])
            tf.cond(finite, lambda: [optimizer.apply(gradients, trained), True][1], lambda: False)
        else:
            optimizer.apply(gradients, trained)
        return value

    compiled = _compiled(case, compute)

    def step(x: Any, y: Any) -> None:
        mean.update_state(compiled(x, y), tf.shape(tf.nest.flatten(x)[0])[0])

    return looped(case, step, work.data, mean)


def _compiled(case: Case, compute: Callable[..., Any]) -> Callable[..., Any]:
    return tf.function(compute, jit_compile=True, autograph=False) if "xla" in case.changes else compute


def forward(case: Case, work: Workload) -> Callable[[int], float]:
    """Return a loop of forward passes alone."""
    seen = tf.Variable(0.0)

    def compute(x: Any) -> tf.Tensor:
        outputs = tf.nest.flatten(work.model(x, training=False))
        return tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32)) for output in outputs])

    compiled = _compiled(case, compute)
    return looped(case, lambda x, y: seen.assign(compiled(x)), work.data, seen)


def looped(case: Case, step: Callable[..., Any], data: Any, seen: Any) -> Callable[[int], float]:
    """Return a loop in the graph over the batches of some data: over a dataset, or gathered from arrays.

    At its end it reads `seen`, a mean or a variable that the step leaves behind, for which a device must be done.
    """
    parts = tf.nest.map_structure(tf.convert_to_tensor, data if isinstance(data, tuple) else (data,))
    order = tf.range(len(tf.nest.flatten(parts)[0]))
    batches = datasets(parts, case.batch)

    @tf.function
    def over_arrays(order: tf.Tensor, steps: tf.Tensor) -> None:
        for number in tf.range(steps):
            chosen = tf.ensure_shape(order[number * case.batch : (number + 1) * case.batch], [case.batch])
            step(*tf.nest.map_structure(functools.partial(tf.gather, indices=chosen), parts))

    @tf.function
    def over_dataset(iterator: Any, steps: tf.Tensor) -> None:
        for _ in tf.range(steps):
            step(*next(iterator))

    def run(steps: int) -> float:
        if "dataset" in case.changes:
            over_dataset(iter(batches(steps)), tf.constant(steps))
        else:
            some = epoch_of(case, steps) if "features" in case.changes else 1 if "epochwise" in case.changes else steps
            for _ in range(steps // some):
                over_arrays(order, tf.constant(some))
        if isinstance(seen, tf.Variable):
            return 0.0 * float(seen)
        value = float(seen.result())
        seen.reset_state()
        return value

    return run


def adversarial_loss(name: str, networks: dict[str, keras.Model], real: tf.Tensor) -> tf.Tensor:
    """Return how badly one of the two does, told by the discriminator (Goodfellow et al., 2014, section 3)."""
    noise = tf.reshape(real, [tf.shape(real)[0], -1])[
        :, : workloads.NOISE
    ]  # numbers of the images: all arms have the same
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
        for name in NETWORKS:
            with self.tape(name) as tape:
                loss = adversarial_loss(name, self.model, batch)
            self.update(tape, loss)
            total += loss
        return {"loss": total}


def adversarial(case: Case, work: Workload) -> Arm:
    """Build an arm of two networks. `full` takes gradients of both in each update, not of the updated one alone."""
    optimizers = {name: work.optimizer() for name in work.model}
    if case.base == "tapeloop":
        return Arm(tapeloop(case, work, optimizers, AdversarialTrainer), work, tuple(optimizers.values()))
    trained = {name: work.model[name].trainable_variables for name in NETWORKS}
    for name, optimizer in optimizers.items():
        optimizer.build(trained[name])
    mean, unused = keras.metrics.Mean(), tf.Variable(0.0)

    def compute(real: tf.Tensor) -> tf.Tensor:
        total = 0.0
        for name in NETWORKS:
            others = [trained[other] for other in NETWORKS if other != name and case.base == "full"]
            sources = [variable.value for variable in sum(others, trained[name])]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                loss = adversarial_loss(name, work.model, real)
            gradients = tape.gradient(loss, sources)
            count = len(trained[name])
            optimizers[name].apply(gradients[:count], trained[name])
            for gradient in filter(lambda one: one is not None, gradients[count:]):
                unused.assign(tf.reduce_sum(gradient))  # or the graph would not compute it
            total += loss
        return total

    step = _compiled(case, compute)
    run = looped(case, lambda real: mean.update_state(step(real)), work.data, mean)
    return Arm(run, work, tuple(optimizers.values()))
