"""The second run of what is computed twice is the first again, or is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.models import trainer_of
from tests.support.stacks import data, stack, weights

layers = keras.layers


class Odd(layers.Layer):
    """A layer with something that must be the same the second time."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        return self.dense(inputs) * self.factor(inputs)


class Drawing(Odd):
    def factor(self, inputs):
        return tf.random.uniform(tf.shape(inputs))


class Globally(Odd):
    def factor(self, inputs):
        return keras.random.uniform(keras.ops.shape(inputs))


class Counting(Odd):
    def build(self, shape):
        super().build(shape)
        self.count = tf.Variable(1.0, trainable=False)

    def factor(self, inputs):
        before = self.count.read_value()
        self.count.assign_add(1.0)
        return before


class Remembering(Odd):
    def build(self, shape):
        super().build(shape)
        self.count = self.add_weight(shape=(), initializer="ones", trainable=False, name="count")

    def factor(self, inputs):
        before = self.count + 0.0
        self.count.assign_add(1.0)
        return before


def odd(kind):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 4))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(kind(name="odd")(inputs))))


def spectral():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 4))
    x = layers.SpectralNormalization(layers.Dense(4, name="dense"), name="spectral")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def stateful():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 4), batch_size=8)
    x = layers.LSTM(4, stateful=True, name="odd")(layers.Reshape((9, 16))(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize("make", [lambda: odd(Globally), lambda: odd(Remembering), stateful], ids=range(3))
def test_the_second_run_finds_what_the_first_found(make, options):
    once, loss_once, _ = weights(make, steps=3, **options)
    twice, loss_twice, _ = weights(make, steps=3, remat="odd", **options)
    np.testing.assert_allclose(loss_twice, loss_once, rtol=1e-5)
    for path, value in once.items():
        np.testing.assert_allclose(twice[path], value, atol=1e-6, err_msg=path)


class Several(Odd):
    def call(self, inputs):
        return {"out": self.dense(inputs), "none": None, "shape": (tf.shape(inputs), 3)}


class Chosen(tl.Trainer):
    def forward(self, inputs, training):
        found = self.model["odd"](inputs, training=training)
        assert found["none"] is None
        assert found["shape"][1] == 3
        return self.model["head"](tf.reshape(found["out"], [-1, 144]))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_outputs_may_hold_what_is_no_tensor(options):
    results = []
    for remat in (None, "odd"):
        keras.utils.set_random_seed(0)
        networks = {"odd": Several(name="odd"), "head": layers.Dense(3)}
        trainer = Chosen(networks, loss=models.cross_entropy(), optimizer="sgd", remat=remat, **options)
        trainer.fit([data(stack())] * 2, progress="none")
        results.append(networks["odd"].get_weights())
    for mine, its in zip(*results):
        np.testing.assert_allclose(mine, its, atol=1e-6)


class Joint(tl.Trainer):
    """Both tapes open, then two updates: the second gradient is taken after the first network has moved."""

    def train_step(self, real):
        generator, discriminator = self.model["generator"], self.model["discriminator"]
        with self.tape("discriminator") as first, self.tape("generator") as second:
            fake = discriminator(generator(real[:, :2], training=True), training=True)
            d_loss = tf.reduce_mean(fake) - tf.reduce_mean(discriminator(real, training=True))
            g_loss = -tf.reduce_mean(fake**2)
        self.update(first, d_loss)
        self.update(second, g_loss)
        return {"g_loss": g_loss}


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_the_second_run_uses_the_weights_of_the_first_though_they_have_moved(options):
    results = []
    for remat in (None, "discriminator/hidden"):
        keras.utils.set_random_seed(0)
        networks = {
            "generator": keras.Sequential([keras.Input((2,)), layers.Dense(4, activation="tanh")]),
            "discriminator": keras.Sequential(
                [keras.Input((4,)), layers.Dense(5, "tanh", name="hidden"), layers.Dense(1, use_bias=False)]
            ),
        }
        policy = tl.Groups({"generator": "generator", "discriminator": "discriminator"})
        trainer = Joint(networks, policy, optimizer=keras.optimizers.SGD(0.5), remat=remat, **options)
        trainer.fit([np.random.default_rng(0).normal(size=(8, 4)).astype("float32")] * 2, progress="none")
        results.append(networks["generator"].get_weights())
    for mine, its in zip(*results):
        np.testing.assert_allclose(mine, its, atol=1e-6)


class SecondOrder(tl.Trainer):
    def train_step(self, batch):
        with self.tape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(batch[0])
                out = tf.reduce_sum(self.model(batch[0], training=True))
            loss = tf.reduce_mean(inner.gradient(out, batch[0]) ** 2)
        self.update(tape, loss)
        return {}


def test_second_order_gradients_are_refused_by_name():
    model = stack()
    with pytest.raises(NotImplementedError, match=r"`block0`, which `remat` computes twice: it has no second-order"):
        SecondOrder(model, remat="block0").fit([data(model)], progress="none")


@pytest.mark.parametrize(
    ("make", "filter_", "text"),
    [
        (lambda: odd(Drawing), "odd", r"cannot hold for `odd`: it draws by `RandomUniform`, anew each time"),
        (lambda: odd(Counting), "odd", r"cannot hold for `odd`: it assigns to a `tf.Variable`"),
        (spectral, "spectral", r"it assigns to `spectral/layer/kernel`, which trains, when it is called"),
    ],
)
def test_what_has_no_second_run_is_refused(make, filter_, text):
    model = make()
    before = models.values(model)
    with pytest.raises(tl.PolicyError, match=text):
        trainer_of(model, remat=filter_).fit([data(model)], progress="none")
    assert models.values(model) == before
