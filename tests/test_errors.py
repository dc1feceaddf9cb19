"""What cannot be done raises a clear error, before anything has moved."""

import keras
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.fitting import refused
from tests.support.models import trainer_of


class OneOfTwo(tl.Trainer):
    def forward(self, inputs, training):
        return self.model["used"](inputs, training=training)


def two_models():
    unused = keras.layers.Dense(3)
    unused.build((None, 36))
    return {"used": models.functional(), "unused": unused}


class PlainTape(tl.Trainer):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = self.compute_loss(batch, training=True)
        self.update(tape, loss)


class PerExample(tl.Trainer):
    def compute_loss(self, batch, training):
        return tf.reduce_mean(self.forward(batch[0], training), axis=-1)


class NoLoss(tl.Trainer):
    def compute_loss(self, batch, training):
        self.forward(batch[0], training)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: OneOfTwo(two_models(), loss=models.cross_entropy()), tl.DisconnectedError,
         r"2 of the 8 variables that should train get no gradient. `unused/kernel`, `unused/bias`: not read where "
         "the loss is computed, its layer is not called there"),
        (lambda: trainer_of(clip_norm={"tail": 1.0}), tl.PolicyError,
         r"`clip_norm` is for \['tail'\], but the groups are \['default'\]"),
        (lambda: tl.Trainer(models.functional()), ValueError, r"There is no loss: `loss` is None and no layer adds"),
        (lambda: tl.Trainer({"a": models.functional()}, loss="mse"), TypeError, r"several models \('a'\) cannot know"),
        (lambda: tl.Trainer(tf.Module(), loss="mse"), TypeError, r"give Module a `__call__`, or override `forward`"),
        (lambda: PlainTape(models.functional(), loss=models.cross_entropy()), TypeError,
         r"`update` takes what `self.tape\(...\)` returned"),
        (lambda: PerExample(models.functional()), ValueError, r"The loss must be a scalar tensor.*shape=\(8,\)"),
        (lambda: NoLoss(models.functional()), ValueError, r"The loss must be a scalar tensor.*Received: None"),
    ],
)  # fmt: skip
def test_what_cannot_train_raises_before_anything_has_moved(make, error, text):
    with refused(trainer := make(), error, text):
        trainer.fit(models.images(8), verbose=0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (lambda x, y: (x[:, :5], y), r"do not fit the model `functional.*`: it takes .*, the batch has \(8, 5, 6, 1"),
        (lambda x, y: ((x, x), y), r"do not fit the model"),
        (lambda x, y: (x, y[:, None, None, None]), r"does not fit the batch: the targets are \(8, 1, 1, 1"),
        (lambda x, y: (x,), r"The loss needs targets, but the batch has none"),
        (lambda x, y: (x, y[:5]), r"The arrays of `x` must have the same number of examples"),
        (lambda x, y: (x[:0], y[:0]), r"`x` is empty: its arrays have no examples"),
        (lambda x, y: [], r"`x` is empty: it was asked for a batch"),
        (lambda x, y: None, r"`x` must be a `tf.data.Dataset`.*Received: None of type NoneType"),
        (lambda x, y: 3, r"`x` must be a `tf.data.Dataset`.*Received: 3 of type int"),
        (lambda x, y: [(tf.constant(1.0), tf.constant(1.0))], r"do not fit the model|must hold a tensor"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_raises_before_anything_has_moved(data, text):
    with refused(trainer := trainer_of(metrics=["accuracy"]), tl.DataError, text):
        trainer.fit(data(*models.images(8)), verbose=0)


def test_a_subclassed_model_called_on_the_wrong_shape():
    x, y = models.images(8)
    text = r"cannot be called on a batch of inputs \(8, 5, 6, 1\) float32"
    with refused(trainer := trainer_of(models.built(models.Subclassed())), tl.DataError, text):
        trainer.fit((x[:, :5], y), verbose=0)


@pytest.mark.parametrize(
    ("validation", "text"),
    [
        (lambda x, y: (x, y[:, None, None, None]), "does not fit the batch"),
        (lambda x, y: iter([(x, y)]), "`validation_data` is an iterator, which lasts one epoch"),
    ],
)
def test_validation_data_is_tried_before_anything_has_moved(validation, text):
    x, y = models.images(8)
    with refused(trainer := trainer_of(), tl.DataError, text):
        trainer.fit((x, y), epochs=2, validation_data=validation(x, y), verbose=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tl.Trainer(3, loss="mse"), TypeError, r"`model` must be a Keras model or layer.*3 of type int"),
        (lambda: trainer_of(policy="base"), TypeError, r"`policy` must be a `VariablePolicy`.*Received: 'base'"),
        (lambda: trainer_of(policy=tl.Freeze), TypeError, r"`policy` must be a `VariablePolicy`"),
        (lambda: trainer_of().fit(models.images(8), epochs=-1), ValueError, r"`epochs` must be a whole number"),
        (lambda: trainer_of().fit(models.images(8), verbose="loud"), ValueError, r"`verbose` must be 'auto', 0"),
        (lambda: trainer_of().tape(), RuntimeError, r"`tape` was called outside a step that trains"),
        (lambda: setattr(trainer_of(), "policy", "base"), TypeError, r"`policy` must be a `VariablePolicy`"),
        (lambda: tl.Trainer({"a": 3}), TypeError, r"from names without slashes to Keras models.*Received: 'a': 3"),
        (lambda: tl.Trainer({"a/b": models.functional()}), TypeError, r"Received: 'a/b'"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_every_error_of_tapeloop_is_one():
    for error in (tl.PolicyError, tl.DisconnectedError, tl.DataError):
        assert issubclass(error, tl.TapeloopError)
        assert issubclass(error, ValueError)
