"""Runs in which a cache could go wrong, and does not."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support.cached import (
    BATCH,
    check_cached_run,
    frozen_base,
    images,
    in_batches,
    of_kind,
    trainer_of,
)
from tests.support.classifiers import Counting, classifier
from tests.support.fitting import in_threads
from tests.support.params import params
from tests.support.policies import Asked

layers = keras.layers


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.BatchNormalization(center=False, scale=False, name="bn"),
        pytest.param(lambda: Counting(name="counting"), marks=pytest.mark.slow),
    ],
)
def test_what_the_training_step_moves_is_not_cached_for_an_evaluation(layer):
    # Features are computed once, and not anew in each epoch.
    check_cached_run(
        lambda: trainer_of(lambda: classifier(behind=[layer()]), tl.TrainOnly("head")),
        images, validation_data=images(), batch_size=BATCH, epochs=3,
    )  # fmt: skip


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
    options = {"batch_size": BATCH, "shuffle": False, "epochs": 2}
    check_cached_run(lambda: frozen_base(Masked, metrics=None), masked, **options)
    with pytest.raises(tl.CacheError, match="makes one thing of the examples of a batch"):
        frozen_base(Early, metrics=None).fit(masked(), feature_cache="memory", verbose=0, **options)


def test_a_frozen_weight_that_changes_within_a_fit_is_noticed():
    def make():
        def moving(progress):
            kernel.assign(kernel * 1.5)  # by hand, while training goes on
            return tl.TrainOnly("head")

        model = classifier()
        kernel = model.get_layer("base").get_layer("conv").kernel
        return trainer_of(lambda: model, Asked(moving))

    options = {"validation_data": images(), "batch_size": BATCH, "epochs": 3}
    check_cached_run(make, images, computed=["x", "validation_data"] * 3, **options)


def test_validation_in_batches_of_any_size():
    uneven = of_kind("uneven", images())
    check_cached_run(frozen_base, images, validation_data=uneven, batch_size=BATCH, epochs=2)


@pytest.mark.parametrize("where", params(["memory", "path"], ["memory"]))
def test_trainers_in_threads_train_alike_and_share_a_folder(where, tmp_path, watched):
    def fit_twice(trainer):
        for _ in range(2):
            trainer.fit(images(), batch_size=BATCH, feature_cache=folder or "memory", verbose=0)

    folder = tmp_path if where == "path" else None
    trainers = [frozen_base() for _ in range(3)]
    in_threads([functools.partial(fit_twice, trainer) for trainer in trainers])
    assert len({trainer.model.get_layer("head").kernel.numpy().tobytes() for trainer in trainers}) == 1
    assert watched.served == ["x"] * 6
    assert len(list(tmp_path.iterdir())) == (where == "path")


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


@pytest.mark.parametrize("where", params(["memory", "path"], ["memory"]))
def test_a_pydataset_that_changes_after_its_features_were_computed_is_noticed(where, tmp_path):
    trainer = frozen_base()
    where = tmp_path if where == "path" else where
    with pytest.raises(tl.CacheError, match=r"`x` has changed since its features were computed: batch \d has other"):
        trainer.fit(Drifting(still=2), epochs=6, feature_cache=where, verbose=0, shuffle=False)
    assert trainer.epoch == 1
    still = Drifting(still=99)
    frozen_base().fit(still, epochs=4, feature_cache="memory", verbose=0)
    assert still.ended == 2 + 3  # two passes for the features, then a look in each epoch


def test_a_list_that_changes_after_its_features_were_computed_is_noticed():
    batches = in_batches(images(16))

    def changing(progress):
        if progress.epoch == 2:
            for _, targets in batches:
                targets += 1.0
        return tl.Freeze("base")

    trainer = trainer_of(classifier, Asked(changing))
    with pytest.raises(tl.CacheError, match="has changed since its features were computed"):
        trainer.fit(batches, epochs=5, feature_cache="memory", verbose=0)
    assert trainer.epoch == 2


def test_a_list_with_class_weights_is_looked_at_with_them(watched):
    batches = in_batches((images(16)[0], np.arange(16) % 2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"class_weight": {0: 2.0}, "feature_cache": "memory", "verbose": 0}
    frozen_base(loss=loss, metrics=None).fit(batches, epochs=3, **options)
    assert watched.served == ["x"] * 3


def test_a_list_in_another_order_is_another_cache(watched, caplog):
    trainer, batches = frozen_base(), in_batches(images(16))
    for data in (batches, [*batches], batches[::-1]):
        trainer.fit(data, feature_cache="memory", verbose=0)
    assert watched.computed == ["x"] * 2
    assert "out of date (the order of the data changed)" in caplog.text
