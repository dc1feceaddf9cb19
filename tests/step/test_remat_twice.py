"""The second run of what is computed twice is the first again, or is refused."""

import keras
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import refused
from tests.support.models import trainer_of
from tests.support.stacks import assert_twice_is_once, data, stack
from tests.support.steps import OneUpdate

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


class Spectral(layers.SpectralNormalization):
    def __init__(self, **options):
        super().__init__(layers.Dense(4, name="dense"), **options)


class Stateful(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.lstm = layers.LSTM(4, stateful=True)

    def build(self, shape):
        self.lstm.build((8, 9, 16))

    def call(self, inputs):
        return self.lstm(tf.reshape(inputs, (8, 9, 16)))


def odd(kind):
    keras.backend.clear_session(free_memory=False)  # an older Keras keeps its own seed generator when it is seeded
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 4), batch_size=8)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(kind(name="odd")(inputs))))


by_how = pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)


@by_how
@pytest.mark.parametrize("kind", [Globally, Remembering, Stateful])
def test_the_second_run_finds_what_the_first_found(kind, how):
    assert_twice_is_once(lambda: odd(kind), "odd", steps=3, atol=1e-6, **how)


class Several(Odd):
    def call(self, inputs):
        return {"out": self.dense(inputs), "none": None, "shape": (tf.shape(inputs), 3)}


class Chosen(tl.Trainer):
    def forward(self, inputs, training):
        found = self.model["odd"](inputs, training=training)
        assert found["none"] is None
        assert found["shape"][1] == 3
        return self.model["head"](tf.reshape(found["out"], [-1, 144]))


@by_how
def test_outputs_may_hold_what_is_no_tensor(how):
    def networks():
        keras.utils.set_random_seed(0)
        return {"odd": Several(name="odd"), "head": layers.Dense(3)}

    assert_twice_is_once(networks, "odd", atol=1e-6, kind=Chosen, **how)


class Joint(tl.Trainer):
    """Both tapes open, then two updates: the second gradient is taken after the first network has moved."""

    def train_step(self, batch):
        generator, discriminator = self.model["generator"], self.model["discriminator"]
        real = tf.reshape(batch[0], [8, -1])[:, :4]
        with self.tape("discriminator") as first, self.tape("generator") as second:
            fake = discriminator(generator(real[:, :2], training=True), training=True)
            d_loss = tf.reduce_mean(fake) - tf.reduce_mean(discriminator(real, training=True))
            g_loss = -tf.reduce_mean(fake**2)
        self.update(first, d_loss)
        self.update(second, g_loss)
        return {"loss": g_loss}


@by_how
def test_the_second_run_uses_the_weights_of_the_first_though_they_have_moved(how):
    def networks():
        keras.utils.set_random_seed(0)
        hidden = layers.Dense(5, "tanh", name="hidden")
        return {
            "generator": keras.Sequential([keras.Input((2,)), layers.Dense(4, activation="tanh")]),
            "discriminator": keras.Sequential([keras.Input((4,)), hidden, layers.Dense(1, use_bias=False)]),
        }

    policy = tl.Groups({"generator": "generator", "discriminator": "discriminator"})
    assert_twice_is_once(networks, "discriminator/hidden", atol=1e-6, kind=Joint, policy=policy, **how)


class SecondOrder(OneUpdate):
    def loss_of(self, batch):
        with tf.GradientTape() as inner:
            inner.watch(batch[0])
            out = tf.reduce_sum(self.model(batch[0], training=True))
        return tf.reduce_mean(inner.gradient(out, batch[0]) ** 2)


def test_second_order_gradients_are_refused_by_name():
    model = stack()
    with pytest.raises(NotImplementedError, match=r"`block0`, which `remat` computes twice: it has no second-order"):
        SecondOrder(model, remat="block0").fit([data(model)], verbose=0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Drawing, r"cannot hold for `odd`: it draws by `RandomUniform`, anew each time"),
        (Counting, r"cannot hold for `odd`: it assigns to a `tf.Variable`"),
        (Spectral, r"it assigns to `odd/layer/kernel`, which trains, when it is called"),
    ],
)
def test_what_has_no_second_run_is_refused(kind, text):
    model = odd(kind)
    with refused(model, tl.PolicyError, text):
        trainer_of(model, remat="odd").fit([data(model)], verbose=0)
