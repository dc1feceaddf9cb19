"""Files of Keras and of TensorFlow, and those of what trains alone."""

import random

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.checkpoint.contents import RunContents
from tests.support import models, runs
from tests.support.fitting import refused

layers = keras.layers


def trainer_of(seed, policy=None, **options):
    keras.utils.set_random_seed(seed)
    base = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="dense"), layers.BatchNormalization(name="norm")])
    base.name = "base"
    inputs = keras.Input((4,))
    hidden = layers.BatchNormalization(name="norm")(base(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="head", **options)(hidden))
    return tl.Trainer(model, policy or tl.Freeze("base"), loss="mse")


def fitted(trainer):
    trainer.fit((runs.X, runs.Y), batch_size=4, verbose=0)
    return trainer


# Keras 3.10 warns of it for a model that it has loaded itself.
@pytest.mark.filterwarnings("ignore:(.|\\n)*The structure of `inputs` doesn't match:UserWarning")
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_keras_reads_what_is_written_for_it_and_the_trainer_reads_it_back(tmp_path, name):
    trainer = fitted(trainer_of(0))
    trainer.save(tmp_path / "new" / name)
    other = trainer_of(1)
    other.load(tmp_path / "new" / name)
    assert models.values(other.model) == models.values(trainer.model)
    if name.endswith(".keras"):
        loaded = keras.models.load_model(tmp_path / "new" / name)
        np.testing.assert_array_equal(loaded(runs.X), trainer.model(runs.X))


@pytest.mark.parametrize("named", [False, True])
def test_a_plain_checkpoint_of_tensorflow_is_loaded(tmp_path, named):
    trainer = fitted(trainer_of(0))
    plain = tf.train.Checkpoint(model=trainer.model) if named else tf.train.Checkpoint(trainer.model)
    prefix = plain.save(str(tmp_path / "plain"))
    other = trainer_of(1)
    other.load(prefix)
    # TensorFlow's checkpoints hold no seeds.
    assert models.values(other.model) == models.values(trainer.model)


def test_weights_of_another_model_are_refused(tmp_path):
    keras_file, prefix = tmp_path / "other.weights.h5", str(tmp_path / "plain")
    other = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="head")])
    other.save_weights(keras_file)
    prefix = tf.train.Checkpoint(other).save(prefix)
    trainer = trainer_of(0)
    with refused(trainer.model, tl.CheckpointError, "Keras cannot read"):
        trainer.load(keras_file)
    with refused(trainer.model, tl.CheckpointError, "has not all the weights of the model"):
        trainer.load(prefix)
    pair = tl.Trainer({"a": other}, loss="mse")
    for call, path in ((pair.load, keras_file), (pair.load, prefix), (pair.save, tmp_path / "pair.keras")):
        with pytest.raises(tl.CheckpointError, match=r"and the trainer has a dict|Only a Keras model"):
            call(path)


def test_what_trains_goes_onto_a_fresh_backbone(tmp_path):
    trainer = fitted(trainer_of(0))
    trainer.save_trained(tmp_path / "head.h5")
    fresh = trainer_of(0)
    fresh.load_trained(tmp_path / "head.h5")
    # The statistics of a layer that trains belong to it.
    assert models.values(fresh.model) == models.values(trainer.model)
    assert (tmp_path / "head.h5").stat().st_size < 20_000


def test_another_backbone_is_refused_unless_the_user_says_so(tmp_path):
    trainer = fitted(trainer_of(0))
    trainer.save_trained(tmp_path / "head.h5")
    other = trainer_of(1)
    with refused(other.model, tl.CheckpointError, "was trained beside other weights"):
        other.load_trained(tmp_path / "head.h5")
    other.load_trained(tmp_path / "head.h5", strict=False)
    assert models.values(other.model, "head") == models.values(trainer.model, "head")


