"""The logs of each epoch are those of Keras' `fit` on the same data, seed and order."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.class_weight import class_weights_of, with_class_weights
from tests.support.compare import assert_close

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
    """A model with two inputs and two outputs, told apart by their names."""
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((4,), name="b")}
    hidden = layers.Dense(8, activation="tanh")(layers.Concatenate()([inputs["a"], inputs["b"]]))
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


def dict_of(**options):
    return lambda: options


def compare(make, data, options_of, optimizer=None, **fit):
    """Train alike in both, evaluate and predict."""
    keras.utils.set_random_seed(0)
    model, twin = make(), make()
    twin.set_weights(model.get_weights())
    optimizer = optimizer or keras.optimizers.SGD(0.01, momentum=0.9)
    trainer = tl.Trainer(model, optimizer=optimizer, **options_of())  # metrics of its own
    twin.compile(keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)), **options_of())
    fit |= {"epochs": 3, "shuffle": False, "validation_data": data}
    if isinstance(data, tuple):
        fit["batch_size"] = 8
    x, y, weight = (*data, None, None)[:3] if isinstance(data, tuple) else (data, None, None)
    mine = trainer.fit(data, verbose=0, **fit).history
    its = twin.fit(x, y, verbose=0, sample_weight=weight, **fit).history
    assert_close(mine, its, rtol=1e-6, atol=1e-6)
    assert_close(model, twin, rtol=1e-4, atol=1e-5)
    assert trainer.trace_count == 1
    return trainer, twin


def pairs():
    """Each kind of model with each loss; quickly all with labels, and functional ones with two losses more."""
    for make in (functional, sequential, subclassed):
        for case in CASES:
            slow = case != "labels" and (make is not functional or case in ("regression", "summed"))
            yield pytest.param(make, case, id=f"{make.__name__}-{case}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("make", "case"), list(pairs()))
def test_logs_are_those_of_fit(make, case):
    y, options = CASES[case]
    compare(make, (X, y), options)


@pytest.mark.parametrize("case", ["labels", "huber"])
def test_with_sample_weights(case):
    y, options = CASES[case]
    trainer, twin = compare(functional, (X, y, WEIGHTS), options)
    if case == "labels":
        evaluated = twin.evaluate(X, y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
        assert trainer.evaluate((X, y, WEIGHTS), verbose=0) == pytest.approx(evaluated, rel=1e-5)
        assert_close(trainer.predict(X, batch_size=16), twin.predict(X, verbose=0), rtol=1e-4, atol=1e-5)


SLOW_OPTIMIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "lion")]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", *SLOW_OPTIMIZERS])
def test_with_other_optimizers(optimizer):
    compare(sequential, (X, LABELS), CASES["labels"][1], keras.optimizers.get(optimizer))


def test_with_class_weights():
    options = dict_of(loss=CROSS_ENTROPY, weighted_metrics=["accuracy"])
    compare(sequential, (X, LABELS), options, class_weight={0: 0.5, 2: 3.0})


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], ONE_HOT, LABELS.astype("float32")], ids=np.shape)
def test_class_weights_of_labels_of_any_shape(labels):
    _, _, weights = with_class_weights((X, tf.constant(labels)), class_weights_of({0: 0.5, 2: 3.0}))
    np.testing.assert_array_equal(weights, np.array([0.5, 1.0, 3.0], "float32")[LABELS])


def test_with_several_inputs_and_outputs():
    options = dict_of(
        loss={"label": CROSS_ENTROPY, "y": "mse"},
        loss_weights={"label": 0.3, "y": 2.0},
        metrics={"label": ["accuracy"], "y": ["mae", "mse"]},
    )
    data = ({"a": X[:, :2], "b": X[:, 2:]}, {"label": LABELS, "y": TARGETS})
    trainer, _ = compare(two_headed, data, options)
    shapes = {name: values.shape for name, values in trainer.predict(data[0]).items()}
    assert shapes == {"label": (37, 3), "y": (37, 3)}


def test_batches_of_a_dataset_and_steps_per_epoch_are_the_same():
    data = tf.data.Dataset.from_tensor_slices((X[:32], LABELS[:32])).batch(8).repeat()
    trainer, _ = compare(functional, data, CASES["labels"][1], steps_per_epoch=3, validation_steps=2)
    assert trainer.step == 9
