"""Each private name of Keras that tapeloop uses still means what it is used for."""

import keras
import pytest
import tensorflow as tf

from tapeloop._backend import keras_internals, patching, tracing

layers = keras.layers


class Adds(layers.Layer):
    """Adds a loss, and calls the layer inside."""

    def __init__(self, amount=1.0, inner=None):
        super().__init__()
        self.amount, self.inner = amount, inner

    def call(self, x):
        self.add_loss(tf.constant(self.amount))
        return self.inner(x) if self.inner else x


class Notes(layers.Layer):
    """Notes the mode that it is called in, and adds a loss."""

    def __init__(self, modes):
        super().__init__()
        self.note = modes.append

    def call(self, x, training=None):
        self.add_loss(tf.constant(1.0))
        self.note(training)
        return x


def test_sublayers_are_the_direct_ones_in_the_order_of_tracking():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.one = layers.Dense(1)
            self.several = [keras.Sequential([layers.Dense(1)]), layers.Dropout(0.1)]

    holder = Holder()
    assert keras_internals.sublayers(holder) == [holder.one, *holder.several]


def test_the_mode_that_nested_layers_inherit_can_be_read_and_set():
    seen = []

    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Notes(seen)

        def call(self, x, training=None):
            seen.append(keras_internals.inherited_training(self))
            keras_internals.inherit_training(self, False)
            return self.inner(x)

    Outer()(tf.zeros((1, 1)), training=True)
    assert seen[-2:] == [True, False]


def test_a_call_that_is_repeated_inherits_a_mode_and_leaves_no_trace():
    seen = []
    inner = Notes(seen)
    for training in (True, False):
        with keras_internals.within_call(training):
            inner(tf.zeros((1, 1)))
    inner(tf.zeros((1, 1)))
    assert seen == [True, False, None]
    # The outermost call forgets the losses before, as it does elsewhere.
    assert len(keras_internals.added_losses(inner)) == 1


def test_a_repeated_call_in_a_stateless_scope_adds_no_losses():
    layer = Adds()
    layer(tf.zeros((1, 1)))
    with keras_internals.within_call(True), keras.StatelessScope():
        layer(tf.zeros((1, 1)))
    assert len(keras_internals.added_losses(layer)) == 1


