"""What freezing does in plain Keras and in tapeloop, each row tried out here and now.

    python examples/freeze_contract.py

Prints the table of the README: what was found, and whether that is right for a base that is frozen. In the Keras column
a base is frozen by `base.trainable = False` before `compile`; in the tapeloop column by `Freeze("base")`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
Fit = Callable[[keras.Model], "dict[str, list[float]]"]
X, Y = np.random.default_rng(0).normal(size=(32, 8)).astype("float32"), np.zeros((32, 1), "float32")


def make(*base: keras.Layer, **call: bool) -> keras.Model:
    """Nest a base under a head; `call` is what the base is called with."""
    nested = keras.Sequential([keras.Input((8,)), *base], name="base")
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(1, name="head")(nested(inputs, **call)))


class Subclassed(keras.Model):
    """Calls its base in inference mode, and Dropout of its own after it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = keras.Sequential([keras.Input((8,)), layers.Dense(8)], name="base")
        self.dropout = layers.Dropout(0.5, name="dropout")
        self.head = layers.Dense(1)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.head(self.dropout(self.base(inputs, training=False)))


def by_keras(model: keras.Model) -> dict[str, list[float]]:
    model.get_layer("base").trainable = False
    model.compile("sgd", "mse")
    return model.fit(X, Y, verbose=0).history


def by_tapeloop(model: keras.Model) -> dict[str, list[float]]:
    return tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="sgd").fit((X, Y), verbose=0).history


def moved(fit: Fit, model: keras.Model, under: str = "base") -> list[str]:
    """Fit, and return the variables under a layer that have moved."""
    variables = model.get_layer(under).variables
    before = [variable.value.numpy() for variable in variables]
    fit(model)
    return [v.name for v, value in zip(variables, before) if not np.array_equal(v.value.numpy(), value)]


def statistics(fit: Fit) -> str:
    return "moves" if moved(fit, make(layers.Dense(8), layers.BatchNormalization())) else "bit-identical"


def dropout(fit: Fit, **call: bool) -> str:
    names = moved(fit, make(layers.Dense(8), layers.Dropout(0.5), **call))
    return "fires" if "seed_generator_state" in names else "off"


def spectral(fit: Fit) -> str:
    names = moved(fit, make(layers.SpectralNormalization(layers.Dense(8))))
    return "moves" if names else "bit-identical"


def sibling(fit: Fit) -> str:
    model = Subclassed()
    model(X)
    return "fires" if moved(fit, model, "dropout") else "off"


def added_loss(fit: Fit) -> str:
    model = make(layers.Dense(8, activity_regularizer=keras.regularizers.L2(100.0)))
    task = float(np.mean((model(X) - Y) ** 2))
    return "counted" if fit(model)["loss"][0] > task + 1.0 else "left out"


def written(fit: Fit) -> str:
    model = make(layers.Dense(8))
    before = model.get_config()
    fit(model)
    return "as before" if model.get_config() == before else "changed"


def watched(fit: Fit) -> str:
    """What a tape opened around the model holds, by default and in the trainer."""
    model, seen = make(layers.Dense(8)), []
    if fit is by_keras:
        model.get_layer("base").trainable = False
        with tf.GradientTape() as tape:
            model(X)
        seen = [variable.name for variable in tape.watched_variables()]
        return "frozen weights too" if len(seen) > 2 else "what trains"

    class Watching(tl.Trainer):
        def update(self, tape: tl.GroupTape, loss: tf.Tensor) -> None:
            seen.extend(tape.watched_variables())
            super().update(tape, loss)

    Watching(model, tl.Freeze("base"), loss="mse").fit((X, Y), verbose=0)
    return "frozen weights too" if len(seen) > 2 else "what trains"


def unfrozen(fit: Fit) -> str:
    """What happens when the base is unfrozen between two fits."""
    model = make(layers.Dense(8))
    if fit is by_keras:
        by_keras(model)
        model.get_layer("base").trainable = True
        before = model.get_layer("base").get_weights()[0]
        try:
            model.fit(X, Y, verbose=0)
        except ValueError as error:
            return f"`{str(error).split(':')[0]}`"
        return "trains" if (model.get_layer("base").get_weights()[0] != before).any() else "stays frozen"
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="sgd")
    trainer.fit((X, Y), verbose=0)
    trainer.policy = tl.TrainAll()
    return "trains" if moved(lambda model: trainer.fit((X, Y), verbose=0), model) else "stays frozen"


# What is tried, and what is right.
ROWS: dict[str, tuple[Callable[[Fit], str], str]] = {
    "weights and BatchNormalization statistics of the frozen base": (statistics, "bit-identical"),
    "Dropout in it": (dropout, "off"),
    "Dropout in it, built with `base(x, training=False)` in a functional model": (
        lambda fit: dropout(fit, training=False),
        "off",
    ),
    "Dropout of the *head*, after `base(x, training=False)` in a subclassed model": (sibling, "fires"),
    "SpectralNormalization in it": (spectral, "bit-identical"),
    "its activity penalties in the loss": (added_loss, "left out"),
    "what a tape around the model watches": (watched, "what trains"),
    "the base, once it is unfrozen between two fits": (unfrozen, "trains"),
    "the model's config, with which it is saved": (written, "as before"),
}


def main() -> str:
    """Return the table in Markdown."""
    lines = ['| | Keras, `base.trainable = False` | tapeloop, `Freeze("base")` |', "|---|---|---|"]
    for title, (row, right) in ROWS.items():
        keras.utils.set_random_seed(0)
        found = [row(by_keras), row(by_tapeloop)]
        cells = [f"{what} ({'right' if what == right else 'wrong'})" for what in found]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main())
