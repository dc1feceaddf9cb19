"""A nested model of which the first layers are frozen and the rest trains.

    python examples/partial_freeze.py

An encoder learns to rebuild two waves. Then the target changes, and only its upper half and the head may follow.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tapeloop as tl

layers = keras.layers


class Encoder(keras.Model):
    """Four blocks in a list: their paths are `blocks/0` to `blocks/3`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [
            keras.Sequential([layers.Dense(64, activation="gelu"), layers.LayerNormalization(), layers.Dropout(0.05)])
            for _ in range(4)
        ]

    def call(self, inputs: object) -> object:
        x = self.blocks[0](inputs)
        for block in self.blocks[1:]:
            x = x + block(x)
        return x


class Regressor(keras.Model):
    """The encoder, nested under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = layers.Dense(1)

    def call(self, inputs: object) -> object:
        return self.head(self.encoder(inputs))


def main() -> dict[str, float]:
    keras.utils.set_random_seed(0)
    x = np.random.uniform(-2, 2, (2048, 1))
    model = Regressor()
    everything = tl.Trainer(model, loss="mse", optimizer=keras.optimizers.Adam(3e-3), seed=0)
    everything.fit((x, np.sin(3 * x)), epochs=8, batch_size=64)

    upper = tl.Trainer(
        model, tl.Freeze("encoder/blocks/[01]"), loss="mse", optimizer=keras.optimizers.Adam(3e-3), seed=0
    )
    print(upper.explain())
    lower = [block.get_weights() for block in model.encoder.blocks[:2]]
    before = upper.evaluate((x, np.cos(2 * x)))["loss"]
    upper.fit((x, np.cos(2 * x)), epochs=8, batch_size=64)
    after = upper.evaluate((x, np.cos(2 * x)))["loss"]
    for block, weights in zip(model.encoder.blocks[:2], lower):
        assert all(np.array_equal(*pair) for pair in zip(block.get_weights(), weights)), "a frozen block has moved"
    print(f"loss on the new target {before:.3f} -> {after:.3f}; blocks 0 and 1 are bit-identical")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
