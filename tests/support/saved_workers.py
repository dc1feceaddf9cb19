"""A run of several workers that saves itself: `python -m tests.support.saved_workers FOLDER SECONDS_A_STEP`."""

import sys
import time

import keras
import tensorflow as tf

import tapeloop as tl
from tests.support import distributed


class Tells(keras.callbacks.Callback):
    """Says how far the run has come, and takes its time."""

    def __init__(self, trainer, seconds):
        super().__init__()
        self._trainer, self._seconds = trainer, seconds

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(self._seconds)
        print("step", self._trainer.step, flush=True)


def trained(strategy, folder=None, seconds=0.0):
    """What the run ends with: its steps, the sum of the weights, and its last losses."""
    trainer, (x, y) = distributed.made("two_groups", strategy), distributed.data()
    trainer.fit(
        x,
        y,
        batch_size=20,
        epochs=8,
        verbose=0,
        validation_data=(x[:21], y[:21]),
        checkpoint=folder and tl.Checkpoints(folder, every_steps=3, keep_best="val_loss"),
        callbacks=[Tells(trainer, seconds)] if seconds else None,
    )
    total = sum(abs(variable.variable.numpy()).sum() for variable in trainer.selection.tree.variables)
    logs = trainer.history.history
    return f"{trainer.step} {total:.4f} {logs['loss'][-1]:.5f} {logs['val_loss'][-1]:.5f}"


if __name__ == "__main__":
    print("END", trained(tf.distribute.MultiWorkerMirroredStrategy(), sys.argv[1], float(sys.argv[2])), flush=True)
