"""What TensorFlow and Keras have that stands in the way of training on several devices still is as it is."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tapeloop._backend import collectives
from tapeloop._backend.traced_graph import TracedGraph


@pytest.fixture(scope="module")
def group():
    return collectives.Group(9_999, 1, "ring")  # of this device alone


def test_sums_and_rows_of_all_devices(group):
    token = tf.Variable(0.0)

    @tf.function
    def both(x):
        return collectives.all_reduced(x, group, 1, token), collectives.all_reduced(x, group, 2, token, "Max")

    added, largest = both(tf.constant([1.0, 2.0]))
    np.testing.assert_array_equal(added, [1.0, 2.0])
    np.testing.assert_array_equal(largest, [1.0, 2.0])
    np.testing.assert_array_equal(collectives.all_gathered(tf.constant([[3, 4]]), group, 3), [[3, 4]])


def test_a_function_called_with_another_variable_assigns_to_that():
    own, other = tf.Variable(1.0), tf.Variable(10.0)
    function = tf.function(lambda x: own.assign_add(x)).get_concrete_function(tf.TensorSpec(()))

    @tf.function
    def call(x):
        return collectives.called_with(function, [x], [other])

    assert float(call(tf.constant(2.0))) == 12.0
    assert (float(own), float(other)) == (1.0, 12.0)


def test_a_keras_variable_keeps_its_value_in_another_variable():
    dense = keras.layers.Dense(1)
    dense.build((None, 1))
    value = tf.Variable([[3.0]])
    collectives.put_in(dense.kernel, value)
    assert dense.kernel.value is value
    np.testing.assert_array_equal(dense(tf.ones([1, 1])), [[3.0]])


def test_an_optimizer_leaves_the_strategy_in_whose_scope_it_was_made():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        optimizer = keras.optimizers.SGD(1.0)
    plain = keras.Variable(1.0)
    collectives.leave_strategy(optimizer)
    optimizer.build([plain])
    for each in optimizer.variables:
        collectives.put_in(each, tf.Variable(each.value.values[0] if hasattr(each.value, "values") else each.value))
    optimizer.apply([tf.constant(0.25)], [plain])
    assert float(plain) == 0.75


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (tf.errors.UnavailableError(None, None, "Collective ops is aborted by: Socket closed"), True),
        (tf.errors.InternalError(None, None, "Collective ops is aborted by: ..."), True),
        (tf.errors.InternalError(None, None, "something else"), False),
        (tf.errors.OutOfRangeError(None, None, "End of sequence"), False),
        (ValueError("Collective"), False),
    ],
)
def test_which_errors_say_that_a_device_is_gone(error, expected):
    assert collectives.is_lost(error) is expected


def test_what_a_function_may_assign_to_is_found_in_what_it_calls():
    names = "read", "called", "branch", "other_branch", "looped", "scattered"
    made = {name: tf.Variable([1.0], name=name) for name in names}

    @tf.function
    def inner(x):
        made["called"].assign(x + made["read"])
        return x

    @tf.function
    def outer(x):
        x = inner(x)
        if x[0] > 0:
            made["branch"].assign_add(x)
        else:
            made["other_branch"].assign_add(made["read"])
        for _ in tf.range(2):
            made["looped"].assign_sub(made["read"])
        made["scattered"].scatter_nd_update([[0]], [2.0])
        return x + made["read"]

    graph = TracedGraph(outer.get_concrete_function(tf.TensorSpec([1])), made.values())
    found = {graph.variables[name].name.partition(":")[0] for name in graph.assigned()}
    assert found == set(names) - {"read"}
    # Where a call assigns to anything, `written` takes all that it is given for assigned to.
    assert "read" in {graph.variables[name].name.partition(":")[0] for name in graph.written()}
