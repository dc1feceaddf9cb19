"""Checkpoints on the disk: whole or not at all, and what does not move is written once."""

import json
import os
import random
import resource
import shutil
import subprocess

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support import runs

layers = keras.layers
LARGE = 200  # units of a frozen layer, so that it is worth a file of its own


def large(policy=None, **options):
    keras.utils.set_random_seed(0)
    base, head = layers.Dense(LARGE, name="base"), layers.Dense(3, name="head")
    model = keras.Sequential([keras.Input((4,)), base, layers.Dense(LARGE, name="wide"), head])
    return tl.Trainer(model, policy or tl.TrainOnly("head"), loss="mse", **options)


def fitted(folder, epochs=3, trainer=None, **options):
    trainer = trainer or large()
    trainer.fit((runs.X, runs.Y), batch_size=4, epochs=epochs, verbose=0, checkpoint=tl.Checkpoints(folder, **options))
    return trainer


def checkpoints(folder):
    return sorted(path for path in folder.iterdir() if "-step-" in path.name)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two checkpoints, of runs that nothing has damaged, and what the older one holds."""
    folder = tmp_path_factory.mktemp("two")
    fitted(folder, epochs=1)
    older = runs.digest(fitted(folder, epochs=1))
    fitted(folder, epochs=2, keep=2)
    assert len(checkpoints(folder)) == 2
    return folder, older


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << random.Random(place).randrange(8)
    path.write_bytes(bytes(content))


def test_a_flipped_byte_anywhere_is_noticed_and_the_checkpoint_before_is_used(two, tmp_path, caplog):
    folder, older = two
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    newest = checkpoints(copy)[-1]
    places = [(path, place) for path in newest.iterdir() for place in range(path.stat().st_size)]
    trainer = large()
    # Every file, and its first and last bytes, are among them.
    edges = [(path, place) for path in newest.iterdir() for place in (0, path.stat().st_size - 1)]
    for path, place in edges + random.Random(0).sample(places, 100):
        kept = path.read_bytes()
        flipped(path, place)
        caplog.clear()
        trainer.load(copy)
        assert runs.digest(trainer) == older
        assert f"{newest} is damaged" in caplog.text
        path.write_bytes(kept)


@pytest.mark.parametrize("damage", ["cut", "gone", "added"])
def test_a_file_that_is_cut_off_or_missing_or_added_is_noticed(two, tmp_path, damage):
    folder, older = two
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in list(checkpoints(copy)[-1].iterdir()):
        kept = path.read_bytes()
        if damage == "cut":
            path.write_bytes(kept[: len(kept) // 2])
        elif damage == "gone":
            path.unlink()
        else:
            (path.parent / "more").write_text("x")
        trainer = large()
        trainer.load(copy)
        assert runs.digest(trainer) == older
        path.write_bytes(kept)


def test_frozen_weights_that_are_damaged_are_taken_from_the_model_if_it_has_the_same(two, tmp_path):
    folder, _ = two
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shared = next(copy.glob("shared-*"))
    data = next(path for path in shared.iterdir() if "data" in path.name)
    flipped(data, 100)
    expected, trainer = large(), large()
    expected.load(folder)
    trainer.load(copy)
    assert runs.digest(trainer) == runs.digest(expected)
    other = large()
    other.model.get_layer("base").kernel.assign_add(np.ones((4, LARGE), "float32"))
    with pytest.raises(tl.CheckpointError, match=r"None of the 2 checkpoints in .* is as it was written"):
        other.load(copy)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_frozen_weights_that_are_damaged_are_written_anew(tmp_path, damage, caplog):
    fitted(tmp_path, epochs=1)
    shared = next(tmp_path.glob("shared-*"))
    if damage == "gone":
        shutil.rmtree(shared)
    else:
        flipped(next(path for path in shared.iterdir() if "data" in path.name), 100)
    fitted(tmp_path, epochs=2)
    assert "the model has the same weights, which are written anew" in caplog.text
    other = large()
    other.model.get_layer("base").kernel.assign_add(np.ones((4, LARGE), "float32"))
    other.load(checkpoints(tmp_path)[-1])  # it needs none of the model's own
    assert other.epoch == 2


def test_the_digests_are_those_that_sha256sum_knows(two):
    for folder in (*checkpoints(two[0]), *two[0].glob("shared-*")):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_frozen_weights_are_written_once(tmp_path):
    fitted(tmp_path, epochs=3)
    shared = list(tmp_path.glob("shared-*"))
    assert len(shared) == 1
    assert all(size(folder) < 0.2 * size(shared[0]) for folder in checkpoints(tmp_path))


def test_what_thaws_is_written_with_each_checkpoint_and_what_freezes_once_more(tmp_path):
    policy = tl.Phases({0: tl.TrainOnly("head"), 2: tl.TrainOnly("wide"), 4: tl.TrainOnly("head")})
    trainer = fitted(tmp_path, epochs=7, trainer=large(policy), keep=2)
    # Nothing refers any more to the weights of the first phase alone.
    records = [json.loads((folder / "checkpoint.json").read_text()) for folder in checkpoints(tmp_path)]
    used = {name for record in records for name in record["shared_tensors"]}
    assert used == {path.name for path in tmp_path.glob("shared-*")}
    assert "model/wide/kernel" not in records[-1]["tensors"]
    resumed = large(policy)
    resumed.load(tmp_path)
    assert runs.digest(resumed) == runs.digest(trainer)


def test_a_frozen_weight_that_somebody_assigns_to_is_saved(tmp_path):
    trainer = fitted(tmp_path, epochs=1)
    kernel = trainer.model.get_layer("base").kernel
    kernel.assign(kernel + 1)
    fitted(tmp_path, trainer=trainer, epochs=1)
    resumed = large()
    resumed.load(tmp_path)
    np.testing.assert_array_equal(resumed.model.get_layer("base").kernel, kernel)


def test_the_newest_and_the_best_are_kept(tmp_path):
    trainer, options = large(optimizer="sgd"), {"keep": 2, "keep_best": "loss"}
    fitted(tmp_path, trainer=trainer, epochs=2, **options)
    best = tl.Checkpoints(tmp_path, keep_best="loss").best
    trainer.learning_rates["default"] = 10.0  # from here on it gets worse
    with pytest.raises(tl.NonFiniteError):
        fitted(tmp_path, trainer=trainer, epochs=40, **options)
    kept = checkpoints(tmp_path)
    assert best in kept
    assert len(kept) == 3
    assert tl.Checkpoints(tmp_path, keep_best="loss").restore_best(trainer) == best
    assert trainer.epoch == 2


def test_a_disk_that_is_full_in_the_middle_of_a_write_loses_nothing(tmp_path, caplog):
    trainer = fitted(tmp_path, epochs=1)
    before = runs.digest(trainer)
    newest = checkpoints(tmp_path)[-1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        fitted(tmp_path, trainer=trainer, epochs=2)
        with pytest.raises(tl.CheckpointError, match=r"cannot be written"):
            trainer.save(tmp_path / "elsewhere")
        with pytest.raises(tl.CheckpointError, match=r"cannot be written"):
            trainer.save_trained(tmp_path / "head.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "A checkpoint could not be written" in caplog.text
    assert f"training goes on, and the last one is {newest}" in caplog.text
    assert trainer.epoch == 3
    assert checkpoints(tmp_path) == [newest]
    assert not (tmp_path / "elsewhere").exists()
    assert not list(tmp_path.glob(".writing*"))
    resumed = large()
    resumed.load(tmp_path)
    assert runs.digest(resumed) == before


def test_what_is_saved_again_is_there_whole_if_the_process_is_killed_in_between(tmp_path, monkeypatch):
    trainer = fitted(tmp_path / "runs", epochs=1)
    trainer.save(tmp_path / "run")
    before, rename = runs.digest(trainer), os.rename
    fitted(tmp_path / "more", trainer=trainer, epochs=1)

    def killed(source, target):
        if target == tmp_path / "run":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(tmp_path / "run")
    monkeypatch.undo()
    resumed = large()
    resumed.load(tmp_path / "run")
    assert runs.digest(resumed) == before
    trainer.save(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "run", "runs"]
