"""Checkpoints that do not fit, folders that cannot be used: each an error before anything has moved."""

import collections
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import runs
from tests.support.fitting import refused

layers = keras.layers


def network(*names, units=6, dtype="float32"):
    hidden = [layers.Dense(units, name=name, dtype=keras.dtype_policies.DTypePolicy(dtype)) for name in names[:-1]]
    return keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(3, name=names[-1])])


def trainer_of(*names, units=6, dtype="float32", **options):
    return tl.Trainer(network(*names, units=units, dtype=dtype), **{"loss": "mse", **options})


def fitted(trainer, folder=None, **options):
    trainer.fit((runs.X, runs.Y), batch_size=4, verbose=0, checkpoint=folder, **options)
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two layers that were trained by Adam."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    fitted(trainer_of("a", "b")).save(folder)
    return folder


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (
            lambda: trainer_of("a", "c"),
            r"The checkpoint alone has `b/bias`, `b/kernel`. The trainer alone has `c",
        ),
        (
            lambda: trainer_of("a", "b", units=5),
            r"Other shapes or types have `a/bias float32 \[6\], here float32 \[5\]`, `a/kernel",
        ),
        (lambda: trainer_of("a", "b", optimizer="sgd"), "the optimizer of all groups is Adam there and SGD here"),
        (
            lambda: trainer_of("a", "b", optimizer=keras.optimizers.Adam(amsgrad=True)),
            r"the Adam of all groups has .*'amsgrad': False.* there and .*'amsgrad': True.* here",
        ),
        (lambda: trainer_of("a", "b", dtype="bfloat16"), r"`a/bias float32 \[6\], here bfloat16 \[6\]`"),
        (lambda: trainer_of("a", "b", ema=0.9), "its `ema` is None, the trainer's is 0.9"),
        (
            lambda: tl.Trainer(keras.Sequential([layers.Dense(3, name="b")]), loss="mse"),
            "Call the model on a batch first, to make the variables",
        ),
    ],
)
def test_a_checkpoint_of_another_model_or_trainer_is_refused(saved, trainer, text):
    trainer = trainer()
    with refused(trainer.model, tl.CheckpointError, text):
        trainer.load(saved)
    assert trainer.step == 0


def test_what_fits_is_loaded_if_the_user_says_so(saved):
    trainer, reference = trainer_of("a", "c"), trainer_of("a", "b")
    reference.load(saved)
    trainer.load(saved, strict=False, fresh_optimizer=True)
    np.testing.assert_array_equal(trainer.model.get_layer("a").kernel, reference.model.get_layer("a").kernel)
    assert trainer.step == reference.step


def test_an_optimizer_starts_anew_only_if_the_user_says_so(saved):
    trainer = trainer_of("a", "b", optimizer="sgd")
    trainer.load(saved, fresh_optimizer=True)
    assert trainer.step == 5
    assert fitted(trainer).step == 10


def test_another_group_without_an_optimizer_is_refused(tmp_path):
    groups = {"x": "a", "y": "b"}
    options = {"policy": tl.Groups(groups), "optimizer": {"x": "adam", "y": "adam"}}
    fitted(trainer_of("a", "b", **options)).save(tmp_path / "run")
    with pytest.raises(tl.CheckpointError, match=r"it has an optimizer for the group 'x', the trainer has those for"):
        trainer_of("a", "b").load(tmp_path / "run")


def test_a_checkpoint_of_a_newer_version_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("tapeloop.checkpoint.contents.FORMAT", 99)
    fitted(trainer_of("a", "b"), tmp_path)
    with pytest.raises(tl.CheckpointError, match=r"in format 99; this tapeloop reads formats up to 1. Update tapeloop"):
        fitted(trainer_of("a", "b"), tmp_path, epochs=2)


def test_a_second_run_in_the_same_directory_is_told_of_the_first(tmp_path):
    script = (
        "import sys, pathlib; from tapeloop.checkpoint.lock import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        trainer = trainer_of("a", "b")
        with refused(trainer.model, tl.CheckpointError, f"process {other.pid} on .*, started .* saves in .* already"):
            fitted(trainer, tmp_path)
        other.kill()  # a process that is gone holds no lock
        other.wait()
    assert fitted(trainer, tmp_path).step == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o500)
    trainer = trainer_of("a", "b")
    with refused(trainer.model, tl.CheckpointError, "cannot be written: Permission denied"):
        fitted(trainer, tmp_path / "run")


