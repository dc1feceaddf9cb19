"""The norms of gradients and the sizes of updates, by group."""

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support.fitting import BAD, X, Y, mlp

GROUPS = {"low": "a", "high": "b"}


def trainer_of(**options):
    optimizers = {"low": keras.optimizers.SGD(0.1), "high": keras.optimizers.SGD(0.01)}
    return tl.Trainer(
        mlp("a", "b"), tl.Groups(GROUPS), loss="mse", optimizer=optimizers, log_updates=True, seed=0, **options
    )


def norm(arrays):
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


def test_norms_and_ratios_are_those_of_the_step():
    trainer = trainer_of(clip_norm=1e-3)
    layers = {"low": trainer.model.get_layer("a"), "high": trainer.model.get_layer("b")}
    before = {group: [np.array(v) for v in layer.weights] for group, layer in layers.items()}
    reference = tl.Trainer(mlp("a", "b"), loss="mse", optimizer=keras.optimizers.SGD(1.0))
    reference.train_on_batch(X, Y)
    logs = trainer.train_on_batch(X, Y)
    for group, layer in layers.items():
        name = GROUPS[group]
        # With a rate of 1 and no clipping an update is the gradient.
        gradients = [old - np.array(v) for old, v in zip(before[group], reference.model.get_layer(name).weights)]
        moved = [np.array(v) - old for old, v in zip(before[group], layer.weights)]
        assert logs[f"{group}/gradient_norm"] == pytest.approx(norm(gradients), rel=1e-4)
        assert logs[f"{group}/update_ratio"] == pytest.approx(norm(moved) / norm(before[group]), rel=1e-3)


def test_they_are_averaged_over_the_updates_of_an_epoch_and_start_anew():
    one, other = trainer_of(), trainer_of()
    apart = [one.train_on_batch(X[rows], Y[rows])["low/gradient_norm"] for rows in (slice(0, 4), slice(4, 8))]
    history = other.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    assert history["low/gradient_norm"][0] == pytest.approx(np.mean(apart), rel=1e-5)
    assert history["low/gradient_norm"][1] < history["low/gradient_norm"][0]
    assert set(history) == {"loss", *(f"{g}/{n}" for g in GROUPS for n in ("gradient_norm", "update_ratio"))}


def test_a_step_that_is_skipped_counts_for_none():
    trainer = trainer_of(nonfinite="skip")
    x = np.concatenate([BAD[:4], X[:4]])
    history = trainer.fit(x, Y, batch_size=4, shuffle=False, verbose=0).history
    assert np.isfinite(history["low/gradient_norm"][0])
    cycle = tl.Trainer(mlp("a", "b"), tl.TrainOnly("a"), loss="mse", optimizer="sgd", log_updates=True)
    assert "default/update_ratio" in cycle.train_on_batch(X, Y)


def test_embeddings_microbatches_and_eager_steps_are_measured_too():
    def trainer(**options):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((3,), dtype="int32"), keras.layers.Embedding(5, 4), keras.layers.Flatten()]
        model = keras.Sequential([*layers, keras.layers.Dense(3)])
        return tl.Trainer(model, loss="mse", optimizer="sgd", log_updates=True, **options)

    x = np.arange(24).reshape(8, 3) % 5
    plain = trainer().train_on_batch(x, Y)
    for options in ({"microbatches": 2}, {"run_eagerly": True}):
        logs = trainer(**options).train_on_batch(x, Y)
        assert logs == pytest.approx(plain, rel=1e-4)


def test_nothing_is_measured_unasked():
    logs = tl.Trainer(mlp("a"), loss="mse").train_on_batch(X, Y)
    assert list(logs) == ["loss"]


def test_what_is_measured_changes_nothing_that_trains():
    def weights(**options):
        trainer = tl.Trainer(mlp("a", "b"), tl.Freeze("a"), loss="mse", ema=0.9, clip_norm=0.1, seed=0, **options)
        trainer.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        return [np.array(v) for v in (*trainer.model.weights, *trainer.state.averages.variables)]

    for mine, theirs in zip(weights(log_updates=True), weights()):
        np.testing.assert_array_equal(mine, theirs)
