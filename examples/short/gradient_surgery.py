"""PCGrad: where the gradients of two tasks conflict, each loses the part that points against the other."""

import keras
import tapeloop as tl
from keras import layers, ops
from sklearn.datasets import load_digits

SHARED = ("shared/kernel", "shared/bias")
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dot(one, other):
    return sum(ops.sum(one[path] * other[path]) for path in SHARED)


class PCGrad(tl.Trainer):
    def train_step(self, batch):
        with self.tape(persistent=True) as tape:
            logits = self.forward(batch[0], training=True)
            losses = {task: entropy(labels, logits[task]) for task, labels in batch[1].items()}
        one, other = (self.gradients(tape, loss, unconnected="zero") for loss in losses.values())
        both = {path: one[path] + other[path] for path in one}
        conflict = ops.minimum(dot(one, other), 0.0)
        both |= {p: both[p] - conflict * (one[p] / dot(one, one) + other[p] / dot(other, other)) for p in SHARED}
        self.apply(both)
        opposed = ops.minimum(dot(both, one), dot(both, other)) < -1e-6
        return {**losses, "conflict": ops.cast(conflict < 0, "float32"), "opposed": ops.cast(opposed, "float32")}


keras.utils.set_random_seed(0)
images, digits = load_digits(return_X_y=True)
inputs = keras.Input((64,))
features = layers.Dense(48, activation="relu", name="shared")(inputs)
heads = {"digit": layers.Dense(10, name="digit")(features), "parity": layers.Dense(2, name="parity")(features)}
scoring = {"loss": dict.fromkeys(heads, entropy), "metrics": {task: ["accuracy"] for task in heads}}
trainer = PCGrad(keras.Model(inputs, heads), optimizer=keras.optimizers.Adam(3e-3), seed=0, **scoring)
logs = trainer.fit(images / 16, {"digit": digits, "parity": digits % 2}, epochs=20, validation_split=0.25, verbose=0)
last = {name: round(values[-1], 3) for name, values in logs.history.items()}
print({name: last[name] for name in ("val_digit_accuracy", "val_parity_accuracy", "conflict", "opposed")})
assert min(last["val_digit_accuracy"], last["val_parity_accuracy"]) > 0.85 and last["conflict"] > last["opposed"] == 0
