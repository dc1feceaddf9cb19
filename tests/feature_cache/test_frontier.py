"""Where a step is cut, and what stands in the way."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.batch import Features
from tapeloop.feature_cache.batch_independence import flat
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.splitting import split
from tests.support.classifiers import N, backbone, classifier, cut_of, images
from tests.support.inspect import start_phase

layers = keras.layers


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.base = backbone()
        self.head = layers.Dense(2)

    def call(self, inputs, training=None):
        x = self.base(inputs, training=training)
        return self.head(tf.where(tf.reduce_sum(x) > 1e9, x, x))


def shapes(cut):
    assert isinstance(cut, Cut), [str(obstacle) for obstacle in cut]
    return sorted(tuple(feature.shape[1:]) for feature in cut.features)


def same(cut, batch):
    """Whether the rest behind a cut gives what the whole gives, where neither is random nor leaves anything behind."""
    whole = cut.whole.function(*[batch])
    features = tf.function(lambda *values: cut.before(values))(*flat(batch))
    rest = tf.function(cut.rest)(Features(tuple(features)))
    pairs = list(zip(tf.nest.flatten(whole), tf.nest.flatten(rest)))
    assert pairs
    return all(np.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)


@pytest.mark.parametrize("make", [classifier, Subclassed])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_frozen_backbone_comes_before_the_cut(make, kind):
    model = make()
    model(images()[0])
    cut = cut_of(model, tl.Freeze("base"), images(), kind)
    assert shapes(cut) == [(2,), (4,)]
    assert cut.bytes == 4 * (2 + 4)
    assert [submodel.path for submodel in cut.submodels] == ["base"]
    if kind == "train":
        assert same(cut, images())


def test_what_reads_no_weights_may_come_behind_where_that_is_fewer_bytes():
    wide = layers.UpSampling1D(50, name="wide")
    model = classifier(behind=[layers.Reshape((4, 1)), wide, layers.Flatten()])
    cut = cut_of(model, tl.TrainOnly("head"), images())
    assert cut.bytes == 4 * (2 + 4)
    assert same(cut, images())


def test_only_what_trains_and_what_follows_on_it_is_behind():
    model = classifier(behind=[layers.Dense(3, name="middle"), layers.Dense(5, name="other")])
    assert shapes(cut_of(model, tl.TrainOnly("other", "head"), images())) == [(2,), (3,)]
    assert shapes(cut_of(model, tl.TrainOnly("middle"), images())) == [(2,), (4,)]


def test_two_inputs_and_a_connection_around_the_frontier():
    first, second = keras.Input((4,)), keras.Input((5,))
    one, other = layers.Dense(3, name="one")(first), layers.Dense(2, name="other")(second)
    joined = layers.Concatenate()([one, other])
    outputs = layers.Dense(2, name="head")(layers.Concatenate()([layers.Dense(6, name="trained")(joined), second]))
    model = keras.Model([first, second], outputs)
    batch = ((tf.random.normal((N, 4)), tf.random.normal((N, 5))), tf.random.normal((N, 2)))
    cut = cut_of(model, tl.TrainOnly("head", "trained"), batch)
    assert sum(cut.features[n].shape[1] for n in range(len(cut.features))) == 3 + 2 + 5 + 2
    assert same(cut, batch)


def test_recurrent_layers_and_embeddings():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 8, mask_zero=True, name="embedding")(tokens)
    model = keras.Model(tokens, layers.Dense(2, name="head")(layers.LSTM(5, name="lstm")(x)))
    batch = tf.random.stateless_uniform((N, 7), (0, 1), 0, 50, tf.int32), tf.random.normal((N, 2))
    assert shapes(cut_of(model, tl.TrainOnly("head"), batch)) == [(2,), (5,)]
    frozen = cut_of(model, tl.Freeze("embedding"), batch)
    assert (7, 8) in shapes(frozen)
    assert same(frozen, batch)


class Mixing(layers.Layer):
    """Each example is seen beside the others, through weights that are frozen."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return (inputs - tf.reduce_mean(inputs, 0, keepdims=True)) * self.scale


class StepContext(layers.Layer):
    """Each example is seen with those before it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return tf.cumsum(inputs, 0) * self.scale


class Sized(StepContext):
    """Each example is seen by the number of all."""

    def call(self, inputs):
        return inputs / tf.cast(tf.shape(inputs)[0], tf.float32) * self.scale


class Rare(StepContext):
    """Each example is seen by what is in the batch, which comes up in few."""

    def call(self, inputs):
        return tf.cond(tf.reduce_max(inputs) > 1e9, lambda: -inputs, lambda: inputs) * self.scale


class Folding(layers.Layer):
    """Examples and something else in one dimension."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(2,), initializer="ones", name="scale")

    def call(self, inputs):
        return tf.reshape(inputs, (-1, 2)) * self.scale


