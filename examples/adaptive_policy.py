"""A policy of one's own that adapts: it unfreezes the next block on a plateau, and freezes what has stopped moving.

    python examples/adaptive_policy.py

Nothing in it belongs to the package: it is a `VariablePolicy` with an `at` that reads the last logs.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

import tapeloop as tl

layers = keras.layers


class Adaptive(tl.VariablePolicy):
    """Trains the head, adds a block when the validation loss stalls, drops one whose weights hardly move any more."""

    def __init__(self, model: keras.Model, blocks: list[str], stall: float, still: float) -> None:
        self.model = model
        self.waiting = list(blocks)
        self.training: list[str] = []
        self.stall = stall
        self.still = still
        self.best = np.inf
        self.asked_at = -1
        self.weights: dict[str, np.ndarray] = {}

    def at(self, progress: tl.Progress) -> tl.VariablePolicy:
        if progress.epoch != self.asked_at and progress.logs:  # once an epoch, however often it is asked
            self.asked_at = progress.epoch
            self.training = [block for block in self.training if self.moves(block)]
            loss = progress.logs["val_loss"]
            if loss > self.best - self.stall and self.waiting:
                self.training.append(self.waiting.pop(0))
            self.best = min(self.best, loss)
        return tl.TrainOnly("head", *self.training)

    def moves(self, block: str) -> bool:
        """Tell whether a block's weights have moved by more than `still` of their size since the last epoch."""
        now = np.concatenate([weight.ravel() for weight in self.model.get_layer(block).get_weights()])
        before = self.weights.get(block)
        self.weights[block] = now
        return before is None or bool(np.linalg.norm(now - before) > self.still * np.linalg.norm(before))


def main() -> float:
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = images / 16.0, labels
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="relu", name="block1"),
            layers.Dense(128, activation="relu", name="block2"),
            layers.Dense(10, name="head"),
        ]
    )
    trainer = tl.Trainer(
        model,
        Adaptive(model, ["block2", "block1"], stall=0.05, still=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(2e-3),
        metrics=["accuracy"],
        seed=0,
    )
    history = trainer.fit((x[:1400], y[:1400]), epochs=20, batch_size=64, validation_data=(x[1400:], y[1400:]))
    for phase in history.phases:
        print(f"epoch {phase.epoch + 1}: {phase.policy}")
    print(f"{len(history.phases)} phases, {trainer.trace_count} traces")
    return history.history["val_accuracy"][-1]


if __name__ == "__main__":
    main()
