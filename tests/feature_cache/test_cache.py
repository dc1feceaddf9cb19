"""A cached run is the run without the cache, and where it would not be, it is refused."""

import logging
import os
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.feature_cache import storage
from tests.support.cached import (
    BATCH,
    MODELS,
    N,
    Subclassed,
    TwoSteps,
    check_same,
    images,
    of_kind,
    spy,
    trainer_of,
    weights,
)
from tests.support.classifiers import classifier

layers = keras.layers


@pytest.mark.parametrize("name", MODELS)
def test_a_cached_run_is_the_run_without_the_cache(name):
    make, policy, data, kind = MODELS[name]
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(make, policy, kind)
        options = {} if kind is TwoSteps else {"validation_data": data()}
        history = trainer.fit(
            data(), batch_size=BATCH, epochs=3, feature_cache=cache, progress="none", **options
        ).history
        runs.append((trainer, history))
    check_same(*runs)
    assert runs[0][0].trace_count == runs[1][0].trace_count


@pytest.mark.parametrize("kind", ["dataset", "list", "uneven", "pydataset"])
def test_data_of_any_kind_comes_in_its_own_order(kind):
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(classifier, tl.Freeze("base"))
        given = of_kind(kind, images())
        history = trainer.fit(given, epochs=3, feature_cache=cache, progress="none").history
        runs.append((trainer, history))
    check_same(*runs)


def test_a_dataset_that_shuffles_is_shuffled_anew_each_epoch():
    class Recording(tl.Trainer):
        def compute_loss(self, batch, training):
            self.seen.assign_add(tf.reduce_sum(batch[1][:, 0]) * tf.cast(self.at + 1, tf.float32))
            self.at.assign_add(1)
            return super().compute_loss(batch, training)

    sums = []
    x, y = images()
    for _ in range(1):
        trainer = Recording(classifier(), tl.Freeze("base"), loss="mse", optimizer="sgd", seed=1)
        trainer.seen, trainer.at = tf.Variable(0.0), tf.Variable(0)
        for _ in range(3):
            trainer.seen.assign(0.0)
            trainer.at.assign(0)
            trainer.fit(of_kind("shuffled", (x, y)), feature_cache="memory", progress="none")
            sums.append(float(trainer.seen))
            assert int(trainer.at) == 6
    assert len(set(sums)) == 3


def test_features_last_from_fit_to_fit_until_a_frozen_weight_changes(monkeypatch, caplog):
    computed = spy(monkeypatch)
    trainer = trainer_of(classifier, tl.Freeze("base"))
    fit = lambda: trainer.fit(images(), batch_size=BATCH, feature_cache="memory", progress="none")  # noqa: E731
    fit()
    fit()
    assert computed == ["data"]
    kernel = trainer.model.get_layer("base").get_layer("conv").kernel
    changed = kernel.numpy()
    changed[0, 0, 0, 0] += 1e-6
    kernel.assign(changed)
    with caplog.at_level(logging.WARNING, "tapeloop"):
        fit()
    assert computed == ["data"] * 2
    assert "out of date (weights changed)" in caplog.text


def test_phases_have_caches_of_their_own_and_none_where_all_trains(monkeypatch, caplog):
    computed = spy(monkeypatch)
    policy = tl.Phases(
        {0: tl.TrainOnly("head"), 1: tl.TrainOnly("middle", "head"), 2: tl.TrainAll(), 3: tl.TrainOnly("head")}
    )
    make = lambda: classifier(behind=[layers.Dense(6, "relu", name="middle")])  # noqa: E731
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(make, policy)
        with caplog.at_level(logging.WARNING, "tapeloop"):
            history = trainer.fit(images(), batch_size=BATCH, epochs=4, feature_cache=cache, progress="none").history
        runs.append((trainer, history))
    check_same(*runs)
    assert computed == ["data"] * 3
    assert "`base/conv/kernel` trains and comes first. The cache is dropped." in caplog.text


