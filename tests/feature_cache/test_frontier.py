"""Where a step is cut, and what stands in the way."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.batch import Features, tensors_in
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.frozen_ops import model_variables
from tapeloop.model.tree import Tree
from tests.support.cached import networks, sequence
from tests.support.classifiers import Counting, N, Wrapped, backbone, classifier, cut_of, images

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
    features = tf.function(lambda *values: cut.before(values))(*tensors_in(batch, apart=True))
    rest = tf.function(cut.rest)(Features(tuple(features)))
    pairs = list(zip(tf.nest.flatten(whole), tf.nest.flatten(rest)))
    assert pairs
    return all(np.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs if one is not None)


@pytest.mark.parametrize("make", [classifier, Subclassed])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_frozen_backbone_comes_before_the_cut(make, kind):
    model = make()
    model(images()[0])
    cut = cut_of(model, tl.Freeze("base"), images(), kind)
    assert shapes(cut) == [(2,), (4,)]  # the targets, and four means over a map instead of the map
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
    # The two frozen layers' outputs, the second input, which is also read behind the cut, and the targets.
    assert sum(cut.features[n].shape[1] for n in range(len(cut.features))) == 3 + 2 + 5 + 2
    assert same(cut, batch)


def test_recurrent_layers_and_embeddings():
    model = sequence(layers.LSTM(5, name="lstm"), mask_zero=True)
    batch = tf.random.stateless_uniform((N, 7), (0, 1), 0, 50, tf.int32), tf.random.normal((N, 2))
    assert shapes(cut_of(model, tl.TrainOnly("head"), batch)) == [(2,), (5,)]
    frozen = cut_of(model, tl.Freeze("embedding"), batch)
    assert (7, 8) in shapes(frozen)
    assert same(frozen, batch)


def less_the_mean(x):
    return x - tf.reduce_mean(x, 0, keepdims=True)


def if_one_is_large(x):
    return tf.cond(tf.reduce_max(x) > 1e9, lambda: -x, lambda: x)


def test_what_folds_examples_into_another_dimension_and_back_comes_before_the_cut():
    folding = [Wrapped(lambda x: tf.reshape(x, (-1, 2)), 2), layers.Lambda(lambda x: tf.reshape(x, (-1, 4)))]
    assert shapes(cut_of(classifier(behind=folding), tl.TrainOnly("head"), images())) == [(2,), (4,)]


@pytest.mark.parametrize("mix", [less_the_mean, if_one_is_large])
def test_what_makes_one_thing_of_a_batch_is_behind_the_cut(mix):
    cut = cut_of(classifier(behind=[Wrapped(mix)]), tl.TrainOnly("head"), images())
    assert [submodel.path for submodel in cut.submodels] == ["base"]
    assert same(cut, images())


def test_what_makes_one_thing_of_a_batch_and_comes_first_is_an_obstacle():
    before = [keras.Input((16, 16, 3)), Wrapped(less_the_mean)]
    model = keras.Sequential([*before, backbone(), layers.Dense(2, name="head")])
    (obstacle,) = cut_of(model, tl.TrainOnly("head"), images())
    assert "makes one thing of the examples of a batch, and comes first" in str(obstacle)


def adding(function):
    return lambda: layers.Lambda(lambda x: x + function(x))


@pytest.mark.parametrize(
    ("before", "policy", "said"),
    [
        ([], tl.TrainAll(), "`base/conv/kernel` trains and comes first"),
        ([], tl.TrainOnly("base/conv"), "`base/conv/kernel` trains and comes first"),
        ([lambda: layers.RandomFlip(name="flip")], tl.TrainOnly("head"), "`flip` is random and comes first"),
        ([lambda: layers.Dropout(0.1, name="early")], tl.TrainOnly("head"), "`early` is random and comes first"),
        ([lambda: Counting(name="counting")], tl.TrainOnly("head"), "`counting/count` changes in each step"),
        ([adding(lambda x: tf.random.normal(tf.shape(x)))], tl.TrainOnly("head"), "`RandomStandardNormal`) may give"),
        ([adding(lambda x: tf.cast(tf.timestamp(), tf.float32))], tl.TrainOnly("head"), "`Timestamp`) may give"),
    ],
    ids=["all", "first", "flip", "dropout", "counting", "tf.random", "an op type that the cache does not know"],
)
def test_what_stands_in_the_way_is_named(before, policy, said):
    found = cut_of(classifier(before=[make() for make in before]), policy, images())
    assert not isinstance(found, Cut)
    assert said in str(found[0])


def test_a_frozen_weight_that_the_step_assigns_to_is_not_before_the_cut():
    class Perturbs(tl.Trainer):
        def train_step(self, batch):
            self.model.get_layer("middle").bias.assign_add(tf.ones(3))
            return super().train_step(batch)

    model = classifier(behind=[layers.Dense(3, name="middle")])
    cut = cut_of(model, tl.TrainOnly("head"), images(), trainer_type=Perturbs)
    assert [submodel.path for submodel in cut.submodels] == ["base"]


def test_what_is_random_may_come_before_frozen_weights_where_it_is_asked_for():
    model = classifier([layers.RandomFlip(name="flip")], [layers.Dropout(0.5, name="late")])
    cut = cut_of(model, tl.TrainOnly("head"), images(), random=True)
    assert (4,) in shapes(cut)
    read = model_variables(cut.whole, Tree.of(model))
    seeds = {variable for variable in Tree.of(model).variables if variable.seed and variable.path.startswith("flip")}
    assert {read[name] for name in cut.before.captures if name in read and read[name].seed} == seeds
    compute = tf.function(lambda *values: cut.before(values))
    one, other = (
        np.concatenate([v.numpy().ravel() for v in compute(*tensors_in(images(), apart=True))]) for _ in range(2)
    )
    assert not np.array_equal(one, other)


def test_penalties_teachers_and_sample_weights_stay_with_the_rest():
    class Distilling(tl.Trainer):
        def compute_loss(self, batch, training):
            x, y, weight = batch
            target = self.model["teacher"](x, training=False)
            student = self.model["student"](x, training=training)
            return tf.reduce_mean(weight[:, None] * (student - target) ** 2) + tf.reduce_mean((student - y) ** 2)

    batch = (*images(), tf.random.uniform((N,)))
    cut = cut_of(networks(), tl.TrainOnly("student/head"), batch, trainer_type=Distilling)
    assert [submodel.path for submodel in cut.submodels] == ["teacher", "student/base"]
    assert sum(int(np.prod(feature.shape[1:])) for feature in cut.features) == 4 + 2 + 2 + 1


def test_looking_at_a_frontier_draws_no_random_number():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="base"), keras.layers.Dense(2)])
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
    before = np.random.get_state()[1].copy()
    trainer.frontier(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
