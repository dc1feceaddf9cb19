import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.data.batch import shapes
from tapeloop.step.log_means import RunningMeans
from tapeloop.step.objective import Objective


def test_means_are_weighted_and_start_anew():
    means = RunningMeans()
    assert means.results() == ({}, 0)
    means.prepare(["loss"])
    means.prepare(["loss", "other"])
    means.update({"loss": tf.constant(1.0)}, tf.constant(3.0))
    means.update({"loss": tf.constant(5.0)}, tf.constant(1.0))
    assert means.results() == ({"loss": 2.0}, 4)
    means.update({"loss": tf.constant(6.0), "other": tf.constant([1.0, 3.0])}, 4)  # a step that logs more
    assert means.results() == ({"loss": 4.0, "other": 2.0}, 8)
    means.update({"loss": tf.constant(np.nan)}, 4, tf.constant(False))
    assert means.results() == ({"loss": 4.0, "other": 2.0}, 8)
    means.reset()
    logs, examples = means.results()
    assert examples == 0
    assert [name for name, value in logs.items() if np.isnan(value)] == ["loss", "other"]  # of nothing at all


def test_metrics_have_no_results_without_a_batch_and_making_their_variables_costs_no_second_trace():
    objective, traces = Objective("mse", None, ["mae", "accuracy"], None, None), []
    assert objective.results() == {}

    @tf.function
    def step(y):
        traces.append(1)
        objective.loss(y, y + 1.0, None)
        objective.update(y, y + 1.0, None)

    step(tf.zeros((4, 2)))
    assert len(traces) == 1
    assert float(objective.results()["mae"]) == 1.0


def test_metrics_keep_the_dtype_policy_of_the_caller():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        objective = Objective("mse", None, ["mae"], None, None)
        assert objective.loss(tf.zeros((4, 2)), tf.ones((4, 2), tf.bfloat16), None).dtype == tf.float32
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (None, r"The loss needs targets, but the batch has none.*The model's output is \(4, 2\) float32"),
        (np.zeros((3, 5), "float32"), r"the targets are \(3, 5\) float32, the model's output is \(4, 2"),
    ],
)
def test_targets_that_do_not_fit(y, text):
    with pytest.raises(tl.DataError, match=text):
        Objective("mse", None, None, None, None).loss(y, tf.zeros((4, 2)), None)


def test_shapes_are_said_with_their_dtypes():
    assert shapes(None) == "missing"
    assert shapes(tf.zeros((2, 3))) == "(2, 3) float32"
    assert shapes({"a": tf.zeros(2), "b": tf.zeros((), tf.int32)}) == "[(2,) float32, () int32]"
