"""Runs of many kinds that are stopped and go on: each kind makes the same trainer and data in every process."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tapeloop.checkpoint.session import CheckpointSession
from tapeloop.model.tree import Tree

layers = keras.layers
EXAMPLES, BATCH = 20, 4  # five steps an epoch
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(EXAMPLES, 4)).astype("float32")
Y = RANDOM.normal(size=(EXAMPLES, 3)).astype("float32")


@dataclasses.dataclass(frozen=True)
class Run:
    """A kind of run: what makes its trainer, its data, and the options of its fits."""

    trainer: Callable[[], tl.Trainer]
    data: Callable[[], Any] = lambda: (X, Y)
    options: dict = dataclasses.field(default_factory=dict)

    def fit(self, epochs, checkpoint=None, **options):
        """Make the trainer anew, and fit it: what a program does that is run again."""
        trainer = self.trainer()
        if checkpoint is not None and list(
            pathlib.Path(getattr(checkpoint, "directory", checkpoint)).glob("0*-step-*")
        ):
            forget(trainer)
        given = {"batch_size": BATCH, "verbose": 0, **self.options, **options}
        trainer.fit(self.data(), epochs=epochs, checkpoint=checkpoint, **given)
        return trainer


def forget(trainer):
    """Give the model other weights than it began with, frozen ones too: a run that does not load them is found out."""
    for variable in Tree.of(trainer.model).variables:
        if tf.as_dtype(variable.dtype).is_floating:
            variable.tf_variable.assign_add(tf.ones_like(variable.tf_variable))


def model(**options):
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="relu", name="base")(inputs)
    hidden = layers.BatchNormalization(name="norm")(hidden)
    hidden = layers.Dropout(0.3, name="drop")(hidden)
    return keras.Model(inputs, layers.Dense(3, name="head", **options)(hidden))


def made(policy=lambda: None, kind=tl.Trainer, network=model, **options):
    """What makes a trainer, by default with an optimizer that has moments and weight decay."""

    def trainer():
        keras.utils.set_random_seed(1)
        optimizer = options.get("optimizer", lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1))
        others = {name: value for name, value in options.items() if name != "optimizer"}
        return kind(network(), policy(), **{"loss": "mse", "optimizer": optimizer(), "seed": 5, **others})

    return trainer


class Drawn(tl.VariablePolicy):
    """Draws at each epoch what trains, and keeps how often it was asked."""

    def __init__(self):
        self.random = random.Random(3)
        self.asked, self.drawn = 0, []

    def at(self, progress):
        self.asked += 1
        self.drawn.append(self.random.choice(["base", "head", "norm"]))
        return tl.TrainOnly("head", self.drawn[-1]) if self.drawn[-1] != "head" else tl.TrainOnly("head")


@dataclasses.dataclass
class Unhashable(tl.VariablePolicy):
    """A policy without a hash, of fields that can be written."""

    frozen: str = "base"

    def group(self, variable):
        return None if variable.path.startswith(self.frozen) else "rest"


class Counting(tl.Trainer):
    """Keeps a count, a generator and a metric of its own, and moves a second model towards the first."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = tf.Variable(0, trainable=False)
        self.noise = tf.random.Generator.from_seed(2)
        self.norms = {"norm": keras.metrics.Mean(name="norm")}
        self.teacher = model()

    def train_step(self, batch):
        x, y = batch
        self.seen.assign_add(1)
        x = x + 0.1 * self.noise.normal(tf.shape(x))
        with self.tape() as tape:
            loss = keras.ops.mean((self.forward(x, training=True) - y) ** 2)
        self.update(tape, loss)
        self.follow(self.teacher, self.model, decay=0.9)
        self.norms["norm"].update_state(tf.norm(x))
        return {"loss": loss, "norm": self.norms["norm"]}

    def compute_loss(self, batch, training):
        return keras.ops.mean((self.forward(batch[0], training=training) - batch[1]) ** 2)


class Adversarial(tl.Trainer):
    """Two networks against each other."""

    def train_step(self, batch):
        with self.tape("judge") as tape:
            fake = self.model["maker"](batch[1], training=True)
            judged = self.model["judge"](batch[0], training=True) - self.model["judge"](fake, training=True)
            judge = keras.ops.mean(keras.ops.softplus(-judged))
        self.update(tape, judge)
        with self.tape("maker") as tape:
            made = self.model["judge"](self.model["maker"](batch[1], training=True), training=True)
            maker = keras.ops.mean(keras.ops.softplus(-made))
        self.update(tape, maker)
        return {"judge": judge, "maker": maker}