def test_a_file_in_the_place_of_the_directory_is_refused_before_training(tmp_path):
    (tmp_path / "run").write_text("")
    trainer = trainer_of("a", "b")
    with refused(trainer.model, tl.CheckpointError, "cannot be written: File exists"):
        fitted(trainer, tmp_path / "run")
    with pytest.raises(tl.CheckpointError, match=r"is there already and is no checkpoint"):
        trainer.save(tmp_path)


def test_whether_to_go_on_is_the_users_to_say(tmp_path):
    with pytest.raises(tl.CheckpointError, match=r"`resume` is 'must', and there is no checkpoint"):
        fitted(trainer_of("a", "b"), tl.Checkpoints(tmp_path, resume="must"))
    fitted(trainer_of("a", "b"), tmp_path)
    with pytest.raises(tl.CheckpointError, match=r"`resume` is 'never', and .* the newest at step 5"):
        fitted(trainer_of("a", "b"), tl.Checkpoints(tmp_path, resume="never"))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every_steps": 0}, ValueError, "`every_steps` must be a whole number, 1 or more"),
        ({"every_minutes": -1}, ValueError, "`every_minutes` must be a number above 0"),
        ({"keep": 0}, ValueError, "`keep` must be"),
        ({"mode": "most"}, ValueError, "`mode` must be"),
        ({"resume": True}, ValueError, "`resume` must be one of 'auto', 'never', 'must'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        tl.Checkpoints(tmp_path, **options)


def test_the_log_to_go_by_must_be_there(tmp_path, caplog):
    with pytest.raises(tl.CheckpointError, match=r"`keep_best` is 'val_loss', and there is no validation data"):
        fitted(trainer_of("a", "b"), tl.Checkpoints(tmp_path, keep_best="val_loss"))
    fitted(trainer_of("a", "b"), tl.Checkpoints(tmp_path, keep_best="mae"))
    assert "`keep_best` is 'mae', and the numbers that the epoch logged are 'loss': no best is kept." in caplog.text
    with pytest.raises(tl.CheckpointError, match=r"There is no best checkpoint in"):
        tl.Checkpoints(tmp_path).restore_best(trainer_of("a", "b"))


def test_other_data_and_another_rate_are_warned_of(tmp_path, caplog):
    fitted(trainer_of("a", "b", optimizer=keras.optimizers.Adam(0.01)), tmp_path)
    trainer = trainer_of("a", "b", optimizer=keras.optimizers.Adam(0.02))
    trainer.fit((runs.X[:8], runs.Y[:8]), batch_size=4, epochs=2, verbose=0, checkpoint=tmp_path)
    assert "The data has changed (batches 5, now 2; examples 20, now 8)" in caplog.text
    assert "This program sets the learning rate of Adam to 0.02, and the run began with 0.01" in caplog.text
    assert trainer.step == 7
    assert trainer.learning_rates["default"] == pytest.approx(0.01)


def test_a_policy_whose_state_cannot_be_saved_is_refused_before_training(tmp_path):
    class Odd(tl.VariablePolicy):
        def __init__(self):
            self.queue = iter([1])

        def group(self, variable):
            return "all"

    trainer = trainer_of("a", "b", policy=Odd())
    with refused(
        trainer.model, tl.CheckpointError, "`Odd.queue` is a list_iterator.*Write `get_state` and `set_state`"
    ):
        fitted(trainer, tmp_path)


def test_a_position_that_cannot_be_saved_is_said_and_batches_are_left_out(tmp_path, caplog):
    def batches():
        for start in range(0, 20, 4):
            yield runs.X[start : start + 4], runs.Y[start : start + 4]

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 3)))

    def fit(**options):
        data = tf.data.Dataset.from_generator(batches, output_signature=spec)
        keras.utils.set_random_seed(0)
        trainer = trainer_of("a", "b")
        trainer.fit(data, epochs=2, verbose=0, **options)
        return runs.digest(trainer)

    expected = fit()
    with runs.interrupted_at(7):
        fit(checkpoint=tmp_path)
    assert "TensorFlow cannot save the position of the dataset" in caplog.text
    assert fit(checkpoint=tmp_path) == expected


