"""Backbones of keras-hub under a head, with random weights; skipped unless `pip install 'tapeloop[hub]'` was run."""

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support import models
from tests.support.fitting import moved

hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")

layers = keras.layers


def bert():
    backbone = hub.models.BertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=6,
        name="backbone",
    )  # fmt: skip
    inputs = {name: keras.Input((6,), dtype="int32", name=name) for name in backbone.input}
    model = keras.Model(inputs, layers.Dense(3, name="head")(backbone(inputs)["pooled_output"]))
    tokens = np.random.default_rng(0).integers(0, 50, (16, 6))
    return model, {"token_ids": tokens, "segment_ids": np.zeros_like(tokens), "padding_mask": np.ones_like(tokens)}


def resnet():
    backbone = hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block", image_shape=(16, 16, 3),
        name="backbone",
    )  # fmt: skip
    inputs = keras.Input((16, 16, 3))
    pooled = layers.GlobalAveragePooling2D()(backbone(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="head")(pooled))
    return model, np.random.default_rng(0).random((16, 16, 16, 3), "float32")


LAST = {bert: "backbone/transformer_layer_1", resnet: "backbone/stack1*"}


def fitted(trainer, x):
    """Train for an epoch, and return the paths of the variables that have moved."""
    return moved(trainer.model, lambda: trainer.fit(x, np.arange(16) % 3, batch_size=8, verbose=0))


@pytest.mark.parametrize("make", LAST)
def test_a_backbone_is_frozen_by_its_path_and_its_end_trains_by_a_glob(make):
    model, x = make()
    trainer = tl.Trainer(model, tl.Freeze("backbone"), loss=models.cross_entropy(), optimizer=keras.optimizers.SGD(0.1))
    assert fitted(trainer, x) == {"head/kernel", "head/bias"}  # neither statistics nor the seeds of its Dropouts
    assert trainer.frontier((x, np.arange(16) % 3)).submodels == ("backbone",)
    trainer.policy = tl.TrainOnly("head", LAST[make])
    last = LAST[make].removesuffix("*")
    assert {path.startswith((last, "head/")) for path in fitted(trainer, x) if "seed" not in path} == {True}
    assert any(path.startswith(last) for path in fitted(trainer, x))


def test_a_backbone_is_named_by_the_object_inside_a_task_of_keras_hub():
    model, x = bert()
    task = hub.models.BertTextClassifier(backbone=model.get_layer("backbone"), num_classes=3, preprocessor=None)
    trainer = tl.Trainer(task, tl.Freeze(task.backbone), loss=models.cross_entropy())
    assert {path.split("/")[0] for path in fitted(trainer, x)} == {"logits", "classifier_dropout"}
