"""A policy with state: it trains the head, and one block more, more slowly, whenever the validation loss stalls."""

import keras
import tapeloop as tl
from sklearn.datasets import load_digits


class ThawOnPlateau(tl.VariablePolicy):
    def __init__(self, blocks, patience=2, decay=0.5):
        self.blocks, self.patience, self.decay = blocks, patience, decay
        self.thawed, self.best, self.waited = 1, float("inf"), 0

    def at(self, progress):
        loss = progress.logs.get("val_loss", float("inf"))
        self.waited = 0 if loss < self.best - 0.01 else self.waited + 1
        self.best = min(self.best, loss)
        if self.waited == self.patience and self.thawed < len(self.blocks):
            self.thawed, self.waited = self.thawed + 1, 0
        return self

    def group(self, variable):
        block = variable.path.split("/")[0]
        return block if block in self.blocks[: self.thawed] else None

    def multiplier(self, variable):
        return self.decay ** self.blocks.index(self.group(variable))


keras.utils.set_random_seed(0)
x, y, dense = load_digits().data / 16, load_digits().target, keras.layers.Dense
blocks = [dense(64, activation="relu", name="block1"), dense(16, activation="relu", name="block2")]
options = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"], "seed": 0}
pretraining = tl.Trainer(keras.Sequential([keras.Input((64,)), *blocks, dense(5)]), **options)
pretraining.fit(x[y < 5], y[y < 5], epochs=20, verbose=0)
model, adam = keras.Sequential([keras.Input((64,)), *blocks, dense(5, name="head")]), keras.optimizers.Adam(1e-2)
trainer = tl.Trainer(model, ThawOnPlateau(["head", "block2", "block1"]), optimizer=adam, **options)
history = trainer.fit(x[y >= 5], y[y >= 5] - 5, epochs=50, validation_split=0.25, verbose=0)
stages, accuracy = [phase.epoch for phase in history.phases], history.history["val_accuracy"]
print(f"stages from epochs {stages}, accuracy: head {accuracy[stages[1] - 1]:.3f}, at the end {accuracy[-1]:.3f}")
assert len(stages) == 3 and accuracy[-1] > accuracy[stages[1] - 1] + 0.05
