"""Gradient surgery: where the gradients of two tasks conflict in the trunk that they share, each gives way.

    python examples/pcgrad.py

Two digits overlap in an image: one task names the left one, the other guesses the number on the right, and its squared
error drowns the first. PCGrad (Yu et al. 2020, arXiv:2001.06782) takes from a gradient what points against the other.
It prints both losses in the last epoch, and in which part of its steps their gradients conflicted.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_digits

import tapeloop as tl


class Summed(tl.Trainer):
    def train_step(self, batch):
        with self.tape(persistent=True) as tape:
            (named, guessed), (label, number) = self.forward(batch[0], training=True), batch[1]
            entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(label, named)
            error = keras.losses.MeanSquaredError()(number, guessed)
        ours, theirs = (self.gradients(tape, loss, unconnected="zero") for loss in (entropy, error))
        dot = sum(ops.sum(ours[path] * theirs[path]) for path in ours)  # each head has zeros in one of the two
        self.apply({path: ours[path] + theirs[path] for path in ours} | self.surgery(ours, theirs, dot))
        return {"entropy": entropy, "error": error, "conflicts": ops.cast(dot < 0, "float32")}

    def surgery(self, ours, theirs, dot):
        return {}


class PCGrad(Summed):
    def surgery(self, ours, theirs, dot):
        trunk = [path for path in ours if path.startswith("trunk/")]
        squares = (1e-12 + sum(ops.sum(task[p] ** 2) for p in trunk) for task in (ours, theirs))
        mine, other = (1 - ops.minimum(dot, 0) / square for square in squares)
        return {path: mine * ours[path] + other * theirs[path] for path in trunk}


def main(epochs: int = 20, seed: int = 0) -> None:
    pixels, labels = load_digits(return_X_y=True)
    left, right = np.random.default_rng(seed).permutation(1796).reshape(2, -1)
    digits = np.pad(pixels.reshape(-1, 8, 8) / 16, ((0, 0), (0, 0), (0, 4)))
    images = np.maximum(digits[left], np.roll(digits[right], 4, axis=2)).reshape(-1, 96)
    for kind in (Summed, PCGrad):
        keras.utils.set_random_seed(seed)
        trunk = keras.layers.Dense(32, activation="relu", name="trunk")(inputs := keras.Input((96,)))
        model = keras.Model(inputs, [keras.layers.Dense(width)(trunk) for width in (10, 1)])
        trainer = kind(model, optimizer=keras.optimizers.Adam(3e-3), seed=seed)
        logs = trainer.fit((images, (labels[left], labels[right, None])), epochs=epochs, verbose=0).history
        print(f"{kind.__name__}:", ", ".join(f"{name} {values[-1]:.3f}" for name, values in logs.items()))


if __name__ == "__main__":
    main()
