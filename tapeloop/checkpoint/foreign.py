"""Weights that Keras or `tf.train.Checkpoint` has written."""

from __future__ import annotations

import pathlib

import keras
import tensorflow as tf

from tapeloop.errors import CheckpointError
from tapeloop.model.tree import Model, Tree

KERAS = ".keras", ".h5"


def is_keras(path: pathlib.Path) -> bool:
    """Tell whether a path is that of a file in one of Keras' formats."""
    return path.name.endswith(KERAS)


def is_tensorflow(path: pathlib.Path) -> bool:
    """Tell whether a path is the prefix of a checkpoint of TensorFlow's."""
    return pathlib.Path(f"{path}.index").exists()


def save_keras(path: pathlib.Path, model: Model) -> None:
    """Write a model as Keras does: `.keras`, or the weights alone, `.weights.h5`.

    Raises:
        CheckpointError: The model is no Keras model, or the file's name ends in neither.
    """
    if not isinstance(model, keras.Model) or not path.name.endswith((".keras", ".weights.h5")):
        raise CheckpointError(
            f"Only a Keras model is written to a `.keras` or `.weights.h5` file. Received: {path} for a "
            f"{type(model).__name__}. Give a path without such an end for a checkpoint of the run."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    (model.save if path.suffix == ".keras" else model.save_weights)(path)


def load_keras(path: pathlib.Path, model: Model) -> None:
    """Give a Keras model the weights in a file of Keras'.

    Raises:
        CheckpointError: Keras cannot read it into the model.
    """
    if not isinstance(model, keras.Model):
        raise CheckpointError(f"{path} holds weights of a Keras model, and the trainer has a {type(model).__name__}.")
    before = {variable: variable.tf_variable.numpy() for variable in Tree.of(model).variables}
    try:
        model.load_weights(path)
    except Exception as error:
        # Keras assigns one layer after the other before it finds the one that does not fit.
        for variable, value in before.items():
            variable.tf_variable.assign(value)
        raise CheckpointError(f"Keras cannot read {path} into the model: {error}") from error


def load_tensorflow(path: pathlib.Path, model: Model) -> None:
    """Give a model the weights that `tf.train.Checkpoint(model)` or `tf.train.Checkpoint(model=model)` has saved.

    Raises:
        CheckpointError: It has not all the weights of the model.
    """
    names = [name for name, _ in tf.train.list_variables(str(path))]
    holder = model if isinstance(model, tf.Module | keras.Model) else None
    if holder is None:
        raise CheckpointError(f"{path} is a checkpoint of one model, and the trainer has a {type(model).__name__}.")
    is_attribute = any(name.startswith("model/") for name in names) and not hasattr(model, "model")
    checkpoint = tf.train.Checkpoint(model=model) if is_attribute else tf.train.Checkpoint(model)
    before = {variable: variable.tf_variable.numpy() for variable in Tree.of(model).variables}
    status = checkpoint.restore(str(path))
    try:
        status.assert_existing_objects_matched()
    except AssertionError as error:
        for variable, value in before.items():
            variable.tf_variable.assign(value)
        raise CheckpointError(
            f"{path} has not all the weights of the model: {error}. It was saved of another model."
        ) from None
    finally:
        status.expect_partial()
