"""Small runs that several devices must end as one does, and what runs them: in this process, or as a program.

python -m tests.support.distributed FOLDER NAME...      # on one device, two logical ones, or as a worker of several
"""

import contextlib
import json
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

STEPS = 20
dense = keras.layers.Dense


def data(examples=80):
    """Inputs and classes."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(examples, 6)).astype("float32"), generator.integers(0, 3, examples)


def classifier():
    """A model of two parts; the first has batch statistics, which stay as they are while it is frozen."""
    keras.utils.set_random_seed(3)
    norm = keras.layers.BatchNormalization(name="norm")
    base = keras.Sequential([keras.Input((6,)), dense(8, "relu", name="wide"), norm], name="base")
    return keras.Sequential([keras.Input((6,)), base, dense(3, name="head")])


def plain():
    """A model of two parts, both of which compute each example by itself."""
    keras.utils.set_random_seed(3)
    base = keras.Sequential([keras.Input((6,)), dense(8, "relu", name="wide")], name="base")
    return keras.Sequential([keras.Input((6,)), base, dense(3, name="head")])


class Noting(keras.layers.Layer):
    """Keeps the mean of what it sees in a metric."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, inputs):
        self.seen.update_state(inputs)
        return inputs


class Moving(keras.layers.Layer):
    """Moves a trained weight and a whole number by what it sees, whatever the gradient is."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(), initializer="zeros", name="weight")
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="count")

    def call(self, inputs):
        self.weight.assign_add(0.1 * tf.reduce_mean(inputs))
        self.count.assign_add(tf.reduce_sum(tf.cast(inputs > 0, tf.int32)))
        return inputs + self.weight


def with_layer(layer):
    """A classifier with one more layer."""
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), dense(8, "relu", name="base"), layer, dense(3, name="head")])


def gan():
    """Two models that train against each other."""
    keras.utils.set_random_seed(3)
    critic = keras.Sequential([keras.Input((6,)), dense(8, "tanh", name="in"), dense(1, name="out")])
    maker = keras.Sequential([keras.Input((6,)), dense(8, "tanh", name="in"), dense(6, name="out")])
    return {"maker": maker, "critic": critic}


class Adversaries(tl.Trainer):
    """First the critic, then the maker, against what the critic has become."""

    def train_step(self, batch):
        real = batch
        noise = tf.reverse(real, [1])
        with self.tape("critic") as tape:
            made = self.model["maker"](noise)
            loss = tf.reduce_mean(self.model["critic"](made) - self.model["critic"](real))
        self.update(tape, loss)
        with self.tape("maker") as tape:
            fooled = -tf.reduce_mean(self.model["critic"](self.model["maker"](noise)))
        self.update(tape, fooled)
        return {"critic": loss, "maker": fooled}


TWO = tl.Groups({"base": "base", "head": "head"})
CLASSES = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}
# What is made, the policy, options of the trainer, options of the fit.
EVALUATED = "head", "ema", "dataset"
RUNS = {
    "head": (classifier, tl.Freeze("base"), CLASSES, {}),
    "two_groups": (plain, TWO, {**CLASSES, "log_updates": True}, {}),
    "unfreezing": (plain, tl.GradualUnfreeze(["head", "base"], every=2), CLASSES, {}),
    "micro_batches": (plain, tl.TrainAll(), {**CLASSES, "microbatches": 2}, {}),
    "clipping": (plain, TWO, {**CLASSES, "clip_norm": {"base": 0.05, "head": 0.1}}, {}),
    "ragged": (plain, tl.TrainAll(), CLASSES, {"examples": 77}),
    "gan": (gan, tl.Groups({"maker": "maker", "critic": "critic"}), {}, {}),
    "ema": (classifier, tl.Freeze("base"), {**CLASSES, "ema": 0.9}, {"validate_with": "ema"}),
    "dataset": (classifier, tl.Freeze("base"), CLASSES, {"as": "dataset"}),
    "batches": (classifier, tl.Freeze("base"), CLASSES, {"as": "batches"}),
    "folded": (classifier, tl.Freeze("base"), {**CLASSES, "fold_frozen": True}, {}),
    "cached": (classifier, tl.Freeze("base"), CLASSES, {"feature_cache": "memory"}),
    "layer_metric": (lambda: with_layer(Noting()), tl.TrainAll(), CLASSES, {}),
    "moving": (lambda: with_layer(Moving(name="moving")), tl.TrainAll(), CLASSES, {}),
    "statistics": (classifier, tl.TrainAll(), CLASSES, {}),
    "skipping": (classifier, tl.Freeze("base"), {**CLASSES, "nonfinite": "skip"}, {"bad": 55}),
}


def made(name, strategy, **options):
    """A trainer of one of the runs."""
    make, policy, given, _ = RUNS[name]
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model = make()
        optimizer = keras.optimizers.Adam(1e-2) if name != "gan" else {n: keras.optimizers.SGD(0.1) for n in model}
    kind = Adversaries if name == "gan" else tl.Trainer
    return kind(model, policy, optimizer=optimizer, strategy=strategy, seed=1, **{**given, **options})


def fitted(name, strategy):
    """What a run ends with: the weights by path, the logs by name, and how many bytes a step has sent."""
    how = dict(RUNS[name][3])
    x, y = data(how.pop("examples", 80))
    x[how.pop("bad", 0)] = x[0] if "bad" not in RUNS[name][3] else np.nan
    kind, options = how.pop("as", "arrays"), {"epochs": 5, "verbose": 0, **how}
    trainer = made(name, strategy)
    if name in EVALUATED:
        options["validation_data"] = x[:21], y[:21]  # the last batch has one example, fewer than there are devices
    batches = [(x[first : first + 20], y[first : first + 20]) for first in range(0, len(x), 20)]
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(20)
    if kind == "arrays":
        history = trainer.fit(x, None if name == "gan" else y, batch_size=20, **options)
    else:
        history = trainer.fit(dataset if kind == "dataset" else batches, **options)
    weights = {variable.path: variable.variable.numpy() for variable in trainer.selection.tree.variables}
    return trainer, weights, {log: list(map(float, values)) for log, values in history.history.items()}


def strategy_here():
    """The strategy of the process: of several workers if it is one, else of two logical devices."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def main(folder, names):
    """Do some runs, and write what each has ended with: one file for each worker."""
    strategy = None if os.environ.get("ONE_DEVICE") else strategy_here()
    for name in names:
        trainer, weights, logs = fitted(name, strategy)
        worker = trainer._parts.replicas.worker
        said = {"logs": logs, "step": trainer.step, "bytes": trainer.reduced_bytes}
        np.savez(folder / f"{name}-{worker}.npz", **weights)
        (folder / f"{name}-{worker}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
