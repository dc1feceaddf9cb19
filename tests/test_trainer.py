import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models
from tests.support.models import trainer_of


def test_fit_returns_the_logs_of_each_epoch_and_counts_on():
    trainer = trainer_of(metrics=["accuracy"])
    history = trainer.fit(models.images(40), epochs=2, batch_size=16, validation_data=models.images(8), progress="none")
    assert list(history.history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert all(len(values) == 2 for values in history.history.values())
    assert (trainer.step, trainer.epoch, history.epoch) == (6, 2, [1, 2])
    assert trainer.fit(models.images(40), batch_size=40, progress="none").epoch == [3]
    assert (trainer.step, trainer.epoch) == (7, 3)


def test_one_trace_for_one_selection_and_signature_and_one_more_for_a_ragged_batch():
    trainer = trainer_of(metrics=["accuracy"])
    trainer.fit(models.images(32), batch_size=16, epochs=3, progress="none")
    assert trainer.trace_count == 1
    trainer.fit(models.images(40), batch_size=16, epochs=3, progress="none")
    assert trainer.trace_count == 2
    trainer.policy = tl.Freeze("base")
    trainer.fit(models.images(32), batch_size=16, progress="none")
    assert trainer.trace_count == 3
    trainer.policy = tl.TrainOnly("head")  # the same selection
    trainer.fit(models.images(32), batch_size=16, progress="none")
    trainer.policy = tl.TrainAll()
    trainer.fit(models.images(32), batch_size=16, progress="none")
    assert trainer.trace_count == 3


def test_logs_equal_those_of_keras():
    x, y = models.images(40)
    weights = np.linspace(0.5, 2.0, 40).astype("float32")
    model, twin = models.functional(), models.functional()
    for each in (model, twin):
        each.get_layer("base").get_layer("drop").rate = 0.0
    twin.set_weights(model.get_weights())
    options = {"loss": models.cross_entropy(), "metrics": ["accuracy"], "weighted_metrics": ["accuracy"]}
    twin.compile(keras.optimizers.Adam(1e-2), **options)
    theirs = twin.fit(x, y, sample_weight=weights, epochs=2, batch_size=16, shuffle=False, verbose=0)
    trainer = tl.Trainer(model, optimizer=keras.optimizers.Adam(1e-2), **options)
    mine = trainer.fit((x, y, weights), epochs=2, batch_size=16, shuffle=False, progress="none")
    assert list(mine.history) == ["loss", *(name for name in theirs.history if name != "loss")]
    for name, values in theirs.history.items():
        np.testing.assert_allclose(mine.history[name], values, rtol=1e-5)
    for one, other in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    evaluated = twin.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    for name, value in trainer.evaluate((x, y, weights), progress="none").items():
        np.testing.assert_allclose(value, evaluated[name], rtol=1e-5)
    np.testing.assert_allclose(trainer.predict(x, batch_size=16), twin.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs_by_name():
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((3,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = {"p": keras.layers.Dense(1, name="p")(joined), "q": keras.layers.Dense(2, name="q")(joined)}
    model = keras.Model(inputs, outputs)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    x = {"a": np.ones((8, 2), "float32"), "b": np.ones((8, 3), "float32")}
    y = {"p": np.zeros((8, 1), "float32"), "q": np.ones((8, 2), "float32")}
    options = {"loss": {"p": "mse", "q": "mae"}, "loss_weights": {"p": 1.0, "q": 2.0}, "metrics": {"q": ["mse"]}}
    twin.compile("sgd", **options)
    theirs = twin.fit(x, y, verbose=0, epochs=2).history
    trainer = tl.Trainer(model, optimizer="sgd", **options)
    mine = trainer.fit((x, y), epochs=2, progress="none").history
    assert set(mine) == set(theirs)
    for name in theirs:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5)
    assert {name: values.shape for name, values in trainer.predict(x).items()} == {"p": (8, 1), "q": (8, 2)}


def lazy():
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])


@pytest.mark.parametrize("make", [models.Subclassed, lazy])
def test_an_unbuilt_model_is_built_from_the_first_batch(make):
    trainer = trainer_of(make(), metrics=["accuracy"])
    trainer.fit(models.images(32), batch_size=16, progress="none")
    assert trainer.trace_count == 1
    assert trainer.step == 2


def test_building_moves_nothing():
    keras.utils.set_random_seed(3)
    model = models.Subclassed()
    trainer = trainer_of(model, tl.Freeze("base"))
    trainer.evaluate(models.images(8), progress="none")
    before = models.values(model)
    trainer.evaluate(models.images(8), progress="none")
    assert models.values(model) == before
    assert trainer.step == 0


def test_evaluation_and_prediction_move_nothing_and_drop_nothing():
    model = models.functional()
    before = models.values(model)
    trainer = trainer_of(model, metrics=["accuracy"])
    first = trainer.evaluate(models.images(40), progress="none")
    assert first == trainer.evaluate(models.images(40), batch_size=40, progress="none") or abs(
        first["loss"] - trainer.evaluate(models.images(40), batch_size=40, progress="none")["loss"]
    ) < 1e-5  # fmt: skip
    assert trainer.predict(models.images(40)[0]).shape == (40, 3)
    assert trainer.predict(models.images(40)).shape == (40, 3)
    assert models.values(model) == before


def test_a_module_trains():
    model = models.Module()
    trainer = trainer_of(model, tl.Freeze("base"), optimizer=keras.optimizers.SGD(0.1))
    before = models.values(model)
    history = trainer.fit(models.images(40), epochs=3, progress="none").history["loss"]
    after = models.values(model)
    assert history[-1] < history[0]
    assert {path for path in before if before[path] != after[path]} == {"w", "b/0"}


class GAN(tl.Trainer):
    def train_step(self, batch):
        noise = tf.ones((tf.shape(batch)[0], 2))
        with self.tape("discriminator") as tape:
            real = self.model["discriminator"](batch, training=True)
            fake = self.model["discriminator"](self.model["generator"](noise, training=True), training=True)
            d_loss = tf.reduce_mean(fake - real)
        self.update(tape, d_loss)
        with self.tape("generator") as tape:
            g_loss = -tf.reduce_mean(self.model["discriminator"](self.model["generator"](noise, training=True)))
        self.update(tape, g_loss)
        return {"d_loss": d_loss, "g_loss": g_loss}


def gan(policy=None, kind=GAN):
    networks = {
        "generator": keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()]),
        "discriminator": keras.Sequential([keras.layers.Dense(1)]),
    }
    policy = policy or tl.Groups({"generator": "generator", "discriminator": "discriminator"})
    return kind(networks, policy, optimizer={"generator": "adam", "discriminator": keras.optimizers.SGD(0.1)})


