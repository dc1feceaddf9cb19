"""Asking the command line, and what it is asked about: `tests.support.commands:make_model` and the like."""

import json
import shlex

import keras
import numpy as np
from typer.testing import CliRunner

import tapeloop as tl
from tapeloop.cli.app import app

layers = keras.layers
HERE = "tests.support.commands"
RUNNER = CliRunner()


def ask(line):
    """Run a command, and return its exit status, standard output and standard error."""
    result = RUNNER.invoke(app, shlex.split(line))
    assert result.exception is None or isinstance(result.exception, SystemExit)  # else it would be a traceback
    return result.exit_code, result.stdout, result.stderr


def ask_json(line):
    """Run a command, and return its exit status and its answer for machines."""
    status, said, _ = ask(f"{line} --json")
    return status, json.loads(said, parse_constant=lambda name: 1 / 0)  # NaN is no JSON


def make_model():
    print("the user's own code prints")
    parts = [layers.Dense(4, name="dense"), layers.BatchNormalization(name="norm"), layers.Flatten(name="flat")]
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(2, name="head")(keras.Sequential(parts, name="body")(inputs)))


def two_outputs():
    inputs = keras.Input((3,))
    return keras.Model(inputs, [layers.Dense(width, name=f"head_{width}")(inputs) for width in (1, 2)])


def unbuilt():
    return keras.Sequential([layers.Dense(2, name="head")])


MODEL = make_model()
POLICY = tl.Freeze("body")
MISSING = None
X = np.ones((6, 3), "float32")
regression = X, np.ones((6, 2), "float32")
wrong_shape = X, np.ones((6, 5), "float32")
no_targets = (X,)


def classes():
    return X, np.zeros(6, "int64")


def two_targets():
    return X, (np.zeros((6, 1), "float32"), np.zeros(6, "int64"))


def freeze_body():
    return POLICY


def absolute(targets, outputs):
    return keras.losses.mean_absolute_error(targets, outputs)


def of_width(width, *, name, depth=1):
    return MODEL


class Wide(keras.Model):
    def __init__(self, width):
        super().__init__()


def broken():
    raise ValueError("no weights here")


def leaves():
    raise SystemExit(3)
