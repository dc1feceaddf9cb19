"""Two speeds: a pretrained backbone and a new head, each at a rate of its own that warms up and decays.

    python examples/two_speeds.py

The backbone has learned the digits 0 to 4 and goes on with a few of 5 to 9. Its rate is a hundredth of the head's and
warms up longer, so that it learns the new digits and, under its old head, still tells the old ones. At one speed, the
head's rate makes it forget and its own is too slow for the head. A rate between the two may serve both, once it is
found: here 1e-3 does.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tapeloop as tl

layers = keras.layers
EPOCHS, BATCH, FEW = 16, 32, 160
STEPS = EPOCHS * FEW // BATCH


def load(digits: range, examples: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return digits with labels from 0: so many of them for training, and the rest for testing."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, digits)
    x, y = (images[chosen] / 16.0).reshape(-1, 8, 8, 1), labels[chosen] - digits[0]
    x_train, x_test, y_train, y_test = train_test_split(x, y, train_size=examples, random_state=0, stratify=y)
    return (x_train, y_train), (x_test, y_test)


def block(width: int) -> list[keras.Layer]:
    return [layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU()]


def make_backbone() -> keras.Model:
    convolutions = [*block(32), layers.MaxPooling2D(), *block(64), *block(64), layers.GlobalMaxPooling2D()]
    return keras.Sequential([keras.Input((8, 8, 1)), *convolutions], name="backbone")


def speed(rate: float, warmup: float) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a rate that rises from zero for a part of the steps, and then decays to zero."""
    rising = int(warmup * STEPS)
    return keras.optimizers.schedules.CosineDecay(0.0, STEPS - rising, warmup_target=rate, warmup_steps=rising)


def trainer_of(backbone: keras.Model, policy: tl.VariablePolicy, optimizer: object, seed: int) -> tl.Trainer:
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, layers.Dense(5, name="head")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tl.Trainer(model, policy, loss=loss, optimizer=optimizer, metrics=["accuracy"], seed=seed)


def main(seed: int = 0) -> dict[str, tuple[float, float]]:
    keras.utils.set_random_seed(seed)
    (low, low_test), (high, high_test) = load(range(5), 600), load(range(5, 10), FEW)

    backbone = make_backbone()
    before = trainer_of(backbone, tl.TrainAll(), keras.optimizers.Adam(2e-3), seed)
    before.fit(low, epochs=10, verbose=0)
    pretrained = backbone.get_weights()

    fast, slow = speed(1e-2, 0.1), speed(1e-4, 0.3)
    arms = {
        "two speeds": {"head": fast, "backbone": slow},
        "one, fast": {"head": fast, "backbone": fast},
        "one, slow": {"head": slow, "backbone": slow},
    }
    scores, as_scheduled = {}, True
    for name, speeds in arms.items():
        backbone.set_weights(pretrained)
        keras.utils.set_random_seed(seed + 1)  # the same new head for each
        optimizer = {group: keras.optimizers.Adam(schedule) for group, schedule in speeds.items()}
        trainer = trainer_of(backbone, tl.Groups({"head": "head", "backbone": "backbone"}), optimizer, seed)
        for epoch in range(EPOCHS):
            rates = dict(trainer.learning_rates)
            as_scheduled &= all(rates[group] == float(speeds[group](trainer.step)) for group in speeds)
            if name == "two speeds" and epoch % 4 == 0:
                print(f"step {trainer.step:>2}: head {rates['head']:.1e}, backbone {rates['backbone']:.1e}")
            trainer.fit(high, batch_size=BATCH, verbose=0)
        learned, kept = trainer.evaluate(high_test, verbose=0), before.evaluate(low_test, verbose=0)
        scores[name] = learned["accuracy"], kept["accuracy"]

    told = (f"{name} {learned:.3f} and {kept:.3f}" for name, (learned, kept) in scores.items())
    print(f"accuracy on 5-9, and still on 0-4: {'; '.join(told)}")
    print(f"every rate was as scheduled: {as_scheduled}")
    return scores


if __name__ == "__main__":
    main()
