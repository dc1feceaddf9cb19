"""Features in files: there wholly or not at all, and used only while nothing that they depend on has changed."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.feature_cache import digests, storage
from tapeloop.feature_cache.digests import CacheKey
from tapeloop.feature_cache.frontier import Cut
from tests.support import recipes
from tests.support.cached import (
    BATCH,
    check_cached_run,
    frozen_base,
    images,
    trainer_of,
    watched_cache,
)
from tests.support.classifiers import classifier
from tests.support.params import params

layers = keras.layers


def fit(where, data=None, trainer=None, **options):
    options = {"batch_size": BATCH, "feature_cache": where, "verbose": 0, **options}
    return (trainer or frozen_base()).fit(data or images(), **options)


def entries(where):
    return sorted(path for path in where.iterdir() if not path.name.startswith("."))


def description_of(content):
    # The end of a file, read backwards: a digest in 64 digits, the length of the description in 8 bytes, and that.
    length = int.from_bytes(content[-72:-64], "little")
    return json.loads(content[-72 - length : -72]), content[: -72 - length]


def test_a_later_trainer_reads_what_an_earlier_one_wrote(tmp_path):
    check = functools.partial(check_cached_run, frozen_base, images, where=tmp_path, batch_size=BATCH, epochs=2)
    check()
    check(computed=[])
    assert len(entries(tmp_path)) == 1


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "another feature": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "another description": lambda content: content.replace(b'"shuffled": false', b'"shuffled": true '),
    "another length": lambda content: content[:-72] + (2**20).to_bytes(8, "little") + content[-64:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", params(DAMAGE, {"another description", "another length", "empty"}))
def test_what_is_damaged_is_named_and_computed_anew(damage, tmp_path, watched, caplog):
    fit(tmp_path)
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    damaged = DAMAGE[damage](content)
    assert damaged != content
    entry.write_bytes(damaged)
    fit(tmp_path)
    assert watched.computed == ["x"] * 2
    assert f"The feature cache in {entry} is damaged" in caplog.text
    fit(tmp_path)
    assert watched.computed == ["x"] * 2


WRITING = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from tapeloop.feature_cache.storage import Writer
from tests.support.cached import frozen_base, images
add = Writer.add
def slow(self, rows):
    add(self, rows)
    print("written", flush=True)
    time.sleep(60)
Writer.add = slow
frozen_base().fit(images(), batch_size=4, feature_cache=sys.argv[1], verbose=0)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_read(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not entries(tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    check_cached_run(frozen_base, images, where=tmp_path, batch_size=BATCH)
    assert len(entries(tmp_path)) == 1


def test_a_path_is_that_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be the path of a folder, and .* is a file"):
        fit(tmp_path / "file")
    monkeypatch.setenv("HOME", str(tmp_path))
    fit("~/features")
    assert len(entries(tmp_path / "features")) == 1


def write(writer, value=1.0, weights="1"):
    writer.add([np.full((2, 3), value, "float32"), np.arange(2, dtype="int8")])
    key = CacheKey("data", "computation", weights, "versions", "None", 1)
    return writer.finish(key, [2], [], False)


@pytest.mark.parametrize(("value", "weights"), [(1.0, "1"), (2.0, "2")], ids=["the same", "others"])
def test_two_that_write_under_one_name_at_the_same_time_both_have_what_they_wrote(value, weights, tmp_path):
    files = storage.Files(tmp_path)
    with files.writing("data-x") as one, files.writing("data-x") as other:
        kept = [write(one), write(other, value, weights)]
    for features, expected in (*zip(kept, (1.0, value)), (files.find("data-x"), value)):
        np.testing.assert_array_equal(features.arrays[0], np.full((2, 3), expected))
        np.testing.assert_array_equal(features.arrays[1], [0, 1])
    assert kept[1] is not kept[0]
    assert files.find("data-x").key.weights == weights
    assert [path.name for path in tmp_path.iterdir()] == ["data-x.features"]


def test_a_partial_file_is_removed_when_filling_it_fails(tmp_path, monkeypatch):
    def fails(self):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(Cut, "compute_several", property(fails))
    with pytest.raises(OSError, match="on fire"):
        fit(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folds_do_not_take_each_others_place(tmp_path, watched):
    (x, y), trainer = images(), frozen_base()
    for _ in range(2):
        for fold in (slice(0, 12), slice(6, 18)):
            fit(tmp_path, (x[fold], y[fold]), trainer)
    assert watched.computed == ["x"] * 2
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("change", [{"sizes": [4]}, {"tensors": []}, {"sizes": []}, {"key": {}}])
def test_a_description_that_does_not_add_up_is_damage(change, tmp_path, caplog):
    files = storage.Files(tmp_path)
    with files.writing("data-x") as writer:
        write(writer)
    (path,) = entries(tmp_path)
    description, rows = description_of(path.read_bytes())
    with open(path, "wb") as file:
        file.write(rows)
        storage.seal(file, {**description, **change})
    assert files.find("data-x") is None
    assert "is damaged" in caplog.text


def test_large_features_stay_in_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda: 100)
    check_cached_run(frozen_base, images, where=tmp_path, batch_size=BATCH, epochs=2)
    (kept,) = (storage.Files(tmp_path).find(path.stem) for path in entries(tmp_path))
    assert all(isinstance(array, np.memmap) for array in kept.arrays)


@pytest.mark.parametrize("dtype", params(["mixed_bfloat16", "mixed_float16"], {"mixed_bfloat16"}))
def test_features_of_other_precisions(dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    try:
        close = {"rtol": 2e-2, "atol": 2e-3}
        check_cached_run(frozen_base, images, where=tmp_path, batch_size=BATCH, epochs=2, **close)
    finally:
        keras.config.set_dtype_policy("float32")
    description, _ = description_of(entries(tmp_path)[0].read_bytes())
    assert dtype.removeprefix("mixed_") in {name for name, _ in description["tensors"]}


# What features depend on: each changes something of a run, and whether features that were there may be used.


def change_weight(trainer, data):
    kernel = trainer.model.get_layer("base").get_layer("conv").kernel
    kernel.assign(np.nextafter(kernel.numpy(), np.float32(9)))


def change_statistics(trainer, data):
    mean = trainer.model.get_layer("base").get_layer("bn").moving_mean
    mean.assign(mean + 1e-3)


def change_example(trainer, data):
    data[0][7, 3, 2, 1] = np.nextafter(data[0][7, 3, 2, 1], np.float32(9))


def change_target(trainer, data):
    data[1][3, 0] += 1e-6


def change_order(trainer, data):
    data[0][[0, 1]] = data[0][[1, 0]]


def change_number(trainer, data):
    return tuple(part[:-2] for part in data)


def change_dtype(trainer, data):
    return data[0].astype("float16"), data[1]


def change_nothing(trainer, data):
    return tuple(part.copy() for part in data)


def change_head(trainer, data):
    head = trainer.model.get_layer("head").kernel
    head.assign(head + 1.0)


CHANGES = [change_weight, change_statistics, change_example, change_target, change_order, change_number, change_dtype]
WITHOUT_EFFECT = [change_nothing, change_head]
SETTINGS = {
    "class_weight": ({"class_weight": {0: 2.0, 1: 1.0}}, True),
    "views": ({"feature_cache_views": 2}, True),
    "epochs": ({"epochs": 2}, False),
    "shuffle": ({"shuffle": False}, False),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    where = tmp_path_factory.mktemp("features")
    fit(where)
    return where


@hypothesis.given(change=st.sampled_from([*CHANGES, *WITHOUT_EFFECT]), kind=st.sampled_from(["path", "memory"]))
@recipes.thorough()
def test_a_hit_only_where_nothing_that_features_depend_on_has_changed(change, kind, written):
    with tempfile.TemporaryDirectory() as folder:  # one draw must not find what another has written
        where = shutil.copytree(written, f"{folder}/features") if kind == "path" else "memory"
        trainer, data = frozen_base(), images()
        fit(where, data, trainer)
        with watched_cache() as watched:
            fit(where, change(trainer, data) or data, trainer)
    assert watched.computed == ["x"] * (change in CHANGES)


@pytest.mark.parametrize("name", params(SETTINGS, {"epochs", "class_weight"}))
def test_settings_that_features_depend_on(name, tmp_path, watched):
    options, misses = SETTINGS[name]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = images()[0], np.zeros(len(images()[0]), "int64")
    for more in ({}, options):
        fit(tmp_path, data, frozen_base(loss=loss, metrics=None), **more)
    assert len(watched.computed) == 1 + misses


def test_another_computation_on_the_same_weights_is_another_cache(tmp_path, watched):
    for scale in (2.0, 3.0, 3.0):
        rescaling = layers.Rescaling(scale, name="rescaling")
        make = functools.partial(classifier, [rescaling])
        fit(tmp_path, trainer=trainer_of(make, tl.TrainOnly("head")))
    assert watched.computed == ["x"] * 2


def test_another_version_of_a_library_is_another_cache(tmp_path, watched, monkeypatch, caplog):
    fit(tmp_path)
    monkeypatch.setattr(keras, "__version__", "0.0")
    fit(tmp_path)
    assert watched.computed == ["x"] * 2
    assert "out of date (versions changed)" in caplog.text


def test_digests_tell_arrays_apart():
    zeros = np.zeros((2, 3), "float32")
    different = [zeros, zeros.T, zeros.astype("float64"), zeros + 1, (zeros, zeros), None]
    different += [np.array(["a", "b"]), np.array(["ab", ""])]
    assert len({digests.of_arrays(value) for value in different}) == len(different)
    assert digests.of_arrays(zeros) == digests.of_arrays(zeros.copy())
    large = np.zeros((2**13, 2**10), "float32")
    before = digests.of_arrays(large)
    large[-1, -1] = 1
    assert digests.of_arrays(large) != before
    assert len(digests.of_examples((zeros, np.zeros(2)))) == 2
    assert len(digests.of_examples((zeros, np.zeros(3)))) == 1


def test_free_memory_is_what_the_system_says():
    free = storage.free_memory()
    assert free == np.inf or 0 < free < 2**50


def test_a_partial_file_that_is_written_to_is_left_alone_whoever_writes(tmp_path):
    for name, age in (("now", 0), ("long ago", 2 * storage.ABANDONED_AFTER_S)):
        path = tmp_path / f".writing-{name}"
        path.write_text("")
        os.utime(path, (time.time() - age, time.time() - age))
    with storage.Files(tmp_path).writing("data-x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".writing-now"]
