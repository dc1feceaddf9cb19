"""What a device allows: the largest batch that fits, the time to an accuracy, the bytes of a checkpoint."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import tempfile
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl
from benchmarks.arms import make_arm
from benchmarks.cases import Case
from benchmarks.steps import set_up
from benchmarks.workloads import Workload, cross_entropy, make

LARGEST_BATCH = 65_536
ACCURACY = 0.95
MOST_EPOCHS = 60
BATCH = 32  # of digits


def capacity(case: Case) -> dict[str, Any]:
    """Find the largest batch with which a step fits the memory: doubled until it does not, then to a sixteenth."""
    set_up(case)
    least, most = 0, case.batch
    tried = []
    while most <= LARGEST_BATCH and fits(case, most):
        tried.append(most)
        least, most = most, 2 * most
    while most - least > max(1, least // 16):
        middle = (least + most) // 2
        tried.append(middle)
        least, most = (middle, most) if fits(case, middle) else (least, middle)
    return {"largest_batch": least, "tried": tried}


def fits(case: Case, batch: int) -> bool:
    """Tell whether two steps on a batch find room."""
    keras.backend.clear_session()
    gc.collect()
    try:
        arm = make_arm(dataclasses.replace(case, batch=batch, steps=1))
        for _ in range(2):
            arm(1)
    except tf.errors.ResourceExhaustedError:
        return False
    return True


def accuracy(case: Case) -> dict[str, Any]:
    """Train on the digits of scikit-learn until 95% of those that are held out are told right.

    Where the head alone trains, the layers under it have learnt the digits 0 to 4 before, and it learns 5 to 9. The
    number of the process is the seed. Evaluations are not timed.
    """
    set_up(case)
    digits = _digits()
    keras.utils.set_random_seed(case.process)
    is_head = case.selection == "head"
    model = _taught(case, digits, is_head)
    low, high = (5, 10) if is_head else (0, 10)
    x, y, held_x, held_y = _between(digits, low, high, case.process)
    case = dataclasses.replace(case, batch=BATCH, steps=len(x) // BATCH)
    policy = tl.TrainOnly("head") if is_head else tl.TrainAll()
    work = Workload(model, (x, y), cross_entropy(), policy, optimizer=lambda: keras.optimizers.Adam(1e-3))
    arm = make_arm(case, work)
    seconds, reached, epoch = 0.0, 0.0, 0
    while reached < ACCURACY and epoch < MOST_EPOCHS:
        began = time.perf_counter()
        arm(case.steps)
        seconds, epoch = seconds + time.perf_counter() - began, epoch + 1
        reached = float(np.mean(np.argmax(model.predict_on_batch(held_x), -1) == held_y))
    said = f"{reached:.3f} after {epoch} epochs and {seconds:.2f} s"
    return {
        "accuracy": reached,
        "epochs": epoch,
        "seconds_to_accuracy": seconds if reached >= ACCURACY else None,
        "said": said,
    }


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # by this case alone

    found = load_digits()
    return found.images[..., None].astype("float32") / 16, found.target.astype("int64")


def _between(digits: Any, low: int, high: int, seed: int) -> tuple[Any, ...]:
    x, y = digits
    chosen = (y >= low) & (y < high)
    x, y = x[chosen], y[chosen] - low
    order = np.random.default_rng(seed).permutation(len(x))
    x, y, held = x[order], y[order], len(x) // 5
    whole = (len(x) - held) // BATCH * BATCH
    return tf.constant(x[held:][:whole]), tf.constant(y[held:][:whole]), x[:held], y[:held]


def _taught(case: Case, digits: Any, is_head: bool) -> keras.Model:
    """Return a convolutional model of ten classes, whose layers under the head have learnt five digits or none."""
    body = [keras.layers.Conv2D(32, 3, activation="relu", padding="same") for _ in range(3)]
    body += [keras.layers.MaxPooling2D(), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 8, 1)), *body, keras.layers.Dense(10, name="head")])
    if is_head:
        x, y, *_ = _between(digits, 0, 5, case.process)
        model.compile("adam", cross_entropy())
        model.fit(x, y, epochs=5, verbose=0)
        model.get_layer("head").set_weights([np.zeros_like(w) for w in model.get_layer("head").get_weights()])
    return model


def checkpoint(case: Case) -> dict[str, Any]:
    """Measure a checkpoint after the first: its bytes, and the seconds to load it."""
    set_up(case)
    work = make(case)
    trainer = tl.Trainer(work.model, work.policy, loss=work.loss, optimizer=work.optimizer())
    with tempfile.TemporaryDirectory() as folder:
        saved = tl.Checkpoints(pathlib.Path(folder), every_epochs=1)
        trainer.fit(work.data, batch_size=case.batch, epochs=2, verbose=0, checkpoint=saved)
        assert saved.newest is not None
        size = sum(path.stat().st_size for path in saved.newest.iterdir())
        began = time.perf_counter()
        trainer.load(saved.newest)
        seconds = time.perf_counter() - began
    return {"checkpoint_bytes": size, "load_s": seconds, "said": f"{size / 1e6:.2f} MB, loaded in {seconds:.2f} s"}
