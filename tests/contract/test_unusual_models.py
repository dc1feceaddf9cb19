"""Models, losses and metrics that broke an earlier version, or might have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.fitting import RANDOM, CountingModule, X, Y, dense, fit, history_of, moved
from tests.support.params import params

layers = keras.layers


def base():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5)], name="b"
    )


def test_a_lazy_sequential_keeps_no_batch_size_from_its_first_batch():
    model = keras.Sequential([layers.Dense(3)])
    trainer = tl.Trainer(model, loss="mse")
    trainer.fit((X[:7], Y[:7]), batch_size=4, verbose=0)
    assert (trainer.step, trainer.trace_count) == (2, 1)
    assert model.input_shape == (None, 4)
    assert trainer.predict(X[:3]).shape == (3, 3)


class FunctionModule(tf.Module):
    def __init__(self):
        self.b, self.h = base(), layers.Dense(3)
        self.h.build((None, 4))

    @tf.function
    def __call__(self, x, training=False):
        return self.h(self.b(x, training=training))


class BaseAndHead(keras.Model):
    def __init__(self):
        super().__init__()
        self.b, self.h = base(), layers.Dense(3)


class FunctionModel(BaseAndHead):
    @tf.function
    def call(self, x, training=False):
        return self.h(self.b(x, training=training))


@pytest.mark.parametrize("make", params([FunctionModule, FunctionModel], [FunctionModule]))
def test_a_tf_function_inside_the_model_neither_breaks_the_freeze_nor_keeps_its_mode(make):
    model = make()
    model(X, training=True)  # its own trace, in training mode, which a frozen step must not use
    assert moved(model, lambda: fit(model, tl.Freeze("b")), "b") == set()
    assert moved(model, lambda: fit(model, tl.TrainAll()), "b")
    fresh = make()
    fit(fresh, tl.Freeze("b"))
    assert moved(fresh, lambda: fresh(X, training=True), "b")


def test_lists_of_inputs_and_targets():
    inputs = keras.Input((4,))
    two = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(1)(inputs)])
    assert fit(two, loss=["mse", "mse"], data=(X, [Y, Y[:, :1]])).step == 1
    a, b = keras.Input((4,)), keras.Input((4,))
    both = keras.Model([a, b], layers.Dense(3)(a + b))
    assert fit(both, data=([X, X], Y)).predict(([X, X],)).shape == (8, 3)


class Insistent(BaseAndHead):
    def call(self, x):
        return self.h(self.b(x, training=True))


def test_prediction_and_evaluation_run_the_frozen_part_in_inference_mode_too():
    model = Insistent()
    model(X)
    trainer = fit(model, tl.Freeze("b"))
    loss = trainer.evaluate([(X, Y)], verbose=0)["loss"]
    predicted = []
    assert moved(model, lambda: predicted.append(trainer.predict(X)), "b") == set()
    assert loss == pytest.approx(float(np.mean((predicted[0] - Y) ** 2)), rel=1e-5)


class Counting(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = layers.Dense(4)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def encode(self, x):
        self.count.assign_add(1.0)
        return self.d(x)

    def call(self, x):
        return self.encode(x)


class Encodes(keras.Model):
    def __init__(self):
        super().__init__()
        self.f, self.h = Counting(), layers.Dense(3)

    def call(self, x):
        return self.h(self.f.encode(x))


@pytest.mark.filterwarnings("ignore:`build..` was called on layer")  # some of its layers are never called
def test_state_that_is_assigned_outside_of_call_is_sealed():
    model = Encodes()
    model(X)
    model.f(X)
    assert moved(model, lambda: fit(model, tl.Freeze("f")), "f") == set()
    assert "f/count" in moved(model, lambda: fit(model, tl.TrainAll()), "f")


def test_a_module_that_counts_its_calls_is_sealed_when_frozen():
    class Whole(tf.Module):
        def __init__(self):
            self.counts, self.w = CountingModule(), tf.Variable(tf.ones((4, 3)))

        def __call__(self, x):
            return self.counts(x) @ self.w

    model = Whole()
    assert moved(model, lambda: fit(model, tl.Freeze("counts"))) == {"w"}
    assert moved(model, lambda: fit(model)) == {"counts/scale", "counts/calls", "w"}


def test_one_frozen_cell_of_several():
    inputs = keras.Input((4, 4))
    rnn = layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3, dropout=0.3), layers.GRUCell(3)]), name="rnn")
    model = keras.Model(inputs, layers.Dense(3)(rnn(inputs)))
    data = [(RANDOM.normal(size=(8, 4, 4)), Y)]
    run = lambda: fit(model, tl.Freeze(rnn.cell.cells[0]), data=data)  # noqa: E731
    assert moved(model, run, "rnn/cell/cells/0") == set()


@pytest.mark.filterwarnings("ignore:`build..` was called on layer")  # some of its layers are never called
def test_a_dropout_shared_with_a_trained_submodel_is_off_inside_the_frozen_one():
    drop = layers.Dropout(0.5)

    class Inner(layers.Layer):
        def __init__(self):
            super().__init__()
            self.d, self.drop = layers.Dense(4), drop

        def build(self, shape):
            self.d.build(shape)

        def call(self, x):
            return self.drop(self.d(x), training=True)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained, self.h = Inner(), Inner(), layers.Dense(3)

        def call(self, x):
            return self.h(self.trained(x))

    model = Net()
    model(X)
    model.frozen.build((None, 4))

    class Compares(tl.Trainer):
        def train_step(self, batch):
            kept = tf.reduce_all(self.model.frozen(batch[0]) != 0.0)
            return {**super().train_step(batch), "kept": tf.cast(kept, tf.float32)}

    assert history_of(model, tl.Freeze("frozen"), kind=Compares)["kept"] == [1.0]


def test_a_modules_attribute_named_like_one_of_keras_is_seen():
    class Named(tf.Module):
        def __init__(self):
            self._layers, self.loss = [tf.Variable(tf.ones((4, 3)))], tf.Variable(tf.zeros(3))

        def __call__(self, x):
            return x @ self._layers[0] + self.loss

    assert [v.path for v in tl.Trainer(Named(), loss="mse").selection.trained] == ["layers/0", "loss"]


def test_a_model_with_its_own_dunder_call_without_training():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.d = layers.Dense(3)

        def __call__(self, x):
            return self.d(x)

    model = Own()
    model(X)
    assert fit(model).step == 3


def test_nested_and_optional_inputs():
    a, b, c = (keras.Input((4,), name=name) for name in "abc")
    nested = keras.Model({"ab": [a, b], "c": c}, layers.Dense(3)(a + b + c))
    assert fit(nested, data=[({"ab": [X, X], "c": X}, Y)]).step == 1


def test_a_frozen_model_can_be_evaluated_and_predict():
    model = dense()
    model.trainable = False
    trainer = tl.Trainer(model, loss="mse")
    assert trainer.evaluate((X, Y), verbose=0)["loss"] == pytest.approx(np.mean((trainer.predict(X) - Y) ** 2))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_freezes_the_same(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential([keras.Input((4,)), base(), layers.Dense(3, dtype="float32")])
    finally:
        keras.config.set_dtype_policy("float32")
    assert moved(model, lambda: fit(model, tl.Freeze("b")), "b") == set()


def test_a_quantized_layer_with_adapters_trains_the_adapters_alone():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")])
    model.layers[0].quantize("int8")
    model.layers[0].enable_lora(2)
    found = moved(model, lambda: fit(model, tl.TrainOnly("d/lora_kernel_*"), optimizer="sgd"))
    assert set() < found <= {"d/lora_kernel_a", "d/lora_kernel_b"}


def test_low_rank_terms_that_loading_has_set_to_zero_are_warned_of(tmp_path):
    def network():
        return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")])

    network().save_weights(tmp_path / "base.weights.h5")
    model = network()
    model.layers[0].enable_lora(2)
    fit(model, tl.TrainOnly("d/lora_kernel_*"), optimizer="sgd")  # the order that the warning asks for
    trainer = tl.Trainer(model, tl.TrainOnly("d/lora_kernel_*"), loss="mse")
    trainer.load(tmp_path / "base.weights.h5")
    with pytest.warns(UserWarning, match=r"terms of `d` are all zero.*load them first, and call `enable_lora` after"):
        trainer.fit(X, Y, verbose=0)


class Drifting(layers.Layer):
    """Trains one weight, and moves another by hand each time that it is called."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros", name="shift")

    def call(self, inputs):
        self.shift.assign_add(tf.ones_like(self.shift))
        return inputs * self.scale + self.shift


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}], ids=str)
def test_a_frozen_weight_of_a_layer_that_trains_in_part_does_not_move_in_its_call(how):
    model = keras.Sequential([keras.Input((4,)), Drifting(name="drifting"), layers.Dense(2, name="head")])
    trainer = tl.Trainer(model, tl.TrainOnly("drifting/scale"), loss="mse", **how)
    shift, scale = (getattr(model.layers[0], name).numpy() for name in ("shift", "scale"))
    trainer.fit([(np.ones((4, 4)), np.ones((4, 2)))] * 2, verbose=0)
    np.testing.assert_array_equal(model.layers[0].shift.numpy(), shift)
    assert (model.layers[0].scale.numpy() != scale).any()


def test_what_a_frozen_layers_activities_cost_is_no_part_of_the_loss():
    dense = layers.Dense(3, activity_regularizer=keras.regularizers.L2(10.0), name="base")
    model = keras.Sequential([keras.Input((4,)), dense, layers.Dense(2, name="head")])
    x, y = np.ones((4, 4), "float32"), np.ones((4, 2), "float32")
    plain = float(np.mean((np.asarray(model(x)) - y) ** 2))
    losses = [
        tl.Trainer(model, policy, loss="mse").evaluate([(x, y)], verbose=0)["loss"]
        for policy in (tl.Freeze("base"), tl.TrainAll())
    ]
    assert losses[0] == pytest.approx(plain, rel=1e-5)
    assert losses[1] > plain