def test_what_a_checkpoint_says_can_be_read_by_people(saved):
    record = json.loads((saved / "checkpoint.json").read_text())
    assert (record["step"], record["epoch"], record["policy"]["name"]) == (5, 1, "TrainAll()")
    assert record["written_by"]["tensorflow"] == tf.__version__


def test_augmented_versions_that_would_be_lost_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Give `feature_cache` the path of a folder"):
        fitted(trainer_of("a", "b", policy=tl.Freeze("a")), tmp_path, feature_cache="memory", feature_cache_views=2)


def test_a_directory_that_is_a_checkpoint_or_a_url_is_refused(saved):
    with pytest.raises(tl.CheckpointError, match=r"is a checkpoint, and no directory of a run"):
        fitted(trainer_of("a", "b"), saved)
    with pytest.raises(ValueError, match=r"must be the path of a local folder. Received: 'gs://bucket/run'"):
        tl.Checkpoints("gs://bucket/run")
    with pytest.raises(TypeError, match=r"`checkpoint` must be a directory or `tl.Checkpoints"):
        fitted(trainer_of("a", "b"), True)


def test_which_is_the_best_must_be_known(tmp_path):
    with pytest.raises(ValueError, match=r"`mode` cannot be told from 'score'"):
        tl.Checkpoints(tmp_path, keep_best="score")
    assert tl.Checkpoints(tmp_path, keep_best="val_mean_io_u").is_more_better
    assert tl.Checkpoints(tmp_path, keep_best="score", mode="max").is_more_better
    assert not tl.Checkpoints(tmp_path, keep_best="val_loss").is_more_better


def test_a_run_that_was_taken_back_needs_a_directory_of_its_own(tmp_path):
    trainer = fitted(trainer_of("a", "b"), tmp_path / "run", epochs=2)
    trainer.load(tmp_path / "run" / "000001-step-5")
    with refused(trainer.model, tl.CheckpointError, "The trainer was loaded at step 5, and the newest checkpoint in"):
        fitted(trainer, tmp_path / "run")
    assert fitted(trainer, tmp_path / "other").step == 10


def test_a_policy_that_writes_half_of_its_state_is_refused(tmp_path):
    class Half(tl.VariablePolicy):
        def group(self, variable):
            return "all"

        def get_state(self):
            return {}

    with pytest.raises(tl.CheckpointError, match=r"`Half` writes one of `get_state` and `set_state`"):
        fitted(trainer_of("a", "b", policy=Half()), tmp_path)


def test_what_was_not_loaded_is_said(saved, caplog):
    trainer_of("a", "c").load(saved, strict=False)
    assert "was loaded in part. The checkpoint alone has `b/bias`, `b/kernel`." in caplog.text


def test_a_run_is_saved_and_loaded_with_its_own_weights(tmp_path):
    trainer = fitted(trainer_of("a", "b", ema=0.9))
    with trainer.ema_weights():
        with pytest.raises(RuntimeError, match=r"`save` was called inside `ema_weights\(\)`"):
            trainer.save(tmp_path / "run")
        with pytest.raises(RuntimeError, match=r"`load` was called inside `ema_weights\(\)`"):
            trainer.load(tmp_path / "run")
        trainer.save(tmp_path / "averaged.keras")


def test_fresh_optimizers_are_fresh_in_a_trainer_that_has_trained(saved):
    trainer = fitted(trainer_of("a", "b"), epochs=2)
    trainer.load(saved, fresh_optimizer=True)
    assert trainer.state.optimizers.cohorts == []
    fitted(trainer)
    assert [int(cohort.optimizer.iterations) for cohort in trainer.state.optimizers.cohorts] == [5]


@pytest.mark.parametrize("kept", [collections.Counter("ab"), collections.namedtuple("Pair", "a b")(1, 2)])
def test_a_policy_that_keeps_what_would_come_back_as_another_type_is_refused(tmp_path, kept):
    class Keeps(tl.VariablePolicy):
        def __init__(self):
            self.kept = kept

        def group(self, variable):
            return "all"

    with pytest.raises(tl.CheckpointError, match=rf"`Keeps.kept` is a {type(kept).__name__}"):
        fitted(trainer_of("a", "b", policy=Keeps()), tmp_path)
