"""A cached run is the run without the cache, and is refused if it would not be."""

import functools
import os
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
    check_cached_run,
    check_same,
    frozen_base,
    images,
    of_kind,
    regularized,
    trainer_of,
)
from tests.support.classifiers import classifier
from tests.support.fitting import refused, state
from tests.support.params import params

layers = keras.layers


# Variants of the rest, as far as the cache goes: `make test-all` runs them.
SLOW = {"around", "attention", "embedding", "recurrent", "regularized", "subclassed", "two inputs", "weights"}


@pytest.mark.parametrize("name", params(MODELS, SLOW))
def test_a_cached_run_is_the_run_without_the_cache(name):
    make, policy, data, kind = MODELS[name]
    options = {} if kind is TwoSteps else {"validation_data": data()}
    make_trainer = functools.partial(trainer_of, make, policy, kind)
    (trainer, _), (plain, _) = check_cached_run(make_trainer, data, batch_size=BATCH, epochs=3, **options)
    assert trainer.trace_count == plain.trace_count


@pytest.mark.parametrize("kind", params(["dataset", "list", "uneven", "pydataset"], ["dataset", "list"]))
def test_data_of_any_kind_comes_in_its_own_order(kind):
    check_cached_run(frozen_base, lambda: of_kind(kind, images()), epochs=3)


def test_a_dataset_that_shuffles_is_shuffled_anew_each_epoch(watched):
    class Recording(tl.Trainer):
        def compute_loss(self, batch, training):
            self.seen.assign_add(tf.reduce_sum(batch[1][:, 0]) * tf.cast(self.at + 1, tf.float32))
            self.at.assign_add(1)
            return super().compute_loss(batch, training)

    trainer = frozen_base(Recording)
    trainer.seen, trainer.at = tf.Variable(0.0), tf.Variable(0)
    sums = set()
    for _ in range(3):
        trainer.seen.assign(0.0)
        trainer.at.assign(0)
        trainer.fit(of_kind("shuffled", images()), feature_cache="memory", verbose=0)
        sums.add(float(trainer.seen))
        assert int(trainer.at) == 6
    assert len(sums) == 3
    assert watched.computed == ["x"]  # the examples are the same
    assert watched.served == ["x"] * 3


def test_features_last_from_fit_to_fit_until_a_frozen_weight_changes(watched, caplog):
    trainer = frozen_base()
    fit = functools.partial(trainer.fit, images(), batch_size=BATCH, feature_cache="memory", verbose=0)
    fit()
    fit()
    assert watched.computed == ["x"]
    kernel = trainer.model.get_layer("base").get_layer("conv").kernel
    changed = kernel.numpy()
    changed[0, 0, 0, 0] += 1e-6
    kernel.assign(changed)
    fit()
    assert watched.computed == ["x"] * 2
    assert "out of date (weights changed)" in caplog.text


def test_phases_have_caches_of_their_own_and_none_where_all_trains(caplog):
    head, both = tl.TrainOnly("head"), tl.TrainOnly("middle", "head")
    make = functools.partial(trainer_of, regularized, tl.Phases({0: head, 1: both, 2: tl.TrainAll(), 3: head}))
    three = ["x"] * 3
    check_cached_run(make, images, batch_size=BATCH, epochs=4, computed=three, served=three)
    assert "`base/conv/kernel` trains and comes first. The cache is dropped." in caplog.text


REFUSED = {
    "all": ([], tl.TrainAll(), {}, "nothing can be cached: `base/conv/kernel` trains and comes first"),
    "random": (
        [layers.RandomFlip(name="flip")], tl.TrainOnly("head"), {},
        "nothing can be cached: `flip` is random and comes first.* `feature_cache_views=n` caches n passes",
    ),
    "steps": ([], tl.Cycle([tl.TrainOnly("head"), tl.Freeze("base")], every=2), {}, "after every 2 steps"),
    "steps_per_epoch": ([], tl.Freeze("base"), {"steps_per_epoch": 2}, "leave `steps_per_epoch` out"),
    "views": ([], tl.Freeze("base"), {"feature_cache": None, "feature_cache_views": 2}, "there is no cache"),
    "zero": ([], tl.Freeze("base"), {"feature_cache_views": 0}, "feature_cache_views"),
    "kind": ([], tl.Freeze("base"), {"feature_cache": 3}, 'must be None, "memory" or a path'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused_before_anything_moves(name):
    before, policy, options, said = REFUSED[name]
    trainer = trainer_of(lambda: classifier(before), policy)
    with refused(trainer, (tl.CacheError, ValueError, TypeError), said):
        trainer.fit(images(), batch_size=BATCH, verbose=0, **{"feature_cache": "memory", **options})


@pytest.mark.parametrize("options", [{"microbatches": 2}, {"microbatches": "auto"}, {"run_eagerly": True}], ids=str)
def test_options_that_do_not_go_with_a_cache(options):
    with pytest.raises(ValueError, match="`feature_cache` "):
        frozen_base(**options).fit(images(), feature_cache="memory", verbose=0)


def test_data_that_differs_from_pass_to_pass_is_refused():
    generator = np.random.default_rng(0)

    class Random:
        def __iter__(self):
            for _ in range(3):
                yield generator.normal(size=(4, 16, 16, 3)).astype("float32"), np.zeros((4, 2), "float32")

    for data, said in ((Random(), "when it is gone through again: 12 of 12 are new"), (iter(Random()), "an iterator")):
        with pytest.raises(tl.CacheError, match=said):
            frozen_base().fit(data, feature_cache="memory", verbose=0)


def test_features_that_differ_in_shape_are_refused():
    inputs = keras.Input((None, 3))
    x = layers.Dense(4, name="base")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(2, name="head")(x)))
    given = [(np.zeros((4, length, 3), "float32"), np.zeros((4, 2), "float32")) for length in (5, 6)]
    with pytest.raises(tl.CacheError, match="need one row for each, of the shapes"):
        trainer_of(lambda: model, tl.Freeze("base")).fit(given, feature_cache="memory", verbose=0)