REFUSED = {
    "all": (classifier, tl.TrainAll(), {}, "nothing can be cached: `base/conv/kernel` trains and comes first"),
    "random": (
        lambda: classifier([layers.RandomFlip(name="flip")]), tl.TrainOnly("head"), {},
        "nothing can be cached: `flip` is random and comes first.* `feature_cache_views=n` caches n passes",
    ),
    "steps": (classifier, tl.Cycle([tl.TrainOnly("head"), tl.Freeze("base")], every=2), {}, "after every 2 steps"),
    "steps_per_epoch": (classifier, tl.Freeze("base"), {"steps_per_epoch": 2}, "leave `steps_per_epoch` out"),
    "views": (classifier, tl.Freeze("base"), {"feature_cache": None, "feature_cache_views": 2}, "there is no cache"),
    "zero": (classifier, tl.Freeze("base"), {"feature_cache_views": 0}, "feature_cache_views"),
    "kind": (classifier, tl.Freeze("base"), {"feature_cache": 3}, 'must be None, "memory" or a path'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused_before_anything_moves(name):
    make, policy, options, said = REFUSED[name]
    trainer = trainer_of(make, policy)
    before = {path: value.tobytes() for path, value in weights(trainer).items()}
    with pytest.raises((tl.CacheError, ValueError, TypeError), match=said):
        trainer.fit(images(), batch_size=BATCH, progress="none", **{"feature_cache": "memory", **options})
    assert {path: value.tobytes() for path, value in weights(trainer).items()} == before
    assert trainer.step == 0


@pytest.mark.parametrize("options", [{"microbatches": 2}, {"microbatches": "auto"}, {"run_eagerly": True}], ids=str)
def test_options_that_do_not_go_with_a_cache(options):
    with pytest.raises(ValueError, match="`feature_cache` "):
        trainer_of(classifier, tl.Freeze("base"), **options).fit(images(), feature_cache="memory", progress="none")


def test_data_that_differs_from_pass_to_pass_is_refused():
    generator = np.random.default_rng(0)

    class Random:
        def __iter__(self):
            for _ in range(3):
                yield generator.normal(size=(4, 16, 16, 3)).astype("float32"), np.zeros((4, 2), "float32")

    trainer = trainer_of(classifier, tl.Freeze("base"))
    with pytest.raises(tl.CacheError, match="gives other examples when it is gone through again: 12 of 12 are new"):
        trainer.fit(Random(), feature_cache="memory", progress="none")
    with pytest.raises(tl.CacheError, match="is an iterator"):
        trainer.fit(iter(Random()), feature_cache="memory", progress="none")


def test_features_that_differ_in_shape_are_refused():
    inputs = keras.Input((None, 3))
    x = layers.Dense(4, name="base")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(2, name="head")(x)))
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="sgd")
    given = [(np.zeros((4, length, 3), "float32"), np.zeros((4, 2), "float32")) for length in (5, 6)]
    with pytest.raises(tl.CacheError, match="need one row for each, of the shapes"):
        trainer.fit(given, feature_cache="memory", progress="none")


