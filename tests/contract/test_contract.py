"""The freeze contract, on whole fits."""

import contextlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.model.tree import Tree
from tapeloop.policies.resolve import resolve
from tapeloop.step.freezing import frozen, inference_mode
from tests.support import inspect, models
from tests.support.fitting import moved
from tests.support.steps import OneUpdate

MODELS = {
    "functional": models.functional,
    "pinned": models.pinned,
    "subclassed": lambda: models.built(models.Subclassed()),
    "insistent": lambda: models.built(models.Insistent()),
    "module": models.Module,
}


def fit(model, policy, steps=20, kind=tl.Trainer, **options):
    options.setdefault("optimizer", keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    trainer = kind(model, policy, loss=models.cross_entropy(), metrics=["accuracy"], **options)
    trainer.fit([models.images(8)] * steps, verbose=0)
    return trainer


def flags_attributes_and_config(model):
    """All that a library could write to a model, but for its variables."""
    objects = [layer.object for layer in Tree.of(model).layers]
    config = model.get_config() if hasattr(model, "get_layer") and model.built else None
    return [(layer.name, layer.trainable, sorted(vars(layer))) for layer in objects], config


@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_is_bit_identical_and_the_model_is_not_written_to(name):
    model = MODELS[name]()
    before, settings = models.values(model), flags_attributes_and_config(model)
    assert [path for path in before if path.startswith("base/") and ("moving" in path or "seed" in path)]
    trainer = fit(model, tl.Freeze("base"))
    after = models.values(model)
    changed = {path for path in before if before[path] != after[path]}
    assert not [path for path in changed if path.startswith("base/")]
    assert changed >= {path for path in before if path.endswith("head/kernel") or path == "w"}
    assert flags_attributes_and_config(model) == settings
    selection = trainer.selection
    assert not any(inspect.optimizer_state_bytes(trainer, v) for v in selection.frozen + selection.non_trainable)
    assert all(inspect.optimizer_state_bytes(trainer, v) == 8 * v.size for v in selection.trained)


@pytest.mark.parametrize("make", [models.functional, models.pinned, MODELS["subclassed"], MODELS["insistent"]])
def test_inside_the_step_the_base_gives_its_inference_output(make):
    model = make()
    base = model.get_layer("base") if isinstance(model, keras.src.models.Functional) else model.base
    x = tf.constant(models.images(8)[0])
    expected = base(x, training=False)
    seen = []

    class Calling(tl.Trainer):
        def forward(self, inputs, training):
            seen.append(base(inputs, training=training))
            return super().forward(inputs, training)

        def train_step(self, batch):
            logs = super().train_step(batch)
            return {**logs, "difference": tf.reduce_max(tf.abs(seen[-1] - expected))}

    trainer = fit(model, tl.Freeze("base"), steps=1, kind=Calling)
    assert trainer.history.history["difference"] == [0.0]
    np.testing.assert_array_equal(base(x, training=False), expected)


def test_the_saved_model_loads_without_tapeloop(tmp_path):
    model = models.functional()
    fit(model, tl.Freeze("base"), steps=1)
    x = models.images(4)[0]
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, keras, numpy as np; sys.modules['tapeloop'] = None\n"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras')\n"
        "np.save(sys.argv[1] + '/y.npy', model.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0))


def test_the_tape_watches_what_is_selected_and_nothing_else():
    watched = []

    class Watching(OneUpdate):
        def update(self, tape, loss):
            watched.extend(variable.name for variable in tape.watched_variables())
            super().update(tape, loss)

    fit(models.functional(), tl.Freeze("base"), steps=1, kind=Watching)
    assert len(watched) == 2


def test_trained_parts_still_run_in_training_mode_after_a_frozen_one():
    """Keras 3 hands the mode of the child called last on to the next; a frozen child must not switch Dropout off."""

    class Explicit(keras.Model):
        def __init__(self):
            super().__init__()
            self.base = keras.Sequential([keras.Input((6, 6, 1)), *models.base_layers()])
            self.gain = keras.layers.LayerNormalization(axis=[1, 2])
            self.drop = keras.layers.Dropout(0.5)

        def call(self, inputs, training=None):
            return self.drop(self.base(self.gain(inputs), training=False))

    model = models.built(Explicit())
    selection = resolve(tl.Freeze("base"), Tree.of(model))
    x = tf.constant(models.images(64)[0]) + 10.0
    dropped = lambda y: float(tf.reduce_mean(tf.cast(y == 0, tf.float32)))  # noqa: E731
    outside = dropped(model(x, training=False))
    assert dropped(model(x, training=True)) == outside  # what Keras alone does
    with inference_mode(selection, set()):
        assert dropped(model(x, training=True)) > outside + 0.1
        assert dropped(model(x, training=False)) == outside


def test_a_layer_inside_a_frozen_one_that_keras_does_not_track_is_in_inference_mode():
    class Hidden(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)
            self.untracked = (lambda layer: lambda: layer)(keras.layers.Dropout(0.9))

        def call(self, x):
            return self.untracked()(self.dense(x))

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(Hidden()(inputs)))
    x = tf.ones((8, 4))
    with inference_mode(resolve(tl.TrainOnly("head"), Tree.of(model)), set()):
        np.testing.assert_array_equal(model(x, training=True), model(x, training=False))


