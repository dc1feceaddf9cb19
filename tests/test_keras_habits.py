"""What a Keras user types: arguments of `fit`, attributes of a compiled model, and what a trainer says to each."""

import inspect
import math

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support.fitting import X, Y, mlp

ARGUMENTS = {"fit": keras.Model.fit, "evaluate": keras.Model.evaluate, "predict": keras.Model.predict}


@pytest.fixture(scope="module")
def trainer():
    return tl.Trainer(mlp("head"), loss="mse", metrics=["mae"], ema=0.9)


@pytest.mark.parametrize("method", ARGUMENTS)
def test_every_argument_of_keras_is_taken_or_answered(trainer, method):
    ours = inspect.signature(getattr(trainer, method)).parameters
    theirs = [name for name in inspect.signature(ARGUMENTS[method]).parameters if name not in ("self", "kwargs")]
    for name in theirs:
        if name not in ours:
            with pytest.raises(TypeError, match=rf"`{method}` has no argument `{name}`: .+\."):
                getattr(trainer, method)(X, **{name: 1})
    assert [name for name in theirs if name in ours][:2] == list(ours)[:2] or method == "predict"
    with pytest.raises(TypeError, match=rf"`{method}` has no argument `batchsize`. Did you mean `batch_size`\?"):
        getattr(trainer, method)(X, batchsize=1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compile", "the loss, the optimizer and the metrics are options of the trainer"),
        ("optimizer", r"`trainer.learning_rates\[group\]`"),
        ("summary", r"`print\(trainer.explain\(\)\)`"),
        ("save_weights", r"`trainer.save\('name.weights.h5'\)`"),
        ("get_layer", r"`trainer.model.get_layer\(name\)`"),
        ("histroy", "Did you mean `history`?"),
    ],
)
def test_what_a_model_has_and_a_trainer_has_not_is_answered(trainer, name, text):
    assert not hasattr(trainer, name)
    with pytest.raises(AttributeError, match=text):
        getattr(trainer, name)


def test_arrays_in_turn_or_in_a_tuple_are_the_same(trainer):
    apart = trainer.evaluate(X, Y, np.ones(len(X)), verbose=0)
    together = trainer.evaluate((X, Y, np.ones(len(X))), verbose=0)
    assert apart == together == trainer.evaluate([(X, Y)], verbose=0)
    np.testing.assert_array_equal(trainer.predict(X), trainer.predict((X, Y)))


def test_some_epochs_are_validated_and_by_the_averages(trainer):
    history = trainer.fit(X, Y, epochs=4, validation_split=0.25, validation_freq=2, validation_batch_size=3, verbose=0)
    assert [math.isnan(value) for value in history.history["val_loss"]] == [True, False, True, False]
    x, y = X[-len(X) // 4 :], Y[-len(Y) // 4 :]
    own = trainer.evaluate(x, y, verbose=0)["loss"]
    assert history.history["val_loss"][-1] == pytest.approx(own, rel=1e-5)
    history = trainer.fit(X, Y, epochs=3, validation_data=(x, y), validation_freq=[3], validate_with="ema", verbose=0)
    assert [math.isnan(value) for value in history.history["val_loss"]] == [True, True, False]
    with trainer.ema_weights():
        averaged = trainer.evaluate(x, y, verbose=0)["loss"]
    assert history.history["val_loss"][-1] == pytest.approx(averaged, rel=1e-5)
    assert averaged != trainer.evaluate(x, y, verbose=0)["loss"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"validation_split": 0.5, "validation_data": (X, Y)}, "`validation_data` and `validation_split` were both"),
        ({"validation_freq": 0}, "`validation_freq` must be a whole number, 1 or more. Received: 0"),
        ({"validation_freq": [1, "two"]}, "`validation_freq` must be a whole number"),
        ({"validate_with": "averages"}, "`validate_with` must be 'own' or 'ema'. Received: 'averages'"),
        ({"verbose": 3}, "`verbose` must be 'auto', 0"),
    ],
)
def test_options_that_cannot_be_are_refused(trainer, options, text):
    step = trainer.step
    with pytest.raises(ValueError, match=text):
        trainer.fit(X, Y, **options)
    assert trainer.step == step


def test_averages_that_are_not_kept_are_not_validated_with():
    with pytest.raises(ValueError, match=r"make the trainer with `ema=0.999`, say: it has no `ema`"):
        tl.Trainer(mlp("head"), loss="mse").fit(X, Y, validate_with="ema")


def test_several_inputs_come_in_a_list():
    one, other = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([one, other], keras.layers.Dense(1)(keras.layers.Concatenate()([one, other])))
    trainer = tl.Trainer(model, loss="mse")
    given = np.ones((8, 2)), np.zeros((8, 2))
    history = trainer.fit(list(given), np.ones((8, 1)), epochs=1, verbose=0)
    assert history.history["loss"]
    np.testing.assert_array_equal(trainer.predict(list(given)), trainer.predict((list(given),)))


