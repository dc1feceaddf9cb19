"""Assignments that are masked, and what a mask cannot reach."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tapeloop._backend.patching import masked_assignments, noting_assignments
from tapeloop._backend.traced_graph import moves_more_than_variables
from tapeloop._backend.tracing import may_act

ASSIGNMENTS = {
    "assign": lambda v: v.assign([9.0, 8.0, 7.0]),
    "assign, by name": lambda v: v.assign(value=[9.0, 8.0, 7.0], read_value=False),
    "assign_add": lambda v: v.assign_add([1.0, 1.0, 1.0], read_value=False),
    "assign_sub": lambda v: v.assign_sub([1.0, 1.0, 1.0]),
    "scatter_update": lambda v: v.scatter_update(tf.IndexedSlices([5.0], [1], [3])),
    "scatter_nd_add": lambda v: v.scatter_nd_add([[0]], [5.0]),
    "slice": lambda v: v[1:].assign([6.0, 6.0]),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_masked_assignment_leaves_the_value_or_does_what_it_does(name):
    masked, plain = tf.Variable([1.0, 2.0, -0.0]), tf.Variable([1.0, 2.0, -0.0])
    noted = []

    @tf.function(autograph=False)
    def assign(happens):
        # As where a step is traced: whatever is assigned is noted, and only then masked.
        with noting_assignments([masked], lambda variable: noted.append(variable)), masked_assignments(happens):
            ASSIGNMENTS[name](masked)

    before = masked.numpy().tobytes()
    assign(tf.constant(False))
    assert masked.numpy().tobytes() == before
    assign(tf.constant(True))
    ASSIGNMENTS[name](plain)
    assert masked.numpy().tobytes() == plain.numpy().tobytes()
    assert len(noted) == 1


def test_after_it_variables_are_assigned_to_as_ever():
    variable = tf.Variable(1.0)
    with pytest.raises(ZeroDivisionError), masked_assignments(tf.constant(False)):
        raise ZeroDivisionError
    variable.assign(2.0)
    assert float(variable) == 2.0


VARIABLE, GENERATOR = tf.Variable(1.0), tf.random.Generator.from_seed(1)
LOOKUP = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
SEEDS, KEY = keras.random.SeedGenerator(1), tf.constant(1, tf.int64)


@pytest.mark.parametrize(
    ("compute", "op"),
    [
        (lambda x: VARIABLE.assign_add(tf.reduce_sum(x)), None),
        (lambda x: tf.cond(x[0] > 0, lambda: VARIABLE.assign_add(1.0), lambda: VARIABLE.read_value()), None),
        (lambda x: GENERATOR.uniform([3]) + tf.random.normal([3]) + LOOKUP.lookup(KEY), None),
        (lambda x: keras.random.dropout(x, 0.5, seed=SEEDS), None),
        (lambda x: LOOKUP.insert(KEY, tf.reduce_sum(x)), "LookupTableInsertV2"),
        (lambda x: tf.cond(x[0] > 0, lambda: LOOKUP.insert(KEY, x[0]), tf.no_op), "LookupTableInsertV2"),
        (lambda x: tf.numpy_function(np.sum, [x], tf.float32), "PyFunc"),
        (lambda x: tf.print(x), "PrintV2"),
    ],
)
def test_what_a_function_moves_beside_variables_is_told_by_its_ops(compute, op):
    function = tf.function(lambda x: [compute(x), None][1], autograph=False)
    assert moves_more_than_variables(function.get_concrete_function(tf.TensorSpec([3]))) == op


def test_an_op_that_takes_a_resource_may_act_though_tensorflow_does_not_call_it_stateful():
    assert may_act("LookupTableInsertV2")
    assert may_act("AssignVariableOp")
    assert not may_act("AddV2")
