"""Keras callbacks used together, and one of your own that ends the fit once the learning rate is small."""

import tempfile
from pathlib import Path

import keras
import tapeloop as tl
from sklearn.datasets import load_digits

layers, callbacks = keras.layers, keras.callbacks


class StopAtRate(callbacks.Callback):
    def __init__(self, lowest):
        super().__init__()
        self.lowest = lowest

    def on_epoch_end(self, epoch, logs=None):
        if float(self.model.optimizer.learning_rate) < self.lowest:
            self.model.stop_training = True


keras.utils.set_random_seed(0)
x, y = load_digits().data / 16, load_digits().target
model = keras.Sequential([keras.Input((64,)), layers.Dense(128, "relu", name="base"), layers.Dense(10, name="head")])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
trainer = tl.Trainer(model, tl.Freeze("base"), loss=loss, optimizer=keras.optimizers.Adam(0.1), seed=0)
best, rates = Path(tempfile.mkdtemp()) / "best.keras", []
used = [
    callbacks.EarlyStopping(monitor="val_loss", patience=10, restore_best_weights=True),
    callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.3),
    callbacks.ModelCheckpoint(best, monitor="val_loss", save_best_only=True),
    callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: rates.append(trainer.learning_rates["default"])),
    StopAtRate(1e-3),
]
history = trainer.fit(x[:300], y[:300], epochs=50, validation_data=(x[300:], y[300:]), callbacks=used, verbose=0)
losses, restored = history.history["val_loss"], trainer.evaluate(x[300:], y[300:], verbose=0)["loss"]
saved = tl.Trainer(keras.models.load_model(best), loss=loss).evaluate(x[300:], y[300:], verbose=0)["loss"]
print(f"{len(rates)} epochs, rate {rates[-1]:g}, loss {losses[-1]:.4f}, best {min(losses):.4f}, saved {saved:.4f}")
assert rates[-1] < 1e-3 and max(abs(min(losses) - restored), abs(saved - restored)) < 1e-5 < losses[-1] - saved