def test_no_batch_size_is_that_of_keras():
    x, y = np.concatenate([X] * 5), np.concatenate([Y] * 5)
    trainer = tl.Trainer(mlp("head"), loss="mse")
    trainer.fit(x, y, batch_size=None, verbose=0)
    trainer.fit([(X, Y)], batch_size=None, verbose=0)
    assert trainer.step == 2 + 1  # batches of 32 and 8; and the batches that were given


ASSIGNED = {
    "optimizer": "`optimizer` is not assigned: there may be several.*`trainer.learning_rates",
    "learning_rate": r"assign `trainer.learning_rates\[group\]`; without groups of your own, the group is 'default'",
    "clip_norm": "it is an option of the trainer. Make a new one for another value; `save` and `load` carry the run",
    "trainable": "assign `trainer.policy`",
    "state": "`state` is the trainer's own and is not assigned: choose another name.",
    "model": "`model` is the trainer's own",
    "_features": "`_features` is the trainer's own",
}


@pytest.mark.parametrize("name", ASSIGNED)
def test_what_would_do_nothing_or_break_the_trainer_is_not_assigned(name):
    trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    with pytest.raises(AttributeError, match=ASSIGNED[name]):
        setattr(trainer, name, 1.0)
    trainer.loss = trainer.counts = 1  # names of the user's own


def test_shuffle_is_a_flag(trainer):
    with pytest.raises(ValueError, match=r"`shuffle` must be True or False\. Received: 'batch'"):
        trainer.fit(X, Y, shuffle="batch")


class TwoModels(tl.Trainer):
    def train_step(self, batch):
        with self.tape() as tape:
            loss = keras.ops.mean(self.model["a"](batch[0]) ** 2)
        self.update(tape, loss)
        return {"loss": loss}


def test_of_several_models_it_is_said_what_to_override_for_what_was_called():
    networks = {name: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]) for name in "ab"}
    x, y = np.ones((8, 4)), np.ones((8, 2))
    trainer, plain = TwoModels(networks, tl.TrainOnly("a")), tl.Trainer(networks, loss="mse")
    for call, said in (
        (lambda: trainer.evaluate(x, y, verbose=0), "know which to call: override `eval_step`."),
        (lambda: plain.evaluate(x, y, verbose=0), "know which to call: override `forward` or `compute_loss`."),
        (lambda: trainer.predict(x), "know which to call: override `forward`, which `predict` calls."),
        (lambda: plain.fit(x, y, verbose=0), "override `forward`, `compute_loss` or `train_step`."),
    ):
        with pytest.raises(TypeError, match=said):
            call()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"validation_data": [X, Y]}, r"`validation_data` is a list of 2 arrays.*write a tuple, `\(x, y\)`"),
        ({"validation_data": (X, Y), "validation_batch_size": 0}, "`batch_size` must be a whole number"),
        ({"validation_data": (X, Y), "validation_freq": []}, "`validation_freq` is empty"),
        ({"validation_steps": 2}, "`validation_steps` was given, and neither `validation_data`"),
        ({"validation_batch_size": 2}, "`validation_batch_size` was given, and neither `validation_data`"),
        ({"class_weight": {0.5: 1.0}}, "from classes, which are whole numbers, to weights"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_read_is_refused(trainer, options, text):
    with pytest.raises((tl.DataError, ValueError, TypeError), match=text):
        trainer.fit(X, Y, verbose=0, **options)


def test_classes_may_be_whole_numbers_in_float():
    one, other = [
        tl.Trainer(mlp("head"), loss="sparse_categorical_crossentropy").fit(
            X, np.arange(len(X)) % 2, class_weight=weights, verbose=0, shuffle=False
        )
        for weights in ({0: 2.0}, {0.0: 2.0})
    ]
    assert one.history["loss"] == pytest.approx(other.history["loss"])


@pytest.mark.parametrize("where", ["x", "y", "sample_weight", "predict"])
def test_texts_where_numbers_belong_are_told(where):
    texts = np.full(X.shape, "a")
    data = {"x": X, "y": Y, "sample_weight": np.ones(len(X))} | {
        where: {"y": np.full(Y.shape, "a"), "sample_weight": texts[:, 0]}.get(where, texts)
    }
    trainer = tl.Trainer(mlp("head"), loss="mse")
    with pytest.raises(tl.DataError, match=r"are texts, and the model or the loss computes with numbers"):
        trainer.predict(texts) if where == "predict" else trainer.fit(**data, verbose=0)
