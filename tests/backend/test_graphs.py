"""Each private name of TensorFlow by which graphs are run and made still means what it is used for."""

from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.autograph.impl import conversion

import tapeloop as tl
from tapeloop._backend import keras_internals, variables
from tapeloop._backend.autograph import converted
from tapeloop._backend.eager_ops import can_run_alone, runnable
from tapeloop._backend.fingerprint import fingerprint
from tapeloop._backend.tracing import unbound

layers = keras.layers


def ops_of(compute, *values):
    function = tf.function(compute, autograph=False).get_concrete_function(*values)
    return function.graph.get_operations()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: tf.squeeze(x[None], 0),
        lambda x: tf.cast(x, tf.float16),
        lambda x: tf.concat([x, x], 1),
        lambda x: tf.stack([x, x]),
        lambda x: tf.linalg.matmul(x, x, transpose_b=True),
        lambda x: tf.nn.conv2d(x[None, :, :, None], tf.ones([2, 2, 1, 1]), 1, "SAME"),
        lambda x: tf.strings.as_string(x),
        lambda x: tf.split(x, 3, 1)[1],
        lambda x: tf.ensure_shape(x, [None, 3]),
        lambda x: tf.einsum("ij,kj->ik", x, x),
        lambda x: tf.gather(x, [0, 2], axis=1),
    ],
)
def test_an_op_of_a_graph_runs_by_itself(compute):
    x = tf.reshape(tf.range(12.0), [4, 3])
    known = {}
    for op in ops_of(compute, x):
        if op.type == "Placeholder":
            known[op.outputs[0].name] = x
            continue
        assert can_run_alone(op)
        known |= zip([output.name for output in op.outputs], runnable(op)([known[given.name] for given in op.inputs]))
        last = op
    given = known[(last.inputs if last.type == "Identity" else last.outputs)[0].name]
    np.testing.assert_array_equal(given, compute(x))


def test_an_op_that_calls_a_function_does_not():
    (called,) = (op for op in ops_of(tf.function(lambda x: x + 1), tf.constant(1.0)) if "Call" in op.type)
    assert not can_run_alone(called)


def test_a_fingerprint_changes_with_any_byte_and_with_nothing_else():
    variables = [tf.Variable([1.0, 0.0, np.nan]), tf.Variable(3, dtype=tf.int64), tf.Variable([[True, False]])]
    first = fingerprint(variables)
    assert fingerprint(variables) == first
    assert len(first) == 8
    seen = {first}
    for variable, value in [(0, [1.0, -0.0, np.nan]), (0, [0.0, 1.0, np.nan]), (1, 4), (2, [[False, True]])]:
        variables[variable].assign(value)
        seen.add(fingerprint(variables))
    assert len(seen) == 5
    assert len({fingerprint([]), fingerprint([tf.Variable("text")]), first}) == 2


def test_the_structure_of_layers_tells_what_a_walk_would_find():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(2)

        def call(self, x):
            return self.inner(x)

    holder = Holder()
    holder(tf.ones([1, 2]))

    def look():
        return keras_internals.structure([holder, holder.inner], holder.variables)

    seen = look()
    assert look() == seen
    holder._tracker.unlock()  # as `enable_lora` does
    for change in (
        lambda: setattr(holder, "trainable", False),
        lambda: setattr(holder.inner.kernel, "trainable", True),
        lambda: setattr(holder, "other", layers.Dense(1)),
        lambda: setattr(holder, "inner", layers.Dense(3)),
        lambda: holder.add_weight(shape=(1,)),
        lambda: setattr(holder, "number", 1),
    ):
        change()
        before, seen = seen, look()
        assert seen != before, change
    assert keras_internals.structure([], []) == keras_internals.structure([], [])


def test_autograph_leaves_tapeloop_as_it_is_and_converts_what_users_write():
    assert conversion.is_allowlisted(tl.Trainer.train_step)

    def users(x):
        if x > 0:
            return x
        return -x

    def ours(x):
        return converted(users)(x)

    ours.__module__ = "tapeloop.ours"
    assert tf.function(ours)(tf.constant(-1.0)) == 1
    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        tf.function(ours, autograph=False)(tf.constant(-1.0))


class Reads(NamedTuple):
    tensors: Any
    nothing: None
    device: str
    iterator: Any


def test_a_function_that_is_called_without_binding_its_arguments_takes_them_in_their_order():
    def compute(reads, number):
        parts = [reads.tensors["b"], reads.tensors["a"][0], *reads.tensors["a"][1], reads.tensors["c"].flat_values]
        values = [*parts, tf.sparse.to_dense(reads.tensors["d"]), reads.iterator.get_next(), number]
        return [tf.reduce_sum(value) + weight.assign_add(1.0) for value in values]

    weight = tf.Variable(100.0)

    def arguments():
        ragged, sparse = tf.ragged.constant([[1.0], [2.0, 30.0]]), tf.sparse.from_dense([[0.0, 40.0]])
        tensors = {"b": tf.constant(5.0), "a": (tf.constant(6.0), [tf.constant(7.0), tf.constant(8.0)])}
        iterator = iter(tf.data.Dataset.range(3).map(lambda x: tf.cast(x, tf.float32) + 9.0))
        return Reads({**tensors, "d": sparse, "c": ragged}, None, "CPU:0", iterator), tf.constant(10.0)

    function = tf.function(compute, autograph=False).get_concrete_function(*arguments())
    expected = [float(value) for value in function(*arguments())]
    weight.assign(100.0)
    assert [float(value) for value in unbound(function)(*arguments())] == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool"])
def test_a_variable_is_read_and_assigned_by_one_op(dtype):
    variable, value = tf.Variable(tf.zeros((2, 3), dtype)), tf.ones((2, 3), dtype)
    before = variables.read(variable)
    variables.assign(variable, value)
    np.testing.assert_array_equal(variables.read(variable), value)
    np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(before, tf.zeros_like(value))  # what was read is a value, not a view
    variable.assign(before)
    np.testing.assert_array_equal(variables.read(variable), before)
