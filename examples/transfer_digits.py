"""Transfer learning on handwritten digits: a backbone pretrained on 0 to 4 learns 5 to 9 under a new head.

    python examples/transfer_digits.py

1. Pretrain a convolutional backbone, with BatchNormalization and Dropout in it, on the digits 0 to 4.
2. Nest it under a new head for 5 to 9 and train the head only.
3. Train the backbone's last block too.

Each phase reports its accuracy, and what a step costs beside full backprop on the same model. The frozen bits are
compared at the end of each.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"  # or the CPU's allocator keeps no statistics of its peak

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tapeloop as tl

layers = keras.layers
DEVICE = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"


def load(digits: range) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the bundled digits as images of 8x8 with labels from 0, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, digits)
    x = (images[chosen] / 16.0).reshape(-1, 8, 8, 1).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        x, labels[chosen] - digits[0], test_size=0.25, random_state=0, stratify=labels[chosen]
    )
    return (x_train, y_train), (x_test, y_test)


def block(width: int, name: str) -> keras.Sequential:
    return keras.Sequential(
        [
            layers.Conv2D(width, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(momentum=0.9, name="bn1"),
            layers.ReLU(name="relu1"),
            layers.Conv2D(width, 3, padding="same", use_bias=False, name="conv2"),
            layers.BatchNormalization(momentum=0.9, name="bn2"),
            layers.ReLU(name="relu2"),
            layers.Dropout(0.2, name="dropout"),
        ],
        name=name,
    )


def make_backbone() -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    x = layers.UpSampling2D(2, interpolation="bilinear", name="upsample")(inputs)
    x = block(32, "block1")(x)
    x = layers.MaxPooling2D(name="pool1")(x)
    x = block(64, "block2")(x)
    x = layers.MaxPooling2D(name="pool2")(x)
    x = block(64, "block3")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool3")(x), name="backbone")


def under_head(backbone: keras.Model) -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(5, name="head")(backbone(inputs)))


def trainer_of(model: keras.Model, policy: tl.VariablePolicy, learning_rate: float) -> tl.Trainer:
    return tl.Trainer(
        model,
        policy,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(learning_rate),
        metrics=["accuracy"],
        seed=0,
    )


def bits(selection: tl.Selection) -> dict[str, bytes]:
    """Return every bit of what a selection leaves out: weights, batch statistics, seed states."""
    trained_statistics = {v for v in selection.non_trainable if v.submodels[-1] not in selection.inference}
    left_out = set(selection.frozen + selection.non_trainable) - trained_statistics
    return {variable.path: variable.tf_variable.numpy().tobytes() for variable in left_out}


def cost(policies: dict[str, tl.VariablePolicy], data: tuple[np.ndarray, np.ndarray]) -> None:
    """Print the step time and peak memory of each policy on copies of one model, steps interleaved."""
    batch = tf.data.Dataset.from_tensor_slices(data).batch(128, drop_remainder=True).take(1).cache()
    trainers = {name: trainer_of(under_head(make_backbone()), policy, 1e-3) for name, policy in policies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    peaks = {}
    for trainer in trainers.values():
        trainer.fit(batch, epochs=3, verbose=0)
    for _ in range(15):
        for name, trainer in trainers.items():
            held = tf.config.experimental.get_memory_info(DEVICE)["current"]
            tf.config.experimental.reset_memory_stats(DEVICE)
            began = time.perf_counter()
            trainer.fit(batch, verbose=0)
            seconds[name].append(time.perf_counter() - began)
            peaks[name] = tf.config.experimental.get_memory_info(DEVICE)["peak"] - held
    print(f"\n{'batch of 128':<24}{'step':>10}{'/ full':>8}{'peak above weights':>20}{'/ full':>8}{'trained':>10}")
    for name, trainer in trainers.items():
        step, full = (statistics.median(seconds[each]) for each in (name, "full backprop"))
        trained = sum(variable.size for variable in trainer.selection.trained)
        print(
            f"{name:<24}{1e3 * step:>7.1f} ms{step / full:>8.2f}{peaks[name] / 2**20:>16.1f} MiB"
            f"{peaks[name] / peaks['full backprop']:>8.2f}{trained:>10,}"
        )


def main() -> dict[str, float]:
    """Run the three phases, and return the accuracy of each."""
    keras.utils.set_random_seed(0)
    low_train, low_test = load(range(5))
    high_train, high_test = load(range(5, 10))

    backbone = make_backbone()
    pretraining = trainer_of(under_head(backbone), tl.TrainAll(), 1e-3)
    pretraining.fit(low_train, epochs=10, verbose=2)
    accuracy = {"pretrained on 0-4": pretraining.evaluate(low_test, verbose=0)["accuracy"]}

    trainer = trainer_of(under_head(backbone), tl.Freeze("backbone"), 1e-2)
    phases = {"head only": trainer.policy, "head and last block": tl.TrainOnly("head", "backbone/block3")}
    for phase, policy in phases.items():
        trainer.policy = policy
        print(f"\n{phase} on 5-9\n{trainer.explain()}")
        before = bits(trainer.selection)
        trainer.fit(high_train, epochs=8, verbose=2)
        if bits(trainer.selection) != before:
            raise SystemExit(f"{phase}: a frozen variable has moved")
        print(f"the bits of all {len(before)} frozen variables, statistics and seed states are as they were")
        accuracy[phase] = trainer.evaluate(high_test, verbose=0)["accuracy"]

    print("\ntest accuracy: " + ", ".join(f"{phase} {value:.3f}" for phase, value in accuracy.items()))
    cost({"full backprop": tl.TrainAll(), **phases}, high_train)
    return accuracy


if __name__ == "__main__":
    main()
