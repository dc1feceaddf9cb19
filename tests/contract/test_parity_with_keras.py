"""The logs of each epoch are those of Keras' `fit` on the same data, seed and order."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(37, 6)).astype("float32")  # 37 examples: the last of the batches is ragged
LABELS = GENERATOR.integers(0, 3, 37)
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
TARGETS = GENERATOR.normal(size=(37, 3)).astype("float32")
WEIGHTS = GENERATOR.uniform(0.2, 2.0, 37).astype("float32")


def functional():
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization()(layers.Dense(8, activation="tanh", kernel_regularizer="l2")(inputs))
    return keras.Model(inputs, layers.Dense(3)(hidden))


def sequential():
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)])


@keras.saving.register_keras_serializable("parity")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="gelu")
        self.norm = layers.LayerNormalization()
        self.head = layers.Dense(3)

    def call(self, inputs):
        return self.head(self.norm(self.hidden(inputs)))


def subclassed():
    model = Subclassed()
    model(X[:2])
    return model


def two_headed():
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(inputs, {"label": layers.Dense(3, name="label")(hidden), "y": layers.Dense(3, name="y")(hidden)})


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CASES = {
    "labels": (
        LABELS,
        lambda: {"loss": CROSS_ENTROPY, "metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]},
    ),
    "one-hot": (
        ONE_HOT,
        lambda: {
            "loss": keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
            "metrics": ["accuracy", keras.metrics.AUC(from_logits=True, multi_label=True, name="auc")],
        },
    ),
    "regression": (
        TARGETS,
        lambda: {"loss": "mse", "metrics": ["mae", keras.metrics.RootMeanSquaredError(), "r2_score"]},
    ),
    "huber": (TARGETS, lambda: {"loss": "huber", "weighted_metrics": ["mse"], "metrics": ["mse"]}),
    "summed": (
        TARGETS,
        lambda: {"loss": keras.losses.MeanSquaredError(reduction="sum"), "metrics": ["cosine_similarity"]},
    ),
}


def compare(make, data, options_of, optimizer=None, fit=None, theirs=None):
    """Train alike in both; `theirs` is what Keras is to be given where that differs."""
    keras.utils.set_random_seed(0)
    model, twin = make(), make()
    twin.set_weights(model.get_weights())
    optimizer = optimizer or keras.optimizers.SGD(0.01, momentum=0.9)
    trainer = tl.Trainer(model, optimizer=optimizer, **options_of())  # metrics of its own
    fit = fit or {}
    mine = trainer.fit(
        data, batch_size=8, epochs=3, shuffle=False, validation_data=data, progress="none", **fit
    ).history
    twin.compile(keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)), **options_of())
    x, y, weight = (*data, None, None)[:3]
    its = twin.fit(
        x, y, 8, 3, verbose=0, shuffle=False, sample_weight=weight, validation_data=data, **(theirs or fit)
    ).history
    assert mine.keys() == its.keys()
    for name, values in its.items():
        np.testing.assert_allclose(mine[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
    for one, other in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert trainer.trace_count == 1


def pairs():
    """Each kind of model with each loss; but for functional models, all but one of them slowly."""
    for make in (functional, sequential, subclassed):
        for case in CASES:
            slow = make is not functional and case != "labels"
            yield pytest.param(make, case, id=f"{make.__name__}-{case}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("make", "case"), list(pairs()))
def test_logs_are_those_of_fit(make, case):
    y, options = CASES[case]
    compare(make, (X, y), options)


@pytest.mark.parametrize("case", ["labels", "huber"])
def test_with_sample_weights(case):
    y, options = CASES[case]
    compare(functional, (X, y, WEIGHTS), options)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "adamw", "lion"])
def test_with_other_optimizers(optimizer):
    compare(sequential, (X, LABELS), CASES["labels"][1], keras.optimizers.get(optimizer))


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], ONE_HOT, LABELS.astype("float32")], ids=np.shape)
def test_with_class_weights(labels):
    loss = CASES["one-hot"][1]()["loss"] if labels.shape[-1] == 3 else CROSS_ENTROPY

    def options():
        return {"loss": loss, "weighted_metrics": ["accuracy"]}

    compare(sequential, (X, labels), options, fit={"class_weight": {0: 0.5, 2: 3.0}})


def test_with_several_outputs():
    def options():
        return {
            "loss": {"label": CROSS_ENTROPY, "y": "mse"},
            "loss_weights": {"label": 0.3, "y": 2.0},
            "metrics": {"label": ["accuracy"], "y": ["mae", "mse"]},
        }

    compare(two_headed, (X, {"label": LABELS, "y": TARGETS}), options)


def test_batches_of_a_dataset_and_steps_per_epoch_are_the_same():
    data = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(8).repeat()
    keras.utils.set_random_seed(0)
    model, twin = functional(), functional()
    twin.set_weights(model.get_weights())
    _, options = CASES["labels"]
    trainer = tl.Trainer(model, optimizer=keras.optimizers.SGD(0.05), **options())
    mine = trainer.fit(
        data, epochs=3, steps_per_epoch=4, validation_data=data, validation_steps=2, progress="none"
    ).history
    twin.compile(keras.optimizers.SGD(0.05), **options())
    its = twin.fit(
        data, epochs=3, steps_per_epoch=4, validation_data=data, validation_steps=2, verbose=0, shuffle=False
    ).history
    for name, values in its.items():
        np.testing.assert_allclose(mine[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
    assert trainer.step == 12
