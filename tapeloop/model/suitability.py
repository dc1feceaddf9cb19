"""Models that a trainer cannot train as they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras

# What a Keras model may override for its own `fit`.
FIT_METHODS = ("train_step", "compute_loss", "compute_metrics", "test_step")


def check_own_step(model: Any, overridden: Collection[str], trainer: str) -> None:
    """Check that a Keras model has no step of its own, which the trainer would not run.

    Args:
        model: The model.
        overridden: The methods of the trainer that a subclass overrides.
        trainer: The name of the trainer's class.

    Raises:
        ValueError: The model has one, and the trainer has none instead.
    """
    if not isinstance(model, keras.Model):
        return
    for name in FIT_METHODS:
        # Keras looks a method up on the instance too, where a user may have put it.
        is_own = getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model)
        step = "eval_step" if name == "test_step" else "train_step"
        if is_own and step not in overridden and "compute_loss" not in overridden:
            raise ValueError(
                f"The model {type(model).__name__} has a `{name}` of its own, which `{trainer}` would not call: a "
                f"trainer has its own step. Subclass `Trainer` and write it as `{step}` or `compute_loss` there, or "
                "pass `ignore_model_step=True` to train with the trainer's step and loss all the same."
            )
