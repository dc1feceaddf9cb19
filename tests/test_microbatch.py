"""Micro-batches: the large batch's result, ragged ones too, and more of them when memory runs out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.microbatch import Pieces, plan
from tests import models
from tests.models import trainer_of

layers = keras.layers


@pytest.mark.parametrize(
    ("examples", "count", "cuts"),
    [
        (8, 1, [Pieces(1, 8, 0)]),
        (8, 4, [Pieces(4, 2, 0)]),
        (10, 4, [Pieces(2, 3, 0), Pieces(2, 2, 6)]),
        (13, 5, [Pieces(3, 3, 0), Pieces(2, 2, 9)]),
        (5, 5, [Pieces(5, 1, 0)]),
        (None, 3, [Pieces(3, None, 0)]),
    ],
)
def test_pieces_differ_by_one_example_at_most_and_cover_all(examples, count, cuts):
    assert plan(examples, count) == cuts
    if examples:
        covered = [p.start + i * p.size + k for p in cuts for i in range(p.count) for k in range(p.size)]
        assert covered == list(range(examples))


def network(penalty=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(4, 3, activation="tanh", kernel_regularizer=penalty, name="conv")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def trained(batch, model=network, kind=tl.Trainer, policy=None, steps=3, loss=None, **options):
    options.setdefault("optimizer", keras.optimizers.SGD(0.1))
    trainer = kind(model(), policy, loss=loss or models.cross_entropy(), metrics=["accuracy"], **options)
    history = trainer.fit([batch] * steps, progress="none").history
    return trainer, history


def assert_alike(one, other):
    for mine, its in zip(one[0].model.get_weights(), other[0].model.get_weights()):
        np.testing.assert_allclose(mine, its, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, values in one[1].items():
        np.testing.assert_allclose(values, other[1][name], rtol=1e-5)


@pytest.mark.parametrize("count", [2, 5, 13])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"clip_norm": 0.05}], ids=str)
def test_microbatches_of_a_ragged_batch_equal_the_whole(count, options):
    batch = models.images(13)
    whole = trained(batch, **options)
    assert_alike(trained(batch, microbatches=count, **options), whole)


def test_one_trace_for_each_signature_of_a_batch():
    trainer = trainer_of(network(), microbatches=4)
    trainer.fit(models.images(40), batch_size=16, epochs=2, progress="none")
    assert trainer.trace_count == 2


@pytest.mark.parametrize("weights", [False, True])
def test_penalties_and_sample_weights_count_as_in_the_whole(weights):
    x, y = models.images(10)
    batch = (x, y, np.linspace(0, 2, 10, dtype="float32")) if weights else (x, y)
    model = lambda: network(keras.regularizers.L2(0.1))  # noqa: E731
    assert_alike(trained(batch, model, microbatches=3), trained(batch, model))


class TwoUpdates(tl.Trainer):
    """Two groups, a tape and an update each; neither loss reads what the other update moves."""

    def train_step(self, batch):
        x, y = batch
        with self.tape("conv") as tape:
            first = tf.reduce_mean(self.model.get_layer("conv")(x) ** 2)
        self.update(tape, first)
        with self.tape("head") as tape:
            features = tf.stop_gradient(tf.reshape(x, [tf.shape(x)[0], -1]))
            head = self.model.get_layer("head")
            second = models.cross_entropy()(y, tf.matmul(features, head.kernel[:36]) + head.bias)
        self.update(tape, second)
        return {"first": first, "second": second}


GROUPS = tl.Groups({"conv": "conv", "head": "head"})


@pytest.mark.parametrize("kind", [tl.Trainer, TwoUpdates])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_groups_in_two_microbatches_equal_one_double_batch(kind, optimizer):
    # Adam's first steps divide by the gradient's own size, and so turn a rounding difference into a step.
    optimizer = {"sgd": keras.optimizers.SGD(0.1), "adam": keras.optimizers.Adam(1e-3, epsilon=1e-2)}[optimizer]
    batch = models.images(16)
    options = {"kind": kind, "policy": GROUPS, "optimizer": {"conv": optimizer, "head": optimizer}}
    assert_alike(trained(batch, microbatches=2, **options), trained(batch, **options))


def test_updates_of_a_step_in_microbatches_see_the_values_from_before():
    class Order(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                loss = tf.reduce_mean(self.model(batch) ** 2)
            before = tf.reduce_sum(self.model.weights[0])
            self.update(tape, loss)
            return {"moved": tf.reduce_sum(self.model.weights[0]) - before}

    x = np.ones((4, 3), "float32")
    for count, moved in ((1, True), (2, False)):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        history = Order(model, optimizer="sgd", microbatches=count).fit([x], progress="none").history
        assert (history["moved"][0] != 0) == moved


def test_an_embedding_accumulates_too():
    def model():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.Input((5,), dtype="int32"), layers.Embedding(7, 4), layers.Flatten(), layers.Dense(3)]
        )

    batch = (np.arange(50).reshape(10, 5) % 7, np.arange(10) % 3)
    assert_alike(trained(batch, model, microbatches=4), trained(batch, model))


class Summed(tl.Trainer):
    def forward(self, inputs, training):
        dense = inputs.to_tensor(shape=[None, 4]) if isinstance(inputs, tf.RaggedTensor) else tf.sparse.to_dense(inputs)
        return self.model(tf.ensure_shape(dense, [None, 4]), training=training)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_inputs_are_cut_too(kind):
    def model():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), layers.Dense(3)])

    rows = [[1.0], [2.0, 3.0], [], [4.0, 5.0, 6.0, 7.0], [8.0]]
    x = tf.ragged.constant(rows)
    x = x if kind == "ragged" else tf.sparse.from_dense(x.to_tensor(shape=[5, 4]))
    batch = (x, tf.constant([0, 1, 2, 0, 1]))
    assert_alike(trained(batch, model, Summed, microbatches=2), trained(batch, model, Summed))


def test_a_batch_smaller_than_the_microbatches_raises_before_it_moves_anything():
    model = network()
    before = models.values(model)
    trainer = trainer_of(model, microbatches=4)
    with pytest.raises(tl.DataError, match=r"A batch of 3 examples cannot be cut in 4 micro-batches. Make the batches"):
        trainer.fit([models.images(3)], progress="none")
    assert models.values(model) == before


@pytest.mark.parametrize("count", [0, 2.5, "many", True])
def test_the_number_must_be_a_whole_one(count):
    with pytest.raises(ValueError, match=r"`microbatches` must be a whole number, 1 or more. Received: "):
        trainer_of(microbatches=count)


def allocated(much, value):
    """The largest of many copies of a value: far more of them than any memory holds, if `much`."""
    return tf.reduce_max(tf.fill([tf.where(much, tf.constant(2**48, tf.int64), 1)], value))


def refused(much, value):
    """The same without the ten seconds that TensorFlow waits for memory before it gives up."""

    def refuse(much, value):
        if much:
            raise MemoryError
        return value

    return tf.ensure_shape(tf.py_function(refuse, [much, value], value.dtype), ())


class Hungry(layers.Layer):
    """Asks for more memory than there is when it sees more than `limit` examples; counts its calls."""

    def __init__(self, limit, ask):
        super().__init__(name="hungry")
        self.limit = limit
        self.ask = ask
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs + tf.stop_gradient(0 * self.ask(tf.shape(inputs)[0] > self.limit, inputs[0, 0]))


def hungry(limit, ask=refused):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Flatten(),
            layers.Dense(8, name="hidden"),
            Hungry(limit, ask),
            layers.Dense(3, name="head"),
        ]
    )


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_auto_doubles_until_a_step_fits_and_nothing_moves_twice(options, caplog):
    batches = [models.images(16), models.images(24)]
    auto, known = (
        trainer_of(hungry(4), optimizer="adam", microbatches=count, metrics=["accuracy"], **options)
        for count in ("auto", 4)
    )
    history = auto.fit([batches[0]] * 3, progress="none").history
    assert auto.microbatches == 4
    assert [record.getMessage() for record in caplog.records if record.name == "tapeloop"] == [
        "Out of memory with microbatches=1: going on with microbatches=2.",
        "Out of memory with microbatches=2: going on with microbatches=4.",
    ]
    assert known.fit([batches[0]] * 3, progress="none").history == history
    assert models.values(auto.model) == models.values(known.model)
    assert auto.step == 3
    auto.fit([batches[1]], progress="none")
    assert auto.microbatches == 8


def test_auto_notices_when_the_device_itself_is_out_of_memory():
    auto = trainer_of(hungry(4, allocated), microbatches="auto")
    auto.fit([models.images(8)], progress="none")
    assert auto.microbatches == 2


def test_auto_gives_up_at_one_example():
    with pytest.raises(RuntimeError, match=r"ran out of memory with one example at a time, 4 micro-batches of a batch"):
        trainer_of(hungry(0), microbatches="auto").fit([models.images(4)], progress="none")


class Late(keras.optimizers.SGD):
    """Runs out of memory while it updates."""

    def update_step(self, gradient, variable, learning_rate):
        much = refused(tf.norm(gradient) >= 0, tf.norm(gradient))
        super().update_step(gradient + 0 * much, variable, learning_rate)


def test_running_out_while_variables_are_updated_is_not_repeated():
    trainer = trainer_of(network(), optimizer=Late(0.1), microbatches="auto")
    with pytest.raises(RuntimeError, match=r"while the last of its updates was being made: some variables have moved"):
        trainer.fit([models.images(4)], progress="none")
    assert trainer.microbatches == 1


def test_a_number_that_is_known_does_not_change():
    with pytest.raises(tf.errors.ResourceExhaustedError):
        trainer_of(hungry(4), microbatches=2).fit([models.images(16)], progress="none")
