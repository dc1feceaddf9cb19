"""Two workers that do not train the same: `python -m tests.support.disagreeing` prints what each is told."""

import json
import os

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from tests.support import distributed

STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()
INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
x, y = distributed.data()


def trainer(policy=None):
    made = distributed.made("head", STRATEGY)
    made.policy = policy or tl.Freeze("base")
    return made


def told(what, run):
    try:
        run()
        print(f"{what}: nothing", flush=True)
    except tl.TapeloopError as error:
        print(f"{what}: {type(error).__name__}: {error}", flush=True)


class Ends(keras.callbacks.Callback):
    """Ends the fit on one worker alone, as one that looks at a clock may."""

    def on_epoch_end(self, epoch, logs=None):
        if INDEX:
            self.model.stop_training = True


mine = slice(0, 80 - 20 * INDEX)
told("policy", lambda: trainer(tl.Freeze("base") if INDEX else tl.TrainAll()).fit(x, y, verbose=0))
told("data", lambda: trainer().fit(x[mine], y[mine], verbose=0))
told("batches", lambda: trainer().evaluate(x[mine], y[mine], batch_size=20, verbose=0))
told("batch size", lambda: trainer().fit(x, y, batch_size=79, verbose=0))
told("dataset", lambda: trainer().fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(79), verbose=0))
changed = trainer()
if INDEX:
    changed.model.layers[-1].bias.assign(np.ones(3))
told("weights", lambda: changed.fit(x, y, verbose=0))


class Sets(keras.callbacks.Callback):
    """Sets weights on one worker alone."""

    def on_epoch_end(self, epoch, logs=None):
        if INDEX and not epoch:
            changed.model.layers[-1].bias.assign(np.ones(3))


changed = trainer()
told("set", lambda: changed.fit(x, y, epochs=3, verbose=0, callbacks=[Sets()]))
early = trainer()
early.fit(x, y, epochs=5, verbose=0, callbacks=[Ends()])
print("stopped after", early.epoch, flush=True)
alike = trainer()
logs = alike.train_on_batch(x[:7], y[:7])
predicted = alike.predict(x[:5])
print("on batch", round(logs["loss"], 5), round(float(np.abs(predicted).sum()), 4), flush=True)
best = tl.find_learning_rate(trainer(), x, y, batch_size=20, steps=20).suggestion
print("rate", f"{best:.3e}" if best else best, flush=True)