def test_a_mask_can_be_copied():
    masked = layers.Embedding(3, 2, mask_zero=True)(tf.constant([[1, 0]]))
    copy = tf.identity(masked)
    seen = []

    class Looks(layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            seen.append(mask)
            return x

    keras_internals.copy_mask(tf.zeros(1), copy)
    Looks()(copy)
    keras_internals.copy_mask(masked, copy)
    Looks()(copy)
    assert seen[0] is None
    assert seen[1].numpy().tolist() == [[True, False]]


def test_a_quantized_layer_is_run_by_another_method():
    dense = layers.Dense(2)
    assert keras_internals.call_methods(dense) == ("call",)
    dense(tf.zeros((1, 2)))
    dense.quantize("int8")
    assert keras_internals.call_methods(dense) == ("call", "quantized_call")
    ran = []
    object.__setattr__(dense, "quantized_call", lambda x: ran.append(x) or x)
    dense(tf.zeros((1, 2)))
    assert len(ran) == 1


def test_added_losses_are_a_layers_own():
    inner = Adds(2.0)
    outer = Adds(1.0, inner)
    outer(tf.zeros((1, 1)))
    assert [float(loss) for loss in keras_internals.added_losses(outer)] == [1.0]
    assert [float(loss) for loss in keras_internals.added_losses(inner)] == [2.0]
    keras_internals.forget_added_losses(inner)
    assert keras_internals.added_losses(inner) == []
    assert inner.losses == []


def test_a_cloned_optimizer_keeps_what_its_config_does_not_say():
    class Warmup(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5 * tf.cast(step + 1, tf.float32)

    for learning_rate in (Warmup(), lambda: 0.5):
        template = keras.optimizers.SGD(learning_rate, momentum=0.5)
        clone = keras_internals.clone_optimizer(template, keras_internals.optimizer_config(template, learning_rate))
        assert clone.momentum == 0.5
        assert float(clone.learning_rate) == float(template.learning_rate) == 0.5
    template = keras.optimizers.AdamW(0.25, weight_decay=0.5)
    template.exclude_from_weight_decay(var_names=["bias"])
    clone = keras_internals.clone_optimizer(template, keras_internals.optimizer_config(template, None))
    variable, bias = keras.Variable([1.0], name="kernel"), keras.Variable([1.0], name="bias")
    clone.build([variable, bias])
    clone.apply([tf.zeros(1), tf.zeros(1)])
    assert float(variable[0]) == 1 - 0.25 * 0.5
    assert float(bias[0]) == 1.0


def test_custom_objects_in_scope_reach_outside_of_a_trace():
    def mine(y, p):
        return y - p

    with keras.saving.custom_object_scope({"mine": mine}):
        got = []
        with tracing.untraced():
            got.append(keras.saving.get_registered_object("mine"))
    assert got == [mine]


def test_outside_of_a_trace_variables_are_made_unseen_and_errors_come_back():
    made, traces = [], []

    @tf.function
    def traced():
        traces.append(1)
        if not made:
            with tracing.untraced():
                made.append(tf.Variable(1.0))
                assert tf.executing_eagerly()
        return made[0] + 1.0

    assert float(traced()) == 2.0
    assert len(traces) == 1
    with pytest.raises(ZeroDivisionError), tracing.untraced():
        raise ZeroDivisionError


def test_the_effects_of_a_function_are_what_runs_unasked():
    variable = tf.Variable(0.0)

    @tf.function
    def assigning(x):
        variable.assign_add(1.0)
        return variable.read_value() + x

    function = assigning.get_concrete_function(tf.TensorSpec(()))
    assert "AssignAddVariableOp" in {op.type for op in tracing.effects(function)}
    assert "AddV2" not in {op.type for op in tracing.effects(function)}


def test_types_of_ops_are_told_apart_by_whether_they_are_stateful():
    assert not any(map(tracing.is_stateful, ("MatMul", "StatelessRandomUniformV2")))
    assert all(map(tracing.is_stateful, ("RandomUniform", "AssignVariableOp")))
    with pytest.raises(ValueError, match="TensorFlow knows no op of the type `Nonsense`"):
        tracing.is_stateful("Nonsense")


def test_a_layers_own_metrics_are_neither_its_childrens_nor_those_of_compile():
    inner = keras.layers.Dense(1)
    inner.one = keras.metrics.Mean(name="one")
    model = keras.Sequential([keras.Input((1,)), inner])
    model.other = keras.metrics.Mean(name="other")
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(tf.zeros((1, 1)), tf.zeros((1, 1)), verbose=0)
    assert keras_internals.own_metrics(model) == [model.other]
    assert keras_internals.own_metrics(inner) == [inner.one]


def test_a_class_has_another_attribute_for_a_while():
    class Base:
        def __call__(self):
            return "base"

    class Inherits(Base):
        pass

    for kind in (Base, Inherits):
        with patching.patched(kind, "__call__", lambda self: "other"):
            assert kind()() == "other"
        assert kind()() == "base"
    assert "__call__" not in vars(Inherits)


def test_the_rate_of_an_optimizer_is_a_variable_unless_it_follows_a_schedule():
    rate = keras_internals.learning_rate_variable(keras.optimizers.SGD(0.5))
    assert float(rate) == 0.5
    rate.assign(0.25)
    assert keras_internals.learning_rate_variable(keras.optimizers.SGD(lambda: 0.5)) is None


def test_the_bookkeeping_of_an_optimizer_is_none_of_its_settings():
    names = keras_internals.optimizer_bookkeeping()
    assert {"_variables", "_iterations", "built", "name"} <= names
    assert not {"momentum", "beta_1", "weight_decay", "clipnorm", "global_clipnorm"} & names


def test_every_method_that_assigns_to_a_variable_is_known():
    made = [tf.Variable(0.0)]
    tf.function(lambda: made.append(tf.Variable(0.0)) if len(made) < 2 else None).get_concrete_function()
    methods = patching.assigning_methods()
    for variable in (*made, keras.Variable(0.0).value):
        for name in ("assign", "assign_add", "assign_sub", "scatter_update", "_strided_slice_assign"):
            owner = next(kind for kind in type(variable).__mro__ if name in vars(kind))
            assert (owner, name) in methods
