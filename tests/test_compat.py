"""Each private name of Keras that tapeloop uses still means what it is used for."""

import keras
import pytest
import tensorflow as tf

from tapeloop import _compat

layers = keras.layers


def test_sublayers_are_the_direct_ones_in_the_order_of_tracking():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.one = layers.Dense(1)
            self.several = [keras.Sequential([layers.Dense(1)]), layers.Dropout(0.1)]

    holder = Holder()
    assert _compat.sublayers(holder) == [holder.one, *holder.several]


def test_the_mode_that_nested_layers_inherit_can_be_read_and_set():
    seen = []

    class Inner(layers.Layer):
        def call(self, x, training=None):
            seen.append(training)
            return x

    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x, training=None):
            seen.append(_compat.inherited_training(self))
            _compat.inherit_training(self, False)
            return self.inner(x)

    Outer()(tf.zeros((1, 1)), training=True)
    assert seen[-2:] == [True, False]


def test_a_quantized_layer_is_run_by_another_method():
    dense = layers.Dense(2)
    assert _compat.call_methods(dense) == ("call",)
    dense(tf.zeros((1, 2)))
    dense.quantize("int8")
    assert _compat.call_methods(dense) == ("call", "quantized_call")
    ran = []
    object.__setattr__(dense, "quantized_call", lambda x: ran.append(x) or x)
    dense(tf.zeros((1, 2)))
    assert len(ran) == 1


def test_a_sealed_scope_drops_assignments_and_losses_and_gives_way_to_the_users_own():
    class Counts(layers.Layer):
        def __init__(self):
            super().__init__()
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.count.assign_add(1.0)
            self.add_loss(tf.constant(1.0))
            return x

    counts = Counts()
    with _compat.sealed_scope():
        counts(tf.zeros((1, 1)))
    assert float(counts.count) == 0.0
    assert _compat.added_losses(counts) == []
    with keras.StatelessScope() as scope, _compat.sealed_scope():
        counts(tf.zeros((1, 1)))
    assert float(scope.get_current_value(counts.count)) == 1.0


def test_added_losses_are_a_layers_own():
    class Adds(layers.Layer):
        def __init__(self, amount, inner=None):
            super().__init__()
            self.amount, self.inner = amount, inner

        def call(self, x):
            self.add_loss(tf.constant(self.amount))
            return self.inner(x) if self.inner else x

    inner = Adds(2.0)
    outer = Adds(1.0, inner)
    outer(tf.zeros((1, 1)))
    assert [float(loss) for loss in _compat.added_losses(outer)] == [1.0]
    assert [float(loss) for loss in _compat.added_losses(inner)] == [2.0]


def test_outside_of_a_trace_variables_are_made_unseen_and_errors_come_back():
    made, traces = [], []

    @tf.function
    def traced():
        traces.append(1)
        if not made:
            _compat.outside_of_trace(lambda: made.append(tf.Variable(1.0)))
        return made[0] + 1.0

    assert float(traced()) == 2.0
    assert len(traces) == 1
    with pytest.raises(ZeroDivisionError):
        _compat.outside_of_trace(lambda: 1 / 0)
