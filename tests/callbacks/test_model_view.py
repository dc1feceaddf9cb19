"""What a callback finds as `self.model`, and what it may do there."""

import keras
import numpy as np

import tapeloop as tl

callbacks = keras.callbacks
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(20, 4)).astype("float32"), RANDOM.normal(size=(20, 2)).astype("float32")


def test_a_callback_finds_the_optimizer_and_the_logs_by_keras_idioms():
    found = {}

    class Looks(callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            optimizer = self.model.optimizer
            found["rates"] = optimizer.learning_rate, optimizer.learning_rate.numpy(), optimizer.iterations.numpy()
            optimizer.learning_rate.assign(0.5)
            found["after"] = float(optimizer.learning_rate)
            found["logs"] = self.model.get_metrics_result(), dict(logs)
            found["rest"] = self.model.loss, self.model.history

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    trainer = tl.Trainer(model, loss="mse", metrics=["mae"], optimizer=keras.optimizers.SGD(0.25))
    trainer.fit(X, Y, batch_size=10, callbacks=[Looks()], verbose=0)
    assert found["rates"] == (0.25, np.float32(0.25), 2)
    assert found["after"] == trainer.learning_rates["default"] == 0.5
    assert found["logs"][0] == found["logs"][1]
    assert found["rest"] == ("mse", trainer.history)


def test_a_fit_that_is_ended_before_an_epoch_has_not_begun_it():
    class Stops(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    history = trainer.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[Stops()], verbose=0)
    assert (history.epoch, trainer.epoch, trainer.step) == ([1], 1, 1)
    assert np.isfinite(history.history["loss"]).all()
    assert trainer.fit(X, Y, verbose=0).epoch == [2]
