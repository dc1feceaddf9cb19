"""Models, data and helpers of the tests of the feature cache."""

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tapeloop.feature_cache.cache import FeatureCache
from tests.support.classifiers import backbone, classifier

layers = keras.layers
N, BATCH = 22, 4


def images(count=N):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 16, 16, 3)).astype("float32")
    return x, generator.normal(size=(count, 2)).astype("float32")


def tokens():
    generator = np.random.default_rng(0)
    return generator.integers(0, 50, (N, 7)), generator.normal(size=(N, 2)).astype("float32")


def pairs():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(N, 4)).astype("float32"), generator.normal(size=(N, 5)).astype("float32")
    return x, generator.normal(size=(N, 2)).astype("float32")


def two_inputs():
    first, second = keras.Input((4,)), keras.Input((5,))
    joined = layers.Concatenate()([layers.Dense(3, name="one")(first), layers.Dense(2, name="other")(second)])
    return keras.Model([first, second], layers.Dense(2, name="head")(joined))


def around():
    inputs = keras.Input((16, 16, 3))
    beside = layers.Dense(3, name="trained")(layers.AveragePooling2D(8)(inputs))
    x = layers.Concatenate()([backbone()(inputs), layers.Flatten()(beside)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def embedded():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 8, mask_zero=True, name="embedding")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.LSTM(5, name="lstm")(x)))


def recurrent():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.GRU(5, name="gru")(layers.Embedding(50, 8, name="embedding")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def attention():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(50, 8, name="embedding")(inputs)
    x = layers.LayerNormalization(name="norm")(x + layers.MultiHeadAttention(2, 4, name="attention")(x, x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def regularized():
    model = classifier(behind=[layers.Dense(6, "relu", kernel_regularizer="l2", name="middle")])
    return model


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.base = backbone()
        self.drop = layers.Dropout(0.3, seed=3)
        self.bn = layers.BatchNormalization()
        self.head = layers.Dense(2)

    def call(self, inputs, training=None):
        x = self.bn(self.base(inputs, training=training), training=training)
        return self.head(self.drop(x, training=training))


class Distilling(tl.Trainer):
    def compute_loss(self, batch, training):
        x, y = batch
        target, student = self.model["teacher"](x, training=False), self.model["student"](x, training=training)
        loss = tf.reduce_mean((student - target) ** 2) + tf.reduce_mean((student - y) ** 2)
        return loss, {"target": tf.reduce_mean(target)}


class TwoSteps(tl.Trainer):
    def train_step(self, batch):
        x, y = batch
        with self.tape() as tape:
            loss = tf.reduce_mean((self.model(x, training=True) - y) ** 2)
        self.update(tape, loss)
        with self.tape() as tape:
            again = tf.reduce_mean((self.model(x, training=True) - y) ** 4)
        self.update(tape, again)
        return {"loss": loss, "again": again}


def two_outputs():
    inputs = keras.Input((16, 16, 3))
    x = backbone()(inputs)
    return keras.Model(inputs, [layers.Dense(2, name="head_a")(x), layers.Dense(1, name="head_b")(x)])


def two_targets():
    x, y = images()
    return x, (y, y[:, :1])


def networks():
    return {"teacher": classifier(), "student": classifier()}


MODELS = {
    "functional": (classifier, tl.Freeze("base"), images, tl.Trainer),
    "head": (
        lambda: classifier(behind=[layers.Dropout(0.2, seed=1, name="late")]),
        tl.TrainOnly("head"),
        images,
        tl.Trainer,
    ),
    "subclassed": (Subclassed, tl.Freeze("base"), images, tl.Trainer),
    "two inputs": (two_inputs, tl.TrainOnly("head"), pairs, tl.Trainer),
    "around": (around, tl.TrainOnly("head", "trained"), images, tl.Trainer),
    "embedding": (embedded, tl.Freeze("embedding"), tokens, tl.Trainer),
    "recurrent": (recurrent, tl.TrainOnly("head"), tokens, tl.Trainer),
    "attention": (attention, tl.TrainOnly("head"), tokens, tl.Trainer),
    "regularized": (regularized, tl.TrainOnly("middle", "head"), images, tl.Trainer),
    "teacher": (networks, tl.TrainOnly("student/head"), images, Distilling),
    "train_step": (classifier, tl.TrainOnly("head"), images, TwoSteps),
    "two outputs": (two_outputs, tl.Freeze("base"), two_targets, tl.Trainer),
    "weights": (classifier, tl.TrainOnly("head"), lambda: (*images(), np.arange(N, dtype="float32")), tl.Trainer),
}


def trainer_of(make, policy, kind=tl.Trainer, **options):
    keras.utils.set_random_seed(0)
    plain = {} if kind is Distilling else {"loss": "mse", "metrics": None if kind is TwoSteps else ["mae"]}
    if make is two_outputs:
        plain = {"loss": ["mse", "mae"]}
    return kind(make(), policy, optimizer="adam", seed=1, **{**plain, **options})


def weights(trainer):
    tree = tl.Trainer(trainer.model).selection.tree
    return {variable.path: np.asarray(variable.variable) for variable in tree.variables}


def check_same(one, other):
    (trainer, history), (plain, without) = one, other
    assert history.keys() == without.keys()
    for name, values in without.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, value in weights(plain).items():
        np.testing.assert_allclose(weights(trainer)[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    assert trainer.step == plain.step


def of_kind(kind, data):
    def batched():
        return [tuple(part[n : n + BATCH] for part in data) for n in range(0, len(data[0]), BATCH)]

    class Py(keras.utils.PyDataset):
        def __len__(self):
            return len(batched())

        def __getitem__(self, number):
            return batched()[number]

    dataset = tf.data.Dataset.from_tensor_slices(data)
    return {
        "arrays": data,
        "dataset": dataset.batch(BATCH),
        "list": batched(),
        "uneven": [batched()[0], *(tuple(part[4:7] for part in data) for _ in "a"), *batched()[2:]],
        "pydataset": Py(),
        "shuffled": dataset.shuffle(N, seed=0).batch(BATCH),
    }[kind]


def spy(monkeypatch):
    """Count how often features are computed."""
    computed = []
    compute = FeatureCache._compute

    def counting(self, *args):
        computed.append(args[1].name)
        return compute(self, *args)

    monkeypatch.setattr(FeatureCache, "_compute", counting)
    return computed