def test_state_that_a_frozen_layer_moves_even_in_inference_is_sealed():
    lstm = keras.layers.LSTM(3, stateful=True, name="lstm")
    inputs = keras.Input((5, 2), batch_size=4)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(lstm(inputs)))
    x, y = np.ones((4, 5, 2), "float32"), np.zeros((4, 2), "float32")
    assert {"lstm/states/0", "lstm/states/1"} <= models.values(model).keys()
    for policy, moves in ((tl.Freeze("lstm"), False), (tl.TrainAll(), True)):
        trainer = tl.Trainer(model, policy, loss="mse")
        assert bool(moved(model, lambda: trainer.fit([(x, y)] * 3, verbose=0), "lstm")) == moves  # noqa: B023


def test_the_users_own_override_of_call_runs_and_stays():
    model = models.functional()
    base = model.get_layer("base")
    original, calls = base.call, []

    def mine(*args, **kwargs):
        calls.append(kwargs.get("training"))
        return original(*args, **kwargs)

    base.call = mine
    fit(model, tl.Freeze("base"), steps=1)
    assert calls == [False]
    assert base.call is mine


def test_the_mode_is_lifted_when_the_step_raises():
    model = models.functional()
    own = {id(v.tf_variable): sorted(vars(v.tf_variable)) for v in Tree.of(model).variables}
    with contextlib.suppress(ZeroDivisionError), frozen(resolve(tl.Freeze("base"), Tree.of(model)), set(), set()):
        assert tf.config.functions_run_eagerly()
        raise ZeroDivisionError
    assert not tf.config.functions_run_eagerly()
    assert not any("call" in vars(layer.object) for layer in Tree.of(model).layers)
    assert {id(v.tf_variable): sorted(vars(v.tf_variable)) for v in Tree.of(model).variables} == own


def test_penalties_and_added_losses_count_for_what_trains_alone():
    layers = keras.layers

    class Adds(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            self.add_loss(tf.constant(100.0))
            return x * self.w

    def dense(name):
        return layers.Dense(
            2, name=name, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(1.0), use_bias=False
        )

    model = keras.Sequential([keras.Input((2,)), dense("first"), Adds(name="adds"), dense("second")])
    x, y = np.zeros((4, 2), "float32"), np.zeros((4, 2), "float32")

    for policy, loss in (
        (tl.TrainAll(), 4 + 4 + 100), (tl.Freeze("first"), 4 + 100), (tl.TrainOnly("second"), 4)
    ):  # fmt: skip
        trainer = tl.Trainer(model, policy, loss="mse", optimizer=keras.optimizers.SGD(0.0))
        assert trainer.evaluate((x, y), verbose=0)["loss"] == loss
        assert trainer.fit((x, y), verbose=0).history["loss"] == [loss]


@pytest.mark.parametrize(
    "options",
    [
        {"microbatches": 3},
        {"nonfinite": "skip", "ema": 0.5, "clip_norm": 0.1},
        {"remat": "base"},
        {"run_eagerly": True, "microbatches": 2},
        {"jit_compile": True},
    ],
    ids=str,
)
def test_what_is_frozen_stays_under_every_option(options):
    model, (x, y) = models.functional(), models.images(6)
    data = [(x, y)] * 3
    if options.get("nonfinite") == "skip":
        data += [(np.full_like(x, np.nan), y), (x, y)]
    trainer = models.trainer_of(model, tl.Freeze("base"), optimizer=keras.optimizers.AdamW(0.1), **options)
    assert moved(model, lambda: trainer.fit(data, verbose=0)) == {"head/kernel", "head/bias"}
    assert len(inspect.averages(trainer)) == (len(trainer.selection.trained) if "ema" in options else 0)
    assert not any(inspect.optimizer_state_bytes(trainer, v) for v in trainer.selection.frozen)