def test_a_step_written_with_the_tape_trains_two_models_in_turn():
    trainer = gan()
    data = tf.data.Dataset.from_tensors(tf.ones((4, 3))).repeat(5)
    history = trainer.fit(data, progress="none")
    assert list(history.history) == ["d_loss", "g_loss"]
    assert trainer.trace_count == 1
    assert trainer.step == 5


def test_a_group_that_is_not_updated_does_not_move():
    class DiscriminatorOnly(GAN):
        def train_step(self, batch):
            with self.tape("discriminator") as tape:
                loss = tf.reduce_mean(self.model["discriminator"](self.model["generator"](batch)))
            self.update(tape, loss)
            return {"loss": loss}

    trainer = gan(kind=DiscriminatorOnly)
    data = [tf.ones((4, 3))]
    trainer.fit(data, progress="none")
    before = models.values(trainer.model, "generator"), models.values(trainer.model, "discriminator")
    trainer.fit(data, progress="none")
    assert models.values(trainer.model, "generator") == before[0]
    assert models.values(trainer.model, "discriminator") != before[1]


def test_an_overridden_loss_may_log_more():
    class Custom(tl.Trainer):
        def compute_loss(self, batch, training):
            x, y = batch
            error = tf.reduce_mean((self.forward(x, training)[:, 0] - tf.cast(y, tf.float32)) ** 2)
            return error, {"twice": 2 * error}

    trainer = Custom(models.functional())
    history = trainer.fit(models.images(8), progress="none", validation_data=models.images(8)).history
    assert list(history) == ["loss", "twice", "val_loss", "val_twice"]
    np.testing.assert_allclose(history["twice"], 2 * np.array(history["loss"]), rtol=1e-6)


def test_python_control_flow_over_tensors_works_in_an_overridden_step():
    class Clipped(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            loss = logs["loss"]
            if loss > 1.0:
                loss = tf.constant(1.0)
            return {"loss": loss}

    history = Clipped(models.functional(), loss=models.cross_entropy()).fit(models.images(8), progress="none")
    assert history.history["loss"][0] <= 1.0


def test_two_trainers_share_submodels():
    base = keras.Sequential([keras.Input((6, 6, 1)), *models.base_layers()], name="base")
    inputs = keras.Input((6, 6, 1))
    one, two = (keras.Model(inputs, keras.layers.Dense(3, name="head")(base(inputs))) for _ in range(2))
    trainer_of(one, tl.Freeze("base")).fit(models.images(8), progress="none")
    before = models.values(two)
    trainer_of(two, tl.TrainAll()).fit(models.images(8), progress="none")
    assert models.values(two)["base/conv/kernel"] != before["base/conv/kernel"]


def test_a_flag_set_between_two_fits_takes_effect():
    model = models.functional()
    trainer = trainer_of(model)
    trainer.fit(models.images(8), progress="none")
    model.get_layer("base").trainable = False
    before = models.values(model, "base")
    trainer.fit(models.images(8), progress="none")
    assert models.values(model, "base") == before
