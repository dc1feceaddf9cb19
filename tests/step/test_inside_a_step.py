"""What a step sees of its trainer, and what is said of the common mistakes of those who write one."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.compare import assert_close
from tests.support.fitting import BAD, X, Y, fit, mlp
from tests.support.steps import OneUpdate

layers = keras.layers
BATCHES = [(X, Y)] * 3


def trainer_of(kind=tl.Trainer, policy=None, **options):
    return kind(mlp("head"), policy, loss="mse", optimizer="sgd", **options)


class Counts(tl.Trainer):
    def train_step(self, batch):
        logs = super().train_step(batch)
        assert tf.is_tensor(self.step)
        return {**logs, "step": self.step, "epoch": self.epoch}

    def eval_step(self, batch):
        return {**super().eval_step(batch), "step": self.step}


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}, {"steps_per_call": 1}], ids=str)
def test_step_and_epoch_are_tensors_that_go_on(how):
    trainer = trainer_of(Counts, **how)
    history = trainer.fit(BATCHES, epochs=3, validation_data=BATCHES, verbose=0).history
    assert history["step"] == [1.0, 4.0, 7.0]  # the means of 0, 1, 2; 3, 4, 5; ...
    assert history["epoch"] == [0.0, 1.0, 2.0]
    assert history["val_step"] == [3.0, 6.0, 9.0]
    assert (trainer.step, trainer.epoch) == (9, 3)
    assert trainer.fit(BATCHES[:1], verbose=0).history["step"] == [9.0]
    assert trainer.trace_count <= 1


def test_a_step_that_is_undone_does_not_count():
    trainer = trainer_of(Counts, nonfinite="skip")
    assert trainer.fit([(X, Y), (BAD, Y), (X, Y)], verbose=0).history["step"] == [0.5]
    assert trainer.step == 2


class Weighted(tl.Trainer):
    beta = 1.0

    def compute_loss(self, batch, training):
        return self.beta * super().compute_loss(batch, training)


def test_a_number_that_changes_after_the_trace_is_warned_of_once():
    trainer = trainer_of(Weighted)
    trainer.beta = 0.5
    trainer.fit(BATCHES, verbose=0)
    trainer.fit(BATCHES, verbose=0)  # a warning would be an error
    trainer.beta = 0.25
    text = r"`self.beta` was 0.5 when the train step was traced, and is 0.25 now.*tf.Variable"
    with pytest.warns(UserWarning, match=text):
        trainer.fit(BATCHES, verbose=0)
    trainer.fit(BATCHES, verbose=0)


def test_so_is_a_number_of_the_class():
    trainer = trainer_of(Weighted)
    trainer.evaluate(X, Y, verbose=0)
    trainer.beta = 0.25
    with pytest.warns(UserWarning, match=r"`self.beta` was 1.0 when the eval step was traced, and is 0.25 now"):
        trainer.evaluate(X, Y, verbose=0)


def test_a_variable_may_change_and_so_may_a_number_that_no_step_reads():
    trainer = trainer_of(Weighted)
    trainer.beta, trainer.other = tf.Variable(0.5, trainable=False), 1
    trainer.fit(BATCHES, verbose=0)
    trainer.beta.assign(0.0)
    trainer.other = 2
    assert trainer.fit(BATCHES, verbose=0).history["loss"] == [0.0]


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_step_that_updates_nothing_says_so_once(eagerly):
    class Forgets(tl.Trainer):
        def train_step(self, batch):
            return {"loss": self.compute_loss(batch, training=True)}

    trainer = trainer_of(Forgets, run_eagerly=eagerly)
    text = r"calls neither `self.update\(tape, loss\)`.*nothing trains of the 2 variables"
    with pytest.warns(UserWarning, match=text):
        trainer.fit(BATCHES, verbose=0)
    trainer.fit([(X, Y)], verbose=0)


def test_one_that_assigns_to_what_trains_says_nothing():
    class ByHand(tl.Trainer):
        def train_step(self, batch):
            for variable in self.model.trainable_variables:
                variable.assign(variable * 0.9)
            return {"loss": tf.zeros(())}

    trainer_of(ByHand).fit(BATCHES, verbose=0)


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(x)


@pytest.mark.parametrize("name", ["train_step", "test_step", "compute_loss", "compute_metrics"])
def test_a_model_with_a_step_of_its_own_is_refused_and_both_remedies_named(name):
    model = type("Mine", (Own,), {name: lambda self, *args, **kwargs: None})()
    text = rf"Mine has a `{name}` of its own.*Subclass `Trainer`.*`ignore_model_step=True`"
    with pytest.raises(ValueError, match=text):
        tl.Trainer(model, loss="mse")
    fit(model, ignore_model_step=True)
    fit(model, kind=Weighted)  # which replaces the loss
    tl.Trainer(Own(), loss="mse")


def test_a_missing_eval_step_is_named():
    class TrainsAlone(OneUpdate):
        def loss_of(self, batch):
            return tf.reduce_mean(self.model(batch[0]) ** 2)

    trainer = fit(mlp("head"), kind=TrainsAlone, loss=None)
    text = r"`TrainsAlone` overrides `train_step` and evaluates by the default `eval_step`"
    with pytest.raises(ValueError, match=text):
        trainer.evaluate(BATCHES, verbose=0)


def test_a_loss_computed_after_the_tape_is_named():
    class TooLate(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                outputs = self.model(batch[0])
            loss = tf.reduce_mean((outputs - batch[1]) ** 2)
            self.update(tape, loss)
            return {"loss": loss}

    text = r"computed after the `with self.tape\(\.\.\.\)` block: move it inside"
    with pytest.raises(tl.DisconnectedError, match=text):
        trainer_of(TooLate).fit(BATCHES, verbose=0)


def test_a_missing_call_of_the_constructor_is_named():
    class Forgets(tl.Trainer):
        def __init__(self, model):
            self.net = model

    with pytest.raises(RuntimeError, match=r"`Forgets.__init__` has not called `super\(\).__init__\(\.\.\.\)`"):
        Forgets(mlp("head")).fit(BATCHES, verbose=0)
    with pytest.raises(AttributeError, match="'Trainer' has no attribute 'trian'"):
        _ = trainer_of().trian


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_trainer_cannot_be_pickled_or_copied(copied):
    text = r"A Trainer cannot be pickled or copied: it holds compiled steps. Save the model"
    with pytest.raises(TypeError, match=text):
        copied(trainer_of())


def test_logs_that_an_epoch_has_not_are_nan():
    class Sometimes(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            return {**logs, "few": tf.ones(())} if len(self.selection.groups) == 1 else logs

    policy = tl.Phases({0: tl.TrainAll(), 1: tl.Groups({"a": "head/kernel", "b": "head/bias"}), 2: tl.TrainAll()})
    history = trainer_of(Sometimes, policy).fit(BATCHES, epochs=3, verbose=0).history
    assert [len(values) for values in history.values()] == [3, 3]
    assert history["few"][0] == history["few"][2] == 1.0
    assert np.isnan(history["few"][1])


def test_prediction_of_an_unbuilt_model_needs_no_targets():
    model = Own()
    trainer = tl.Trainer(model, loss="mse")
    outputs = trainer.predict(X)
    assert_close(outputs, model(X), rtol=1e-6)
    trainer.fit(BATCHES, verbose=0)


class Reading(tl.Trainer):
    """Predicts how far training has come, and a number of its own."""

    def forward(self, inputs, training):
        ones = keras.ops.ones_like(super().forward(inputs, training))
        return ones if training else ones * self.factor * keras.ops.cast(10 * self.epoch + self.step, "float32")


def test_a_prediction_reads_the_step_and_the_epoch_of_now_and_warns_of_numbers_that_changed():
    trainer = Reading(mlp("hidden", "head"), run_eagerly=False)
    trainer.factor = 1.0
    x = BATCHES[0][0]
    assert (trainer.predict(x) == 0).all()
    trainer.state.step, trainer.state.epoch = 5, 2
    assert (trainer.predict(x) == 25).all()
    trainer.factor = 2.0
    with pytest.warns(UserWarning, match=r"`self.factor` was 1.0 when the predict step was traced, and is 2.0 now"):
        trainer.predict(x)