def networks():
    maker = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="make"), layers.BatchNormalization(name="bn")])
    judge = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="look"), layers.Dropout(0.2, name="drop"),
                              layers.Dense(1, name="judge")])  # fmt: skip
    return {"maker": maker, "judge": judge}


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__(workers=1)

    def __len__(self):
        return EXAMPLES // BATCH

    def __getitem__(self, number):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        return X[rows], Y[rows]


class Iterated:
    """Batches of uneven lengths, so that signatures change on the way."""

    def __iter__(self):
        for start, stop in ((0, 4), (4, 8), (8, 11), (11, 16), (16, 20)):
            yield X[start:stop], Y[start:stop]


def dataset(seed=3):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(10, seed=seed)
    return data.map(lambda x, y: (x + 1, y)).batch(BATCH).prefetch(2)


def float16():
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        return model(dtype="float32")
    finally:
        keras.mixed_precision.set_global_policy("float32")


GROUPS = {"base": tl.glob("base"), "head": tl.glob("head")}
VALIDATED = {"validation_data": (X[:8], Y[:8])}
RUNS = {
    "plain": Run(made(metrics=["mae"], ema=0.9), options=VALIDATED),
    "gradual": Run(made(lambda: tl.GradualUnfreeze(["head", "norm", "base"], decay=0.5), ema=0.9), options=VALIDATED),
    "cycle": Run(made(lambda: tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base", "norm")], every=2), ema=0.9)),
    "random": Run(made(lambda: tl.RandomSubset(1, of=layers.Dense, every=3, always="norm"), metrics=["mae"])),
    "drawn": Run(made(Drawn)),
    "unhashable": Run(made(Unhashable)),
    "groups": Run(made(lambda: tl.Groups(GROUPS), optimizer=lambda: {
        "base": keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9), momentum=0.9),
        "head": keras.optimizers.Adam(0.01)})),
    "microbatches": Run(made(microbatches=2, clip_norm=0.5)),
    "float16": Run(made(network=float16)),
    "skips": Run(made(nonfinite="skip"), lambda: (np.where(np.arange(EXAMPLES)[:, None] == 7, np.nan, X), Y)),
    "cached": Run(made(lambda: tl.Freeze("base")), options={"feature_cache": "memory"}),
    "adversarial": Run(made(lambda: tl.Groups({"judge": "judge", "maker": "maker"}), Adversarial, networks, loss=None,
                            optimizer=lambda: {"judge": "adam", "maker": "sgd"})),
    "counting": Run(made(kind=Counting, loss=None)),
    "dataset": Run(made(), dataset),
    "iterated": Run(made(metrics=["mae"]), Iterated),
    "pydataset": Run(made(), Batches),
    "portions": Run(made(), options={"steps_per_epoch": 3}),
    "dataset portions": Run(made(), dataset, {"steps_per_epoch": 3}),
}  # fmt: skip


def digest(trainer):
    """A digest of all that a run has come to: variables, counts, logs and phases."""
    variables = trainer._contents.variables()
    said = {name: hashlib.sha256(variable.numpy().tobytes()).hexdigest() for name, variable in variables.items()}
    history = trainer.history
    said["history"] = repr(
        (history.epoch, {name: list(map(float, log)) for name, log in sorted(history.history.items())})
    )
    said["phases"] = repr([(phase.step, phase.epoch, phase.selection.describe()) for phase in history.phases])
    said["counts"] = repr((trainer.step, trainer.epoch, trainer.state.skipped_steps, trainer.loss_scale))
    said["policy"] = repr(trainer.policy.get_state())
    return said


@functools.cache
def uninterrupted(kind, epochs):
    """The digest of a run that nothing has stopped."""
    return digest(RUNS[kind].fit(epochs))


@contextlib.contextmanager
def interrupted_at(step):
    """Have a fit that saves itself be stopped by Ctrl-C after this step."""
    steps_left, after_steps = CheckpointSession.steps_left, CheckpointSession.after_steps

    def fewer(session):
        done = session._contents.loop.state.step
        return min(steps_left(session), step - done if step > done else 1)

    def stop(session, *args):
        after_steps(session, *args)
        if session._contents.loop.state.step >= step:
            raise KeyboardInterrupt

    CheckpointSession.steps_left, CheckpointSession.after_steps = fewer, stop
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        CheckpointSession.steps_left, CheckpointSession.after_steps = steps_left, after_steps
