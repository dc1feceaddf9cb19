"""A run that Ctrl-C interrupts in mid-epoch goes on in a second trainer, and ends as if nothing had interrupted it."""

import signal
import tempfile

import keras
import numpy as np
import tapeloop as tl
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
folder = tempfile.mkdtemp()


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 100:
            signal.raise_signal(signal.SIGINT)


def run(seed, checkpoint=None, callbacks=None):
    keras.utils.set_random_seed(seed)
    body = [keras.layers.Dense(64, activation="relu", name="body"), keras.layers.Dropout(0.5, name="dropout")]
    model = keras.Sequential([keras.Input((64,)), *body, keras.layers.Dense(10, name="head")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = tl.Trainer(model, tl.GradualUnfreeze(["head", "body"], every=1), loss=loss, seed=seed)
    trainer.fit(x / 16, y, epochs=4, checkpoint=checkpoint, callbacks=callbacks, verbose=0)
    return trainer


uninterrupted = run(seed=0)
try:
    run(seed=0, checkpoint=folder, callbacks=[Interrupt()])
except KeyboardInterrupt:
    print("saved", tl.Checkpoints(folder).newest.name)
resumed = run(seed=1, checkpoint=folder)  # another seed: all that is random comes from the checkpoint
weights = zip(uninterrupted.model.get_weights(), resumed.model.get_weights())
differences = [np.abs(one - other).max() for one, other in weights]
print("steps", uninterrupted.step, resumed.step, "largest difference", max(differences))
assert uninterrupted.step == resumed.step and max(differences) == 0