def test_what_trains_keeps_its_types(tmp_path):
    trainer = trainer_of(0, dtype=keras.dtype_policies.DTypePolicy("bfloat16"))
    trainer.save_trained(tmp_path / "head.h5")
    other = trainer_of(1, dtype=keras.dtype_policies.DTypePolicy("bfloat16"))
    other.load_trained(tmp_path / "head.h5", strict=False)
    assert models.values(other.model, "head") == models.values(trainer.model, "head")


def test_a_file_of_another_head_or_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "head.h5"
    trainer_of(0, tl.TrainOnly("head")).save_trained(path)
    small = tl.Trainer(keras.Sequential([keras.Input((4,)), layers.Dense(2, name="head")]), loss="mse")
    with refused(small.model, tl.CheckpointError, "which has other shapes for `head/bias`, `head/kernel`"):
        small.load_trained(path)
    other = tl.Trainer(keras.Sequential([keras.Input((4,)), layers.Dense(2, name="top")]), loss="mse")
    with refused(other.model, tl.CheckpointError, "which has no `head/bias`, `head/kernel`"):
        other.load_trained(path)
    with pytest.raises(tl.CheckpointError, match=r"none.h5 does not exist"):
        trainer_of(0).load_trained(tmp_path / "none.h5")


def test_a_flipped_byte_is_noticed_or_changes_nothing(tmp_path):
    path, trainer = tmp_path / "head.h5", fitted(trainer_of(0))
    trainer.save_trained(path)
    content, noticed = path.read_bytes(), []
    fresh = trainer_of(0)
    for place in random.Random(0).sample(range(len(content)), 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            fresh.load_trained(path)
        except tl.CheckpointError as error:
            noticed.append(str(error))
        else:  # between the parts of the file
            assert models.values(fresh.model) == models.values(trainer.model)
    assert noticed
    assert all(any(why in said for why in ("damaged", "other weights", "another model")) for said in noticed)


def test_a_run_that_was_saved_before_the_steps_of_epochs_were_recorded_is_read(tmp_path, monkeypatch):
    trainer, other = (tl.Trainer(models.blocks(1), loss="mse") for _ in range(2))
    trainer.history.add_epoch(1, 5, {"loss": 1.0})
    trainer.save(tmp_path / "new")
    record = RunContents.record

    def older(*args):
        said = record(*args)
        del said["history"]["step"]
        return said

    monkeypatch.setattr(RunContents, "record", older)
    trainer.save(tmp_path / "old")
    for name, steps in (("new", [5]), ("old", [])):
        other.load(tmp_path / name)
        assert (other.history.epoch, other.history.step) == ([1], steps)


def test_an_adapter_of_keras_is_saved_without_the_weights_that_it_adapts(tmp_path):
    def trainer(seed):
        keras.utils.set_random_seed(seed)
        base = layers.Dense(6, name="base")
        model = keras.Sequential([keras.Input((4,)), base, layers.BatchNormalization(name="norm"), layers.Dense(3)])
        model.layers[-1].name = "head"
        base.enable_lora(2)
        return tl.Trainer(model, tl.TrainOnly("head", "norm", "**/lora_kernel_*"), loss="mse")

    trained, fresh = fitted(trainer(0)), trainer(0)
    trained.save_trained(tmp_path / "adapter.h5")
    with h5py.File(tmp_path / "adapter.h5") as file:
        saved = []
        file.visititems(lambda name, one: saved.append(name) if isinstance(one, h5py.Dataset) else None)
    assert sorted(saved) == sorted(
        ["base/lora_kernel_a", "base/lora_kernel_b", "head/kernel", "head/bias"]
        + [f"norm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    )
    fresh.load_trained(tmp_path / "adapter.h5")
    np.testing.assert_array_equal(fresh.predict(runs.X), trained.predict(runs.X))
    with pytest.raises(tl.CheckpointError, match="was trained beside other weights"):
        trainer(1).load_trained(tmp_path / "adapter.h5")