class Unfolding(layers.Layer):
    def call(self, inputs):
        return tf.reshape(inputs, (-1, 4))


def test_a_cut_has_a_row_for_each_example_that_is_its_alone():
    model = classifier(behind=[Folding(name="folding"), Unfolding(name="unfolding")])
    assert shapes(cut_of(model, tl.TrainOnly("head"), images())) == [(2,), (4,)]
    for kind in (Mixing, Rare):  # what makes one thing of a batch is behind
        model = classifier(behind=[kind(name="mixing")])
        cut = cut_of(model, tl.TrainOnly("head"), images())
        assert [submodel.path for submodel in cut.submodels] == ["base"]
        assert same(cut, images())
    for kind in (StepContext, Sized):
        (obstacle,) = cut_of(classifier(behind=[kind(name="mixing")]), tl.TrainOnly("head"), images())
        assert "mixing" in str(obstacle)
        assert "the other examples of a batch" in str(obstacle)
    first = keras.Sequential(
        [keras.Input((16, 16, 3)), Mixing(name="mixing"), backbone(), layers.Dense(2, name="head")]
    )
    (obstacle,) = cut_of(first, tl.TrainOnly("head"), images())
    assert "makes one thing of the examples of a batch, and comes first" in str(obstacle)


class Counting(layers.Layer):
    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, initializer="zeros", name="count")

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs * (1.0 + 0.0 * self.count)


class Drawing(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


@pytest.mark.parametrize(
    ("before", "policy", "said"),
    [
        ([], tl.TrainAll(), "`base/conv/kernel` trains and comes first"),
        ([], tl.TrainOnly("base/conv"), "`base/conv/kernel` trains and comes first"),
        ([lambda: layers.RandomFlip(name="flip")], tl.TrainOnly("head"), "`flip` is random and comes first"),
        ([lambda: layers.Dropout(0.1, name="early")], tl.TrainOnly("head"), "`early` is random and comes first"),
        ([lambda: Counting(name="counting")], tl.TrainOnly("head"), "`counting/count` changes in each step"),
        ([lambda: Drawing(name="drawing")], tl.TrainOnly("head"), "RandomStandardNormal`) may give something else"),
    ],
    ids=["all", "first", "flip", "dropout", "counting", "tf.random"],
)
def test_what_stands_in_the_way_is_named(before, policy, said):
    found = cut_of(classifier(before=[make() for make in before]), policy, images())
    assert not isinstance(found, Cut)
    assert said in str(found[0])


def test_what_is_random_may_come_before_frozen_weights_where_it_is_asked_for():
    model = classifier([layers.RandomFlip(name="flip")], [layers.Dropout(0.5, name="late")])
    cut = cut_of(model, tl.TrainOnly("head"), images(), random=True)
    assert (4,) in shapes(cut)
    drawn = {v.path for v in tl.Trainer(model).selection.tree.variables if v.seed and v.path.startswith("flip")}
    before = {id(variable) for variable in cut.before.variables}
    seeds = [v for v in tl.Trainer(model).selection.tree.variables if v.seed and id(v.tf_variable) in before]
    assert {v.path for v in seeds} == drawn
    compute = tf.function(lambda *values: cut.before(values))
    one, other = (np.concatenate([v.numpy().ravel() for v in compute(*flat(images()))]) for _ in range(2))
    assert not np.array_equal(one, other)


def test_penalties_teachers_and_sample_weights_stay_with_the_rest():
    class Distilling(tl.Trainer):
        def compute_loss(self, batch, training):
            x, y, weight = batch
            target = self.model["teacher"](x, training=False)
            student = self.model["student"](x, training=training)
            return tf.reduce_mean(weight[:, None] * (student - target) ** 2) + tf.reduce_mean((student - y) ** 2)

    networks = {"teacher": classifier(), "student": classifier()}
    trainer = Distilling(networks, tl.TrainOnly("student/head"), optimizer="sgd")
    batch = (*images(), tf.random.uniform((N,)))
    trainer.fit(batch, batch_size=N, progress="none")
    spec = tf.nest.map_structure(lambda value: tf.TensorSpec([None, *value.shape[1:]], value.dtype), batch)
    cut = split(start_phase(trainer), spec, batch, random=False)
    assert [submodel.path for submodel in cut.submodels] == ["teacher", "student/base"]
    assert sum(int(np.prod(feature.shape[1:])) for feature in cut.features) == 4 + 2 + 2 + 1