@pytest.mark.parametrize("where", ["memory", "path"])
def test_what_would_not_fit_is_found_before_it_is_filled(where, tmp_path, monkeypatch, watched):
    monkeypatch.setattr(storage, "free_memory", lambda: 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    cache = where if where == "memory" else tmp_path / "cache"
    said = r"22 examples of `x`, 24 bytes each, come to 528 bytes, and .* 100 bytes"
    with pytest.raises(tl.CacheError, match=said):
        frozen_base().fit(images(), feature_cache=cache, verbose=0)
    assert not watched.computed
    assert not os.listdir(tmp_path)


def test_views_are_passes_that_come_in_turn(watched):
    class Noting(tl.Trainer):
        def compute_loss(self, batch, training):
            outputs = self.forward(batch[0], training)
            return tf.reduce_mean(outputs**2), {"output": tf.reduce_mean(outputs)}

    model = classifier([layers.RandomBrightness(0.9, seed=0, name="b")])
    trainer = Noting(model, tl.TrainOnly("head"), optimizer=keras.optimizers.SGD(0.0))
    options = {"feature_cache": "memory", "feature_cache_views": 2, "batch_size": BATCH, "verbose": 0}
    outputs = trainer.fit(images(), epochs=4, **options).history["output"]
    assert outputs[:2] == pytest.approx(outputs[2:], rel=1e-5)
    assert outputs[0] != pytest.approx(outputs[1], rel=1e-3)
    assert watched.served == ["x"] * 4


def test_the_model_and_evaluation_are_as_without_a_cache(tmp_path):
    (trainer, _), (plain, _) = check_cached_run(frozen_base, images, where=tmp_path, batch_size=BATCH)
    np.testing.assert_allclose(trainer.predict(images()[0]), plain.predict(images()[0]), rtol=1e-5, atol=1e-6)
    logs, expected = (each.evaluate(images(), verbose=0) for each in (trainer, plain))
    assert logs == pytest.approx(expected, rel=1e-5)


def test_the_report_of_a_frontier():
    trainer = frozen_base()
    before = state(trainer)
    found = trainer.frontier(images(), batch_size=BATCH)
    assert found
    assert (found.submodels, found.bytes_per_example, found.examples, found.bytes) == (("base",), 24, N, 24 * N)
    assert 0 < found.share < 1
    said = "Before the frontier: `base`\nFeatures: 24 bytes an example, 528 bytes for 22 examples\n"
    assert str(found).startswith(said)
    assert state(trainer) == before
    assert trainer.frontier(of_kind("dataset", images())).examples == 24  # at most
    none = trainer_of(classifier, tl.TrainAll()).frontier(images())
    assert not none
    assert none.bytes is None
    assert str(none) == "There is no frontier: `base/conv/kernel` trains and comes first."


def test_measuring_a_frontier_leaves_statistics_seeds_and_metrics_as_they_were():
    trainer, other = (trainer_of(Subclassed, tl.Freeze("base")) for _ in range(2))
    for each in (trainer, other):
        each.fit(images(), batch_size=BATCH, verbose=0)
    trainer.frontier(images(), batch_size=BATCH)
    check_same(*[(each, each.fit(images(), batch_size=BATCH, verbose=0).history) for each in (trainer, other)])


def test_arrays_in_files_are_cached_too(tmp_path):
    x, y = images()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    check_cached_run(frozen_base, lambda: (mapped, y), batch_size=BATCH, epochs=2)


@pytest.mark.parametrize("shuffle", [False, True])
def test_sparse_inputs_are_cached_in_the_order_they_come(shuffle):
    x, y = images()
    sparse = tf.sparse.from_dense(tf.where(x[:, 0, :, 0] > 0, x[:, 0, :, 0], 0))

    def model():
        inputs = keras.Input((16,), sparse=True)
        return keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(4, "relu", name="base")(inputs)))

    make = functools.partial(trainer_of, model, tl.Freeze("base"))
    check_cached_run(make, lambda: (sparse, y), batch_size=BATCH, shuffle=shuffle, epochs=2)
