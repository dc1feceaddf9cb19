"""Micro-batches: the large batch's result, ragged ones too, and more of them when memory runs out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.step.accumulation import Pieces, cut
from tests.support import models
from tests.support.compare import assert_close
from tests.support.fitting import fit, history_of, mlp, refused
from tests.support.models import network, trainer_of
from tests.support.params import params
from tests.support.steps import InTurn

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
    assert cut(examples, count) == cuts
    if examples:
        covered = [p.start + i * p.size + k for p in cuts for i in range(p.count) for k in range(p.size)]
        assert covered == list(range(examples))


def assert_pieces_are_the_whole(batch, counts, model=network, kind=tl.Trainer, policy=None, **options):
    """Training on a batch in pieces ends as training on the whole."""
    options = {"optimizer": keras.optimizers.SGD(0.1), "loss": models.cross_entropy(), **options}
    whole, *others = (
        fit(model(), policy, kind=kind, data=[batch] * 3, metrics=["accuracy"], microbatches=count, **options)
        for count in (1, *counts)
    )
    for other in others:
        assert_close(other, whole, atol=1e-6)
        assert_close(other.history.history, whole.history.history, rtol=1e-5)


@pytest.mark.parametrize("options", params([{}, {"run_eagerly": True}, {"clip_norm": 0.05}], [{}]), ids=str)
def test_microbatches_of_a_ragged_batch_equal_the_whole(options):
    assert_pieces_are_the_whole(models.images(13), [2, 5, 13], **options)


def test_a_ragged_last_batch_costs_no_trace():
    trainer = trainer_of(network(), microbatches=4)
    trainer.fit(models.images(40), batch_size=16, epochs=2, verbose=0)
    assert trainer.trace_count == 1


@pytest.mark.parametrize("weights", [False, True])
def test_penalties_and_sample_weights_count_as_in_the_whole(weights):
    x, y = models.images(10)
    batch = (x, y, np.linspace(0, 2, 10, dtype="float32")) if weights else (x, y)
    assert_pieces_are_the_whole(batch, [3], lambda: network(keras.regularizers.L2(0.1)))


class TwoUpdates(InTurn):
    """Two groups, a tape and an update each; neither loss reads what the other update moves."""

    order = ("conv", "head")

    def loss_of(self, group, batch):
        x, y = batch
        if group == "conv":
            return tf.reduce_mean(self.model.get_layer("conv")(x) ** 2)
        features, head = tf.reshape(x, [tf.shape(x)[0], -1]), self.model.get_layer("head")
        return models.cross_entropy()(y, tf.matmul(features, head.kernel[:36]) + head.bias)


GROUPS = tl.Groups({"conv": "conv", "head": "head"})


@pytest.mark.parametrize("kind", [tl.Trainer, TwoUpdates])
@pytest.mark.parametrize("optimizer", params(["sgd", "adam"], ["sgd"]))
def test_two_groups_in_two_microbatches_equal_one_double_batch(kind, optimizer):
    # Adam's first steps divide by the gradient's own size, and so turn a rounding difference into a step.
    optimizer = {"sgd": keras.optimizers.SGD(0.1), "adam": keras.optimizers.Adam(1e-3, epsilon=1e-2)}[optimizer]
    optimizers = {"conv": optimizer, "head": optimizer}
    assert_pieces_are_the_whole(models.images(16), [2], kind=kind, policy=GROUPS, optimizer=optimizers)


def test_updates_of_a_step_in_microbatches_see_the_values_from_before():
    class Order(tl.Trainer):
        def train_step(self, batch):
            before = tf.reduce_sum(self.model.weights[0])
            logs = super().train_step(batch)
            return {**logs, "moved": tf.reduce_sum(self.model.weights[0]) - before}

    for count, moved in ((1, True), (2, False)):
        history = history_of(mlp("head"), kind=Order, microbatches=count)
        assert (history["moved"][0] != 0) == moved


def test_an_embedding_accumulates_too():
    def model():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.Input((5,), dtype="int32"), layers.Embedding(7, 4), layers.Flatten(), layers.Dense(3)]
        )

    batch = (np.arange(50).reshape(10, 5) % 7, np.arange(10) % 3)
    for options in ({}, {"clip_norm": 0.01}, {"optimizer": keras.optimizers.Adam(1e-3, epsilon=1e-2)}):
        assert_pieces_are_the_whole(batch, [4], model, **options)


def test_rows_of_an_embedding_that_are_read_twice_are_one_gradient_in_the_norm():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layers.Embedding(3, 1, name="embed"), layers.Flatten()])
    before = model.get_weights()[0]
    trainer = tl.Trainer(model, loss=lambda y, p: p, optimizer=keras.optimizers.SGD(1.0), clip_norm=1.0)
    trainer.fit([(np.array([[1, 1]]), np.zeros((1, 2)))], verbose=0)
    # The mean of two outputs that read one row: a gradient of 1/2 + 1/2, whose norm is 1 and not the root of 1/2.
    np.testing.assert_allclose(before - model.get_weights()[0], [[0.0], [1.0], [0.0]], atol=1e-6)


class Summed(tl.Trainer):
    def forward(self, inputs, training):
        dense = inputs.to_tensor(shape=[None, 4]) if isinstance(inputs, tf.RaggedTensor) else tf.sparse.to_dense(inputs)
        return self.model(tf.ensure_shape(dense, [None, 4]), training=training)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_inputs_are_cut_too(kind):
    rows = [[1.0], [2.0, 3.0], [], [4.0, 5.0, 6.0, 7.0], [8.0]]
    x = tf.ragged.constant(rows)
    x = x if kind == "ragged" else tf.sparse.from_dense(x.to_tensor(shape=[5, 4]))
    batch = (x, tf.constant([0, 1, 2, 0, 1]))
    assert_pieces_are_the_whole(batch, [2], lambda: mlp("head"), Summed)


@pytest.mark.parametrize("examples", [3, 18], ids=["the only batch", "the last"])
def test_a_batch_smaller_than_the_microbatches_is_found_before_anything_moves(examples):
    trainer = trainer_of(network(), microbatches=4)
    text = rf"A batch of {examples % 16} examples cannot be cut in 4 micro-batches. Make the batches"
    with refused(trainer.model, tl.DataError, text):
        trainer.fit(models.images(examples), batch_size=16, verbose=0)
    assert trainer.step == 0


class Prototypes(tl.Trainer):
    """A support set and queries: tensors of one batch that have different first dimensions."""

    def compute_loss(self, batch, training):
        support, queries, labels = batch
        logits = self.forward(queries, training) - tf.reduce_mean(self.forward(support, training), axis=0)
        return models.cross_entropy()(labels, logits)


def test_a_batch_of_several_sizes_is_whole_or_nothing():
    x, y = models.images(8)
    Prototypes(network(), optimizer="sgd").fit([(x[:3], x, y)], verbose=0)
    text = r"different first dimensions cannot be cut in micro-batches: 3 and 8 \. Make"
    with pytest.raises(tl.DataError, match=text):
        Prototypes(network(), optimizer="sgd", microbatches=2).fit([(x[:3], x, y)], verbose=0)
