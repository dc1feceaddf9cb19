"""Gradients of one loss of several, on which not all that trains depends."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.compare import assert_close
from tests.support.fitting import refused

layers = keras.layers
RANDOM = np.random.default_rng(0)
X, A, B = (RANDOM.normal(size=(8, width)).astype("float32") for width in (4, 1, 2))


def two_tasks():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    trunk = layers.Dense(3, activation="tanh", name="trunk")(inputs)
    return keras.Model(inputs, [layers.Dense(1, name="a")(trunk), layers.Dense(2, name="b")(trunk)])


class PerTask(tl.Trainer):
    """Applies the gradients of the first loss, and twice those of the second."""

    options = {"unconnected": "zero"}

    def losses(self, batch):
        x, targets = batch
        return [tf.reduce_mean((o - y) ** 2) for o, y in zip(self.forward(x, training=True), targets)]

    def train_step(self, batch):
        with self.tape(persistent=True) as tape:
            losses = self.losses(batch)
        first, second = (self.gradients(tape, loss, **self.options) for loss in losses)
        self.apply({path: first[path] + 2 * second[path] for path in first})
        return dict(zip("ab", losses))


class Strict(PerTask):
    options = {}


class Behind(PerTask):
    def train_step(self, batch):
        with self.tape(persistent=True) as tape:
            pass
        self.apply(self.gradients(tape, self.losses(batch)[0], unconnected="zero"))
        return {}


class Misspelt(PerTask):
    options = {"unconnected": "zeros"}


def trainer_of(kind, model=None, **options):
    return kind(model or two_tasks(), optimizer=keras.optimizers.SGD(0.5), **options)


def run(trainer):
    trainer.fit([(X, (A, B))], verbose=0)


@pytest.mark.parametrize("how", [{}, {"microbatches": 2}, {"run_eagerly": True}], ids=str)
def test_what_a_loss_does_not_depend_on_gets_zeros(how):
    trainer, model = trainer_of(PerTask, **how), two_tasks()
    with tf.GradientTape() as tape:
        a, b = model(X)
        loss = tf.reduce_mean((a - A) ** 2) + 2 * tf.reduce_mean((b - B) ** 2)
    expected = [w - 0.5 * g for w, g in zip(model.get_weights(), tape.gradient(loss, model.trainable_variables))]
    run(trainer)
    assert_close(trainer, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (Strict, tl.DisconnectedError, r"`b/kernel`, `b/bias`: .*`self.gradients\(tape, loss, unconnected='zero'\)`"),
        (Behind, tl.DisconnectedError, r"6 of the 6 .* is computed after the `with self.tape\(...\)` block"),
        (Misspelt, ValueError, r"`unconnected` must be 'error' or 'zero'. Received: 'zeros'"),
    ],
)
def test_it_is_said_where_it_is_meant(kind, error, text):
    trainer = trainer_of(kind)
    with refused(trainer, error, text):
        run(trainer)


class Kept(layers.Layer):
    """A layer beside the loss, with a variable of integers or one that Keras overwrites by its "gradient"."""

    def __init__(self, **weight):
        super().__init__()
        self.weight = weight

    def build(self, shape):
        self.kept = self.add_weight(shape=(), initializer="ones", name="kept", **self.weight)
        self.kept.overwrite_with_gradient = not self.weight

    def call(self, inputs):
        return inputs


class Beside(PerTask):
    """Trains on the first loss of two tasks, beside a layer on which it does not depend."""

    def forward(self, inputs, training):
        return self.model["tasks"](inputs, training=training)

    def train_step(self, batch):
        with self.tape() as tape:
            loss = self.losses(batch)[0]
        self.apply(self.gradients(tape, loss, unconnected="zero"))
        return {"loss": loss}


def beside(**weight):
    model = {"tasks": two_tasks(), "kept": Kept(**weight)}
    model["kept"].build(())
    return trainer_of(Beside, model)


def test_what_is_overwritten_by_its_gradient_stays_as_it_is():
    trainer = beside()
    run(trainer)
    assert float(trainer.model["kept"].kept) == 1.0


def test_integers_are_connected_with_no_loss():
    with pytest.raises(tl.DisconnectedError, match=r"1 of the 7 .* `kept/kept`: integers \(int32\) have no gradient"):
        run(beside(dtype="int32"))
