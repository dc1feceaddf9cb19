"""Runs in which a cache could go wrong, and does not."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.cached import BATCH, check_same, images, of_kind, spy, trainer_of
from tests.support.classifiers import classifier

layers = keras.layers


class Counting(layers.Layer):
    """A layer that the training step moves, and an evaluation does not."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), trainable=False, initializer="zeros", name="count")

    def call(self, inputs, training=False):
        if training:
            self.count.assign_add(1.0)
        return inputs * (1.0 + self.count)


@pytest.mark.parametrize(
    "layer",
    [lambda: layers.BatchNormalization(center=False, scale=False, name="bn"), lambda: Counting(name="counting")],
)
def test_what_the_training_step_moves_is_not_cached_for_an_evaluation(layer, monkeypatch):
    computed, runs = spy(monkeypatch), []
    for cache in ("memory", None):
        trainer = trainer_of(lambda: classifier(behind=[layer()]), tl.TrainOnly("head"))
        options = {"validation_data": images(), "feature_cache": cache, "progress": "none"}
        runs.append((trainer, trainer.fit(images(), batch_size=BATCH, epochs=3, **options).history))
    check_same(*runs)
    assert computed == ["data", "validation_data"]  # and not anew in each epoch


class Masked(tl.Trainer):
    """Examples without a target are left out: of the loss, or before the model."""

    early = False

    def compute_loss(self, batch, training):
        x, y = batch
        there = tf.math.is_finite(y[:, 0])
        if self.early:
            x, y = x[there], y[there]
        outputs = self.forward(x, training)
        if not self.early:
            outputs, y = outputs[there], y[there]
        count = tf.cast(tf.shape(tf.where(there))[0], tf.float32)
        return tf.reduce_sum((outputs - y) ** 2) / count


class Early(Masked):
    early = True


def masked():
    x, y = images()
    y[[9, 14, 17]] = np.nan  # none in the first batch
    return x, y


def test_masks_that_leave_examples_out():
    options = {"batch_size": BATCH, "shuffle": False, "epochs": 2, "progress": "none"}
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(classifier, tl.Freeze("base"), Masked, metrics=None)
        runs.append((trainer, trainer.fit(masked(), feature_cache=cache, **options).history))
    check_same(*runs)
    with pytest.raises(tl.CacheError, match="makes one thing of the examples of a batch"):
        trainer_of(classifier, tl.Freeze("base"), Early, metrics=None).fit(masked(), feature_cache="memory", **options)


class Moving(tl.VariablePolicy):
    """Frozen weights are set by hand while training goes on."""

    def __init__(self, model):
        self.kernel = model.get_layer("base").get_layer("conv").kernel

    def group(self, variable):
        return "default" if variable.path.startswith("head") else None

    def at(self, progress):
        self.kernel.assign(self.kernel * 1.5)
        return self


def test_a_frozen_weight_that_changes_within_a_fit_is_noticed():
    runs = []
    for cache in ("memory", None):
        keras.utils.set_random_seed(0)
        model = classifier()
        trainer = tl.Trainer(model, Moving(model), loss="mse", optimizer="adam", seed=1)
        options = {"validation_data": images(), "feature_cache": cache, "progress": "none"}
        runs.append((trainer, trainer.fit(images(), batch_size=BATCH, epochs=3, **options).history))
    check_same(*runs)


def test_validation_in_batches_of_any_size():
    runs = []
    for cache in ("memory", None):
        trainer = trainer_of(classifier, tl.Freeze("base"))
        options = {"validation_data": of_kind("uneven", images()), "feature_cache": cache, "progress": "none"}
        runs.append((trainer, trainer.fit(images(), batch_size=BATCH, epochs=2, **options).history))
    check_same(*runs)


def test_trainers_in_threads():
    trainers = [trainer_of(classifier, tl.Freeze("base")) for _ in range(3)]
    failures = []

    def run(trainer):
        try:
            trainer.fit(images(), batch_size=BATCH, epochs=2, feature_cache="memory", progress="none")
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({trainer.model.get_layer("head").kernel.numpy().tobytes() for trainer in trainers}) == 1


class Drifting(keras.utils.PyDataset):
    """Draws other targets at the end of each epoch, but for the first few."""

    def __init__(self, still):
        super().__init__()
        self.x, self.y = images()
        self.still, self.begun, self.ended = still, 0, 0

    def __len__(self):
        return 4

    def __getitem__(self, number):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        return self.x[rows], self.y[rows]

    def on_epoch_begin(self):
        self.begun += 1

    def on_epoch_end(self):
        self.ended += 1
        if self.ended >= self.still:
            self.y = self.y + 1.0


@pytest.mark.parametrize("where", ["memory", "path"])
def test_a_pydataset_that_changes_after_its_features_were_computed_is_noticed(where, tmp_path):
    trainer = trainer_of(classifier, tl.Freeze("base"))
    where = tmp_path if where == "path" else where
    with pytest.raises(tl.CacheError, match=r"`data` has changed since its features were computed: batch \d has other"):
        trainer.fit(Drifting(still=2), epochs=6, feature_cache=where, progress="none", shuffle=False)
    assert trainer.epoch == 1
    still = Drifting(still=99)
    trainer_of(classifier, tl.Freeze("base")).fit(still, epochs=4, feature_cache="memory", progress="none")
    assert still.ended == 2 + 3  # two passes for the features, then a look in each epoch


def test_a_list_that_changes_after_its_features_were_computed_is_noticed():
    x, y = images()
    batches = [(x[start : start + BATCH], y[start : start + BATCH].copy()) for start in range(0, 16, BATCH)]

    class Changes(tl.VariablePolicy):
        def at(self, progress):
            if progress.epoch == 2:
                for _, targets in batches:
                    targets += 1.0
            return tl.Freeze("base")

    trainer = trainer_of(classifier, Changes())
    with pytest.raises(tl.CacheError, match="has changed since its features were computed"):
        trainer.fit(batches, epochs=5, feature_cache="memory", progress="none")
    assert trainer.epoch == 2


def test_a_list_with_class_weights_is_looked_at_with_them():
    x, _ = images(16)
    batches = [(x[start : start + BATCH], np.arange(4) % 2) for start in range(0, 16, BATCH)]
    make = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": None}
    trainer = trainer_of(classifier, tl.Freeze("base"), **make)
    trainer.fit(batches, epochs=3, class_weight={0: 2.0}, feature_cache="memory", progress="none")
    assert trainer.epoch == 3
