"""Distillation (Hinton et al. 2015, arXiv:1503.02531): a small student learns a frozen teacher's answers.

    python examples/distillation.py

The teacher has learned from all the labels. A student with 100 of them has little to learn from alone; what the teacher
says to every image, without a label, tells it more. The teacher is frozen: its Dropout is off and its statistics stay,
although it is called with `training=True`. The student's weights are also averaged over the run (`ema`), the teacher's,
which do not train, are not.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tapeloop as tl

layers = keras.layers
ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TEMPERATURE, LABELLED, BATCH = 4.0, 100, 64


def make_network(width: int, depth: int) -> keras.Model:
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(depth):
        for layer in (layers.Dense(width), layers.BatchNormalization(momentum=0.9), layers.ReLU(), layers.Dropout(0.2)):
            model.add(layer)
    model.add(layers.Dense(10))
    return model


class Distillation(tl.Trainer):
    def forward(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
        return self.model["student"](inputs, training=training)

    def compute_loss(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Return how far the student's answer is from the teacher's: no labels here."""
        targets = tf.nn.softmax(self.model["teacher"](images, training=training) / TEMPERATURE)
        logits = self.forward(images, training) / TEMPERATURE
        return TEMPERATURE**2 * tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def bits(model: keras.Model) -> list[bytes]:
    """Return every bit of a model: weights, batch statistics, seed states."""
    return [variable.numpy().tobytes() for variable in model.variables]


def main(seed: int = 0) -> dict[str, float]:
    keras.utils.set_random_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(pixels / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)

    def accuracy(trainer: tl.Trainer) -> float:
        return float(np.mean(trainer.predict(x_test).argmax(axis=-1) == y_test))

    teacher = make_network(256, 2)
    teaching = tl.Trainer(teacher, loss=ENTROPY, seed=seed)
    teaching.fit((x, y), epochs=15, batch_size=BATCH, verbose=0)

    before = bits(teacher)
    trainer = Distillation(
        {"teacher": teacher, "student": make_network(24, 1)},
        tl.TrainOnly("student"),
        optimizer=keras.optimizers.Adam(3e-3),
        ema=0.99,
        seed=seed,
    )
    trainer.fit(x, epochs=30, batch_size=BATCH, verbose=0)
    print(trainer.explain(depth=1))

    alone = tl.Trainer(make_network(24, 1), loss=ENTROPY, optimizer=keras.optimizers.Adam(3e-3), seed=seed)
    batches = -(-LABELLED // BATCH)  # as many steps as the other student had
    alone.fit((x[:LABELLED], y[:LABELLED]), epochs=trainer.step // batches, batch_size=BATCH, verbose=0)

    scores = {"teacher": accuracy(teaching), "alone": accuracy(alone), "distilled": accuracy(trainer)}
    with trainer.ema_weights():
        scores["averaged"] = accuracy(trainer)
    print(f"test accuracy: {', '.join(f'{name} {value:.3f}' for name, value in scores.items())}")
    print(f"the teacher is bit-identical: {bits(teacher) == before}")
    return scores


if __name__ == "__main__":
    main()
