"""A run of several workers that saves itself: `python -m tests.support.saved_workers FOLDER SECONDS_A_STEP`."""

import os
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


def main(folder, seconds):
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if "TF_CONFIG" in os.environ else None
    trainer, (x, y) = distributed.made("two_groups", strategy), distributed.data()
    trainer.fit(
        x,
        y,
        batch_size=20,
        epochs=8,
        verbose=0,
        validation_data=(x[:21], y[:21]),
        checkpoint=tl.Checkpoints(folder, every_steps=3, keep_best="val_loss"),
        callbacks=[Tells(trainer, seconds)] if seconds else None,
    )
    total = sum(abs(variable.variable.numpy()).sum() for variable in trainer.selection.tree.variables)
    logs = trainer.history.history
    print(f"END {trainer.step} {total:.4f} {logs['loss'][-1]:.5f} {logs['val_loss'][-1]:.5f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