@pytest.mark.parametrize("where", ["memory", "path"])
def test_what_would_not_fit_is_found_before_it_is_filled(where, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda: 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    computed = spy(monkeypatch)
    cache = where if where == "memory" else tmp_path / "cache"
    with pytest.raises(
        tl.CacheError, match=r"22 examples of `data`, 24 bytes each, come to 528 bytes, and .* 100 bytes"
    ):
        trainer_of(classifier, tl.Freeze("base")).fit(images(), feature_cache=cache, progress="none")
    assert not computed
    assert not os.listdir(tmp_path)


def test_views_are_passes_that_come_in_turn(monkeypatch):
    class Noting(tl.Trainer):
        def compute_loss(self, batch, training):
            outputs = self.forward(batch[0], training)
            return tf.reduce_mean(outputs**2), {"output": tf.reduce_mean(outputs)}

    keras.utils.set_random_seed(0)
    trainer = Noting(
        classifier([layers.RandomBrightness(0.9, seed=0, name="b")]),
        tl.TrainOnly("head"),
        optimizer=keras.optimizers.SGD(0.0),
    )
    options = {"feature_cache": "memory", "feature_cache_views": 2, "batch_size": BATCH, "progress": "none"}
    first = trainer.fit(images(), epochs=4, **options).history["output"]
    assert first[0] == pytest.approx(first[2], rel=1e-5)
    assert first[1] == pytest.approx(first[3], rel=1e-5)
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_the_model_and_evaluation_are_as_without_a_cache(tmp_path):
    trainer, plain = (trainer_of(classifier, tl.Freeze("base")) for _ in range(2))
    trainer.fit(images(), batch_size=BATCH, feature_cache=tmp_path, progress="none")
    plain.fit(images(), batch_size=BATCH, progress="none")
    x, _ = images()
    np.testing.assert_allclose(trainer.predict(x), plain.predict(x), rtol=1e-5, atol=1e-6)
    assert trainer.evaluate(images(), progress="none") == pytest.approx(
        plain.evaluate(images(), progress="none"), rel=1e-5
    )
    assert pathlib.Path(tmp_path).is_dir()


def test_the_report_of_a_frontier():
    trainer = trainer_of(classifier, tl.Freeze("base"))
    before = {path: value.tobytes() for path, value in weights(trainer).items()}
    found = trainer.frontier(images(), batch_size=BATCH)
    assert found
    assert (found.submodels, found.bytes_per_example, found.examples, found.bytes) == (("base",), 24, N, 24 * N)
    assert 0 < found.share < 1
    assert str(found).startswith(
        "Before the frontier: `base`\nFeatures: 24 bytes an example, 528 bytes for 22 examples\n"
    )
    assert {path: value.tobytes() for path, value in weights(trainer).items()} == before
    assert trainer.step == 0
    dataset = trainer.frontier(of_kind("dataset", images()))
    assert dataset.examples == 24  # at most
    none = trainer_of(classifier, tl.TrainAll()).frontier(images())
    assert not none
    assert none.bytes is None
    assert str(none) == "There is no frontier: `base/conv/kernel` trains and comes first."


def test_measuring_a_frontier_leaves_statistics_seeds_and_metrics_as_they_were():
    trainer, other = (trainer_of(Subclassed, tl.Freeze("base")) for _ in range(2))
    for each in (trainer, other):
        each.fit(images(), batch_size=BATCH, progress="none")
    trainer.frontier(images(), batch_size=BATCH)
    runs = [(each, each.fit(images(), batch_size=BATCH, progress="none").history) for each in (trainer, other)]
    check_same(*runs)


def test_arrays_in_files_are_cached_too(tmp_path):
    x, y = images()
    np.save(tmp_path / "x.npy", x)
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(classifier, tl.Freeze("base"))
        given = np.load(tmp_path / "x.npy", mmap_mode="r"), y
        history = trainer.fit(given, batch_size=BATCH, epochs=2, feature_cache=cache, progress="none").history
        runs.append((trainer, history))
    check_same(*runs)


@pytest.mark.parametrize("shuffle", [False, True])
def test_sparse_inputs_are_cached_in_the_order_they_come(shuffle):
    x, y = images()
    sparse = tf.sparse.from_dense(tf.where(x[:, 0, :, 0] > 0, x[:, 0, :, 0], 0))
    runs = []
    for cache in ("memory", None):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((16,), sparse=True)
        model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(4, "relu", name="base")(inputs)))
        trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="adam", seed=1)
        options = {"batch_size": BATCH, "shuffle": shuffle, "epochs": 2, "progress": "none"}
        runs.append((trainer, trainer.fit((sparse, y), feature_cache=cache, **options).history))
    check_same(*runs)
