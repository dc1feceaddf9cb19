"""Whether arms compute the same: gradients and weights of steps that hardly move, beside those by hand.

Apart from timing, since a loss after many steps tells little: reordered additions alone make it differ by hundredths.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.arms import Arm, make_arm
from benchmarks.cases import Case, is_there
from benchmarks.steps import set_up
from benchmarks.workloads import make

REFERENCE = "hand"
ARMS = ("hand+guard", "tapeloop", "tapeloop+cache", "tapeloop+fold", "keras")
STEPS = 2
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}  # of the norm of a gradient


class Recording(keras.optimizers.SGD):
    """Keeps the last gradients, and moves weights so little that the next ones are of the same weights."""

    def __init__(self) -> None:
        super().__init__(1e-6)
        self.moved: list[keras.Variable] = []

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make room for a gradient of each variable."""
        super().build(variables)
        self.moved = list(variables)
        self.kept = [self.add_variable_from_reference(variable, name="gradient") for variable in variables]

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Keep a gradient, and move."""
        self.assign(self.kept[self._get_variable_index(variable)], tf.convert_to_tensor(gradient))
        super().update_step(gradient, variable, learning_rate)


def equivalence(case: Case) -> dict[str, Any]:
    """Compare the arms of a case's group with the arm by hand, by ops that give the same each time."""
    # All that TensorFlow does to that end forbids `tf.timestamp` too, by which tapeloop's loop knows when to come back.
    os.environ["TF_CUDNN_DETERMINISTIC"] = "1"
    set_up(case, one_thread=True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return compared(case, (*ARMS, "full", "subset") if case.selection == "all" else ARMS)


def compared(case: Case, arms: Sequence[str]) -> dict[str, Any]:
    """Compare arms with the arm by hand.

    Returns:
        `errors`, by arm the largest differences of gradients and of weights, relative to the norm of each; `invalid`,
        by arm why it computes something else; `said`, both in words.
    """
    expected, weights = _stepped(dataclasses.replace(case, arm=REFERENCE))
    tolerance = TOLERANCE[case.dtype]
    errors: dict[str, dict[str, float]] = {}
    invalid: dict[str, str] = {}
    for arm in arms:
        other = dataclasses.replace(case, arm=arm, kind="step")
        if not is_there(other):
            continue
        found, after = _stepped(other)
        if found.keys() != expected.keys():
            invalid[arm] = f"it trains {len(found)} variables, and `{REFERENCE}` {len(expected)}"
            continue
        errors[arm] = {"gradients": _error(found, expected), "weights": _error(after, weights)}
        for what, error in errors[arm].items():
            if not error <= tolerance:
                invalid[arm] = f"its {what} differ from those of `{REFERENCE}` by {error:.2g} of their norm"
    said = "; ".join(f"{arm}: {why}" for arm, why in invalid.items()) or f"{len(errors)} arms compute the same"
    return {"errors": errors, "invalid": invalid, "tolerance": tolerance, "said": said}


def _stepped(case: Case) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Run an arm, and return its last gradients and all weights, by the number of the variable in the model."""
    arm: Arm = make_arm(case, dataclasses.replace(make(case), optimizer=Recording))
    for _ in range(STEPS):
        arm(1)
    (optimizer,) = arm.optimizers
    place = {id(variable): number for number, variable in enumerate(arm.work.model.variables)}
    gradients = {
        place[id(variable)]: np.asarray(kept.value, "float32")
        for variable, kept in zip(optimizer.moved, optimizer.kept)
    }
    weights = {place[id(v)]: np.asarray(v.value, "float32") for v in arm.work.model.variables if "float" in v.dtype}
    return gradients, weights


def _error(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> float:
    """Return the largest difference relative to a norm; none counts as less than a thousandth of the largest."""
    norms = {number: float(np.linalg.norm(value)) for number, value in expected.items()}
    least = max(1e-3 * max(norms.values()), 1e-12)
    return max(
        float(np.linalg.norm(found[number] - value)) / max(norms[number], least) for number, value in expected.items()
    )
