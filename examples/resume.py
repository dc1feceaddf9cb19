"""A run that is killed twice and goes on: it ends bit-identical to one that nothing has stopped.

    python examples/resume.py

The program below trains a small network on digits, first its head and then all of it, with Dropout, shuffling, moments
and weight decay. It saves itself every ten steps. The first time it kills itself in the middle of an epoch, as a
scheduler that has run out of patience would; the second time it is ended by SIGTERM, which it has a moment to answer.
The third time it goes to its end.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hashlib
import pathlib
import signal
import subprocess
import sys
import tempfile

import keras
import numpy as np
from sklearn.datasets import load_digits

import tapeloop as tl

layers = keras.layers
EPOCHS = 6


def make_trainer() -> tl.Trainer:
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input((64,)), layers.Dense(64, "relu"), layers.Dropout(0.3, seed=1)], name="base")
    model = keras.Sequential([keras.Input((64,)), base, layers.Dense(10, name="head")])
    policy = tl.Phases({0: tl.TrainOnly("head"), 2: tl.TrainAll()})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tl.Trainer(model, policy, loss=loss, optimizer=keras.optimizers.AdamW(3e-3), metrics=["accuracy"], seed=0)


def batches_that_end(images: np.ndarray, labels: np.ndarray, step: int, ending: int) -> keras.utils.PyDataset:
    """Return batches of 64; making the one of that number, over all epochs, sends this process a signal."""

    class Batches(keras.utils.PyDataset):
        made = 0

        def __len__(self) -> int:
            return len(images) // 64

        def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
            Batches.made += 1
            if Batches.made == step:
                os.kill(os.getpid(), ending)
            return images[number * 64 : (number + 1) * 64], labels[number * 64 : (number + 1) * 64]

    return Batches()


def train(folder: str | None, step: int = 0, ending: int = 0) -> str:
    """Train in a folder of checkpoints, or without; return a digest of the weights."""
    images, labels = load_digits(return_X_y=True)
    trainer = make_trainer()
    data = batches_that_end(images / 16.0, labels, step, ending)
    checkpoint = None if folder is None else tl.Checkpoints(folder, every_steps=10)
    trainer.fit(data, epochs=EPOCHS, verbose=0, checkpoint=checkpoint)
    logs = trainer.history.history
    print(f"  step {trainer.step}, epoch {trainer.epoch}, accuracy {logs['accuracy'][-1]:.3f}", flush=True)
    return hashlib.sha256(b"".join(weight.tobytes() for weight in trainer.model.get_weights())).hexdigest()


def main() -> bool:
    """Run the program until it is through, and then once without a stop."""
    folder = tempfile.mkdtemp()
    for step, ending in ((75, signal.SIGKILL), (60, signal.SIGTERM), (0, 0)):
        print(f"a process{f' that gets {signal.Signals(ending).name}' if ending else ''}:", flush=True)
        command = [sys.executable, __file__, folder, str(step), str(int(ending))]
        done = subprocess.run(command, capture_output=True, text=True)
        print("".join(f"  {line}\n" for line in done.stderr.splitlines() if "esum" in line or "run" in line), end="")
        print(done.stdout.partition("digest")[0], end="")
        print(f"  exit code {done.returncode}, and {len(list(pathlib.Path(folder).glob('0*')))} checkpoints")
    resumed = done.stdout.split("digest ")[1].strip()
    print("one process that nothing stops:")
    same = train(None) == resumed
    print(f"the weights are bit-identical: {same}")
    return same


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("digest", train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
