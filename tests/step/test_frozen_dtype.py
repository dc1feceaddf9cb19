"""The frozen part in bfloat16."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl

layers = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 6, 6, 3)).astype("float32"), RNG.integers(0, 3, 32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Sees(layers.Layer):
    """Notes in which dtype it is called."""

    def __init__(self, seen, **options):
        super().__init__(**options)
        self.note = seen.append  # Keras would keep a copy of a list

    def call(self, inputs):
        self.note((self.name, inputs.dtype))
        return inputs


def network(seen):
    keras.utils.set_random_seed(0)
    blocks = [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(), Sees(seen, name="inner")]
    base = keras.Sequential([keras.Input((6, 6, 3)), *blocks, layers.GlobalAveragePooling2D()], name="base")
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, layers.Dense(3, name="head")(Sees(seen, name="between")(base(inputs))))


def trainer_of(model, policy=None, **options):
    options = {"frozen_dtype": "bfloat16", **options}
    return tl.Trainer(model, policy or tl.Freeze("base"), loss=LOSS, optimizer="adam", seed=0, **options)


@pytest.mark.parametrize("fold_frozen", [True, False])
def test_what_is_frozen_computes_in_it_and_what_trains_does_not(fold_frozen):
    seen = []
    model, other = network(seen), network([])
    other.set_weights(model.get_weights())
    seen.clear()
    trainer = trainer_of(model, fold_frozen=fold_frozen)
    history = trainer.fit(X, Y, epochs=3, validation_data=(X, Y), verbose=0).history
    assert set(seen) == {("inner", tf.bfloat16), ("between", tf.float32)}
    plain = trainer_of(other, frozen_dtype=None).fit(X, Y, epochs=3, validation_data=(X, Y), verbose=0).history
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history[name], plain[name], rtol=0.02)
        assert history[name] != plain[name]
    # Nothing is left of it on the model.
    assert {layer.dtype_policy.name for layer in (*model.layers, *model.get_layer("base").layers)} == {"float32"}
    assert trainer.predict(X).dtype == np.float32
    for one, kept in zip(model.get_layer("base").variables, other.get_layer("base").variables):
        assert one.dtype == "float32"
        assert one.numpy().tobytes() == kept.numpy().tobytes()


def test_folded_the_copies_of_the_weights_are_kept():
    trainer = trainer_of(network([]), fold_frozen=True)
    trainer.fit(X, Y, verbose=0)
    dtypes = {value.variable.dtype for value in trainer._loop.steps.folding.store.known()}
    assert tf.bfloat16 in dtypes


def test_a_part_that_trains_in_between_is_left_alone():
    seen = []
    model = network(seen)
    seen.clear()
    trainer = trainer_of(model, tl.TrainOnly("base/conv", "head"))
    trainer.fit(X, Y, verbose=0)
    assert set(seen) == {("inner", tf.float32), ("between", tf.float32)}


def test_gradients_go_through_it():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    below = layers.Conv2D(3, 1, name="below")(inputs)
    base = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D()], name="base")
    model = keras.Model(inputs, layers.Dense(3, name="head")(base(below)))
    before = model.get_layer("below").kernel.numpy()
    trainer_of(model).fit(X, Y, verbose=0)
    assert np.abs(model.get_layer("below").kernel.numpy() - before).max() > 1e-4


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`frozen_dtype` must be None or 'bfloat16'\. Received: 'float16'\."):
        trainer_of(network([]), frozen_dtype="float16")
