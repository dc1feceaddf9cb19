"""Features in files: there wholly or not at all, and only while nothing that went into them has changed."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

import tapeloop as tl
from tapeloop.feature_cache import fingerprint, storage
from tapeloop.feature_cache.frontier import Cut
from tests.support.cached import BATCH, images, spy, trainer_of, weights
from tests.support.classifiers import classifier


def fit(trainer, where, data=None, **options):
    return trainer.fit(data or images(), batch_size=BATCH, feature_cache=where, progress="none", **options)


def entries(where):
    return sorted(path for path in where.iterdir() if not path.name.startswith("."))


def test_a_later_trainer_reads_what_an_earlier_one_wrote(tmp_path, monkeypatch):
    computed = spy(monkeypatch)
    first, second, plain = (trainer_of(classifier, tl.Freeze("base")) for _ in range(3))
    fit(first, tmp_path, epochs=2)
    fit(second, tmp_path, epochs=2)
    plain.fit(images(), batch_size=BATCH, epochs=2, progress="none")
    assert computed == ["data"]
    for path, value in weights(plain).items():
        np.testing.assert_allclose(weights(second)[path], value, rtol=1e-5, atol=1e-6)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "description", "changed", "no description"])
def test_what_is_damaged_is_named_and_computed_anew(damage, tmp_path, monkeypatch, caplog):
    computed = spy(monkeypatch)
    fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    (entry,) = entries(tmp_path)
    file = entry / "0.bin"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        content[5] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "description":
        (entry / "description.json").write_text("{")
    elif damage == "changed":
        said = json.loads((entry / "description.json").read_text())
        (entry / "description.json").write_text(json.dumps({**said, "sizes": [3]}))
    else:
        (entry / "description.json").unlink()
    with caplog.at_level(logging.WARNING, "tapeloop"):
        fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    assert computed == ["data"] * 2
    assert f"The feature cache in {entry} is damaged" in caplog.text
    fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    assert computed == ["data"] * 2


WRITING = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tapeloop as tl
from tapeloop.feature_cache import storage
from tests.support.cached import images, trainer_of
from tests.support.classifiers import classifier
add = storage._InFiles.add
def slow(self, rows):
    add(self, rows)
    print("written", flush=True)
    time.sleep(60)
storage._InFiles.add = slow
trainer_of(classifier, tl.Freeze("base")).fit(images(), batch_size=4, feature_cache=sys.argv[1], progress="none")
"""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not entries(tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    computed = spy(monkeypatch)
    trainer, plain = (trainer_of(classifier, tl.Freeze("base")) for _ in range(2))
    fit(trainer, tmp_path)
    plain.fit(images(), batch_size=BATCH, progress="none")
    assert computed == ["data"]
    assert len(entries(tmp_path)) == 1
    for path, value in weights(plain).items():
        np.testing.assert_allclose(weights(trainer)[path], value, rtol=1e-5, atol=1e-6)


def test_a_path_is_that_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be the path of a folder, and .* is a file"):
        fit(trainer_of(classifier, tl.Freeze("base")), tmp_path / "file")
    monkeypatch.setenv("HOME", str(tmp_path))
    fit(trainer_of(classifier, tl.Freeze("base")), "~/features")
    assert len(entries(tmp_path / "features")) == 1


INGREDIENTS = {"weights": "1", "views": "1"}


def written_by(writer, value=1.0, ingredients=INGREDIENTS):
    writer.add([np.full((2, 3), value, "float32")])
    return writer.finish(ingredients, [2], [], False)


def test_two_that_write_the_same_at_the_same_time_both_have_it(tmp_path):
    one, other = storage.Files(tmp_path).write("data-x"), storage.Files(tmp_path).write("data-x")
    kept = [written_by(one), written_by(other)]
    for each in (*kept, storage.Files(tmp_path).find("data-x")[1]):
        np.testing.assert_array_equal(each.arrays[0], np.ones((2, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["data-x"]


def test_what_went_out_of_date_is_replaced_though_another_has_put_something_there(tmp_path):
    one, other = storage.Files(tmp_path).write("data-x"), storage.Files(tmp_path).write("data-x")
    written_by(one, 1.0)
    kept = written_by(other, 2.0, {**INGREDIENTS, "weights": "2"})
    np.testing.assert_array_equal(kept.arrays[0], np.full((2, 3), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["data-x"]


def test_a_partial_folder_is_removed_when_filling_it_fails(tmp_path, monkeypatch):
    def fails(self):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(Cut, "compute_several", property(fails))
    with pytest.raises(OSError, match="on fire"):
        fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_threads_share_a_folder(tmp_path):
    def run():
        trainer = trainer_of(classifier, tl.Freeze("base"))
        for _ in range(2):
            fit(trainer, tmp_path)

    failures = []

    def caught():
        try:
            run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caught) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(tmp_path.iterdir())) == 1


def test_folds_do_not_take_each_others_place(tmp_path, monkeypatch):
    computed, (x, y) = spy(monkeypatch), images()
    trainer = trainer_of(classifier, tl.Freeze("base"))
    for _ in range(2):
        for fold in (slice(0, 12), slice(6, 18)):
            fit(trainer, tmp_path, (x[fold], y[fold]))
    assert computed == ["data"] * 2
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("change", [{"sizes": [4]}, {"arrays": []}, {"sizes": []}])
def test_a_description_that_does_not_add_up_is_damage(change, tmp_path, caplog):
    written_by(storage.Files(tmp_path).write("data-x"))
    path = tmp_path / "data-x" / "description.json"
    said = {**json.loads(path.read_text()), **change}
    del said["digest"]
    path.write_text(json.dumps({**said, "digest": storage._digest(said)}))
    with caplog.at_level(logging.WARNING, "tapeloop"):
        assert storage.Files(tmp_path).find("data-x") is None
    assert "is damaged" in caplog.text


def test_large_features_stay_in_their_files(tmp_path, monkeypatch):
    trainer, plain = (trainer_of(classifier, tl.Freeze("base")) for _ in range(2))
    monkeypatch.setattr(storage, "free_memory", lambda: 100)
    fit(trainer, tmp_path, epochs=2)
    plain.fit(images(), batch_size=BATCH, epochs=2, progress="none")
    for path, value in weights(plain).items():
        np.testing.assert_allclose(weights(trainer)[path], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_features_of_other_precisions(dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    try:
        one, other = trainer_of(classifier, tl.Freeze("base")), trainer_of(classifier, tl.Freeze("base"))
        fit(one, tmp_path, epochs=2)
        other.fit(images(), batch_size=BATCH, epochs=2, progress="none")
    finally:
        keras.config.set_dtype_policy("float32")
    said = json.loads((entries(tmp_path)[0] / "description.json").read_text())
    assert dtype.removeprefix("mixed_") in {array["dtype"] for array in said["arrays"]}
    for path, value in weights(other).items():
        np.testing.assert_allclose(weights(one)[path], value, rtol=2e-2, atol=2e-3)


# What goes into features, one by one: each changes something of a run, and whether it may find what was there.


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


CHANGES = {
    "weight": (change_weight, True), "statistics": (change_statistics, True), "example": (change_example, True),
    "target": (change_target, True), "order": (change_order, True), "number": (change_number, True),
    "dtype": (change_dtype, True), "nothing": (change_nothing, False), "head": (change_head, False),
}  # fmt: skip
SETTINGS = {
    "class_weight": ({"class_weight": {0: 2.0, 1: 1.0}}, True),
    "views": ({"feature_cache_views": 2}, True),
    "epochs": ({"epochs": 2}, False),
    "shuffle": ({"shuffle": False}, False),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    where = tmp_path_factory.mktemp("features")
    fit(trainer_of(classifier, tl.Freeze("base")), where)
    return where


@hypothesis.given(name=st.sampled_from([*CHANGES]), kind=st.sampled_from(["path", "memory"]))
@hypothesis.settings(max_examples=24, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_hit_only_where_nothing_that_went_in_has_changed(name, kind, written):
    change, misses = CHANGES[name]
    trainer = trainer_of(classifier, tl.Freeze("base"))
    data = images()
    with pytest.MonkeyPatch.context() as patch:
        computed = spy(patch)
        fit(trainer, written if kind == "path" else "memory", data)
        del computed[:]
        data = change(trainer, data) or data
        fit(trainer, written if kind == "path" else "memory", data)
        assert computed == ["data"] * misses


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_go_into_features(name, tmp_path, monkeypatch):
    options, misses = SETTINGS[name]
    x = images()[0]
    data = x, np.zeros(len(x), "int64")
    make = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": None}
    computed = spy(monkeypatch)
    for more in ({}, options):
        trainer = trainer_of(classifier, tl.Freeze("base"), **make)
        trainer.fit(data, **{"batch_size": BATCH, "feature_cache": tmp_path, "progress": "none", **more})
    assert len(computed) == 1 + misses


def test_another_version_of_a_library_is_another_cache(tmp_path, monkeypatch, caplog):
    fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    computed = spy(monkeypatch)
    monkeypatch.setattr(keras, "__version__", "0.0")
    with caplog.at_level(logging.WARNING, "tapeloop"):
        fit(trainer_of(classifier, tl.Freeze("base")), tmp_path)
    assert computed == ["data"]
    assert "out of date (versions changed)" in caplog.text


def test_digests_tell_arrays_apart():
    zeros = np.zeros((2, 3), "float32")
    different = [
        zeros,
        zeros.T,
        zeros.astype("float64"),
        zeros + 1,
        (zeros, zeros),
        None,
        np.array(["a", "b"]),
        np.array(["ab", ""]),
    ]
    assert len({fingerprint.of_arrays(value) for value in different}) == len(different)
    assert fingerprint.of_arrays(zeros) == fingerprint.of_arrays(zeros.copy())
    large = np.zeros((2**13, 2**10), "float32")
    before = fingerprint.of_arrays(large)
    large[-1, -1] = 1
    assert fingerprint.of_arrays(large) != before
    assert len(fingerprint.of_examples((zeros, np.zeros(2)))) == 2
    assert len(fingerprint.of_examples((zeros, np.zeros(3)))) == 1


def test_free_memory_is_what_the_system_says():
    free = storage.free_memory()
    assert free is None or 0 < free < 2**50


def test_a_folder_that_is_written_to_is_left_alone_whoever_writes(tmp_path):
    for name, age in (("now", 0), ("long ago", 2 * storage.ABANDONED_AFTER_S)):
        folder = tmp_path / f"{storage._WORKING}{name}"
        folder.mkdir()
        (folder / "0.bin").write_text("")
        for path in (folder / "0.bin", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    storage.Files(tmp_path).write("data-x").abandon()
    assert [path.name for path in tmp_path.iterdir()] == [f"{storage._WORKING}now"]
