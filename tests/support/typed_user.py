"""A program as a user types it. It is checked by mypy and pyright, and never run.

Each mistake below is one that both must find: a comment that silences nothing is an error too.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tapeloop as tl

Batch = tuple[tf.Tensor, tf.Tensor]


class Regression(tl.Trainer):
    """Overrides all that may be overridden, with types of its own."""

    def __init__(self, model: keras.Model, teacher: keras.Model, **options: Any) -> None:
        super().__init__(model, tl.Freeze("base"), **options)
        self.teacher = teacher

    def forward(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
        return super().forward(inputs, training)

    def compute_loss(self, batch: Batch, training: bool) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        x, y = batch
        loss = tf.reduce_mean((self.forward(x, training) - y) ** 2)
        return loss + sum(self.added_losses()), {"error": loss}

    def train_step(self, batch: Batch) -> dict[str, tf.Tensor]:
        with self.tape("head", persistent=True) as tape:
            loss, logs = self.compute_loss(batch, training=True)
        gradients: dict[str, tf.Tensor] = self.gradients(tape, loss, unconnected="zero")
        self.apply({path: 0.5 * gradient for path, gradient in gradients.items()})
        self.update(tape, loss)
        self.follow(self.teacher, "head", decay=0.9)
        watched: tuple[tl.VariableInfo, ...] = tape.variables
        return {"loss": loss, "watched": tf.constant(len(watched)), **logs}

    def eval_step(self, batch: Batch) -> Mapping[str, tf.Tensor | keras.metrics.Metric]:
        return {"loss": self.compute_loss(batch, training=False)[0]}


class Small(tl.VariablePolicy):
    """Overrides all that may be overridden."""

    every = 10

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked = 0

    def at(self, progress: tl.Progress) -> tl.VariablePolicy:
        self.asked += 1
        loss: float = progress.logs.get("loss", 0.0)
        return tl.TrainAll() if progress.count("epoch") > 3 or loss < 0.1 else self

    def group(self, variable: tl.VariableInfo) -> str | None:
        return None if variable.size > self.limit else f"rank{len(variable.shape)}"

    def inference(self, submodel: tl.SubmodelInfo, trained: bool) -> bool:
        return "norm" in submodel.path or not trained

    def multiplier(self, variable: tl.VariableInfo) -> float:
        return 0.5 if variable.name == "bias" else 1.0

    def get_state(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


def filters(backbone: keras.Model) -> list[tl.Filter]:
    """Whatever a filter may be made of."""
    taken = tl.TrainOnly("head", backbone, keras.layers.Dense, ["**/bias", tl.named("gamma")], *backbone.layers[:3])
    chosen = tl.glob("head") & ~tl.named("bias") | tl.under(backbone) | "**/beta"
    return [chosen, tl.matching(lambda variable: variable.size > 10), tl.last(2, of="block*"), *taken.filters()]


def program(model: keras.Model, module: tf.Module, x: np.ndarray) -> float | None:
    """Most of what a program may call."""
    policies: list[tl.VariablePolicy] = [
        tl.Groups({"head": "head", "base": [keras.layers.Dense]}, multipliers={"base": 0.1}),
        tl.Phases({0: tl.Freeze("base"), 100: Small(10)}, unit="step"),
        tl.GradualUnfreeze(["head", model.layers[0]], every=2, decay=0.5, unit="epoch"),
        tl.RandomSubset(2, of=keras.layers.Dense, every=10, always="head"),
        tl.LayerwiseDecay(0.8, of="block*"),
    ]
    trainer = tl.Trainer(
        model,
        policies[0],
        loss="mse",
        optimizer={"head": keras.optimizers.Adam(1e-3), "base": "sgd"},
        microbatches="auto",
        nonfinite="skip",
        jit_compile=False,
        steps_per_call=16,
    )
    trainer.policy = policies[1]
    several = tl.Trainer({"maker": model, "judge": module}, policies[2])
    checkpoints = tl.Checkpoints("runs", keep_best="loss", mode="min", resume="must")
    tried: tl.DryRun = trainer.fit((x, x), dry_run=True, epochs=2)
    history: tl.History = trainer.fit((x, x), epochs=2, checkpoint=checkpoints, verbose=0, validate_with="ema")
    either: tl.History | tl.DryRun = trainer.fit((x, x), dry_run=bool(tried.phases))
    logs: dict[str, float] = trainer.evaluate((x, x), verbose="auto")
    trainer.learning_rates["head"] = logs["loss"] * trainer.learning_rates["head"]
    selection: tl.Selection = several.selection
    paths = [variable.path for variable in selection.trained if history.epoch or either]
    search: tl.LearningRateSearch = tl.find_learning_rate(trainer, (x, x), group="head")
    return search.suggestion if paths else None


def mistakes(model: keras.Model, trainer: tl.Trainer) -> None:
    """What is found before the program is run."""
    tl.Trainer(3)  # type: ignore[arg-type]
    tl.Trainer(model, "head")  # type: ignore[arg-type]
    tl.Trainer(model, nonfinite="warn")  # type: ignore[arg-type]
    tl.Trainer(model, jit_compile="yes")  # type: ignore[arg-type]
    tl.Trainer(model, microbatches="many")  # type: ignore[arg-type]
    tl.Trainer(model, steps_per_call="all")  # type: ignore[arg-type]
    tl.Trainer(model, epochs=3)  # type: ignore[call-arg]
    tl.Checkpoints("runs", mode="most")  # type: ignore[arg-type]
    tl.Checkpoints("runs", resume="yes")  # type: ignore[arg-type]
    tl.Phases({0: tl.TrainAll()}, unit="batch")  # type: ignore[arg-type]
    tl.GradualUnfreeze(["head"], unit="steps")  # type: ignore[arg-type]
    tl.Progress().count("steps")  # type: ignore[arg-type]
    tl.TrainOnly(3)  # type: ignore[arg-type]
    tl.under("head")  # type: ignore[arg-type]
    tl.RandomSubset(2, of=keras.layers.Dense, every=1, always=0.5)  # type: ignore[arg-type]
    tl.find_learning_rate(trainer, 0.5, group=1)  # type: ignore[arg-type]
    trainer.fit(0.5, epocs=2)  # type: ignore[call-overload]
    trainer.fit(0.5, validate_with="averages")  # type: ignore[call-overload]
    trainer.evaluate(0.5, verbose="silent")  # type: ignore[arg-type]
    trainer.history.plot(by="batch")  # type: ignore[arg-type]
    trainer.gradients(trainer.tape(), 0.0, unconnected="none")  # type: ignore[arg-type]


class Misspelt(tl.Trainer):
    """Overrides with another signature."""

    def forward(self, inputs: tf.Tensor) -> tf.Tensor:  # type: ignore[override]
        return inputs


class NoName(tl.VariablePolicy):
    """Answers with no name of a group."""

    def group(self, variable: tl.VariableInfo) -> bool:  # type: ignore[override]
        return variable.size > 3
