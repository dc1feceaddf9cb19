"""What the command line answers about checkpoints, also while a run writes them."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.checkpoint import files, records
from tapeloop.checkpoint.lock import FolderLock
from tapeloop.checkpoint.store import CheckpointStore
from tapeloop.cli.visit import Visit
from tests.support.commands import ask, ask_json

layers = keras.layers
ROOT = pathlib.Path(__file__).parents[2]


class Counted(tl.VariablePolicy):
    """A policy that has come to something."""

    def __init__(self):
        self.asked = 0

    def at(self, progress):
        self.asked += 1
        return tl.TrainOnly("head") if progress.epoch == 0 else tl.TrainOnly("wide", "head")

    def __repr__(self):
        return "Counted()"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs, each of four steps, saved after every three steps and each epoch: three are kept.

    What is frozen at first is large enough to be shared.
    """
    folder = tmp_path_factory.mktemp("run") / "digits"
    keras.utils.set_random_seed(0)
    dense = [layers.Dense(150, name="base"), layers.Dense(150, name="wide"), layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((4,)), *dense])
    trainer = tl.Trainer(model, Counted(), loss="mse", optimizer="sgd", ema=0.9)
    checkpoints = tl.Checkpoints(folder, every_steps=3, keep=3, keep_best="loss")
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 3), "float32")
    trainer.fit((x, y), batch_size=2, epochs=2, verbose=0, checkpoint=checkpoints)
    trainer.save(folder.parent / "by-hand")
    return folder


NAMES = "000002-step-4", "000003-step-6", "000004-step-8"


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def seen(folder):
    """All that is in a folder, with the times at which it was written."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def flip(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


def lead_nowhere(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def test_the_list(run):
    status, said, error = ask(f"checkpoints list {run}")
    assert (status, error) == (0, "")
    head, *rows = [line.split() for line in said.split("\n\n")[0].splitlines()]
    assert head == ["checkpoint", "step", "epoch", "phase", "saved", "at", "size", "state"]
    assert [row[0] for row in rows] == list(NAMES)
    assert [row[1] for row in rows] == ["4", "6", "8"]
    assert "   6  1 + 2 batches  TrainOnly(glob('wide'), glob('head'))  20" in said
    assert [row[-1] for row in rows] == ["fine"] * 3
    assert rows[-1][-3:-1] == ["newest,", "best"]
    assert re.search(r"\nshared-000001 +3 +[\d.]+ KiB  fine\n", said)


def test_the_list_for_machines(run):
    status, said = ask_json(f"checkpoints list {run}")
    assert (status, said["directory"]) == (0, str(run))
    by_name = {each["name"]: each for each in said["checkpoints"]}
    assert tuple(by_name) == NAMES
    assert [each["epoch"] for each in by_name.values()] == [1, 1, 2]
    assert [each["newest"] for each in by_name.values()] == [each["best"] for each in by_name.values()]
    assert by_name[NAMES[1]]["epoch_under_way"]["batches"] == 2
    assert by_name[NAMES[2]]["policy"] == {"name": "Counted()", "state": by_name[NAMES[2]]["policy"]["state"]}
    assert by_name[NAMES[2]]["phase"]["variables"] == {"default": 4}
    assert by_name[NAMES[2]]["bytes"] == sum(path.stat().st_size for path in (run / NAMES[2]).iterdir())
    assert [each["name"] for each in said["shared"]] == sorted(path.name for path in run.glob("shared-*"))


def let_say(checkpoint, **said):
    """Let a checkpoint say this of its run."""
    record = json.loads((checkpoint / records.RECORD).read_text())
    with files.written_aside(checkpoint) as aside:
        shutil.copytree(checkpoint, aside, dirs_exist_ok=True)
        (aside / files.SUMS).unlink()
        (aside / records.RECORD).write_text(json.dumps({**record, **said}))


@pytest.mark.parametrize(("best", "expected"), [("max", NAMES[0]), ("min", NAMES[2])])
def test_the_best_is_what_the_run_takes_for_it(copy, best, expected):
    for name, logs in zip(NAMES, ({"val_thing": 3.0}, {}, {"val_thing": 2.0})):
        let_say(copy / name, epoch_logs=logs, best=best)
    found = [each["name"] for each in ask_json(f"checkpoints list {copy}")[1]["checkpoints"] if each["best"]]
    assert found == [expected]


def test_every_byte_is_verified(run):
    status, said, _ = ask(f"checkpoints verify {run}")
    assert status == 0
    rows = [line.split() for line in said.split("\n\n")[0].splitlines()[1:]]
    assert [row[0] for row in rows] == [*NAMES, *sorted(path.name for path in run.glob("shared-*"))]
    total = sum(path.stat().st_size for path in run.glob("[0s]*/*"))
    assert f"{total / 1024:.1f} KiB in {len(rows)} folders: every byte is as it was written." in said


def test_a_flipped_byte_of_tensors_is_found_by_verify_and_not_looked_for_by_list(copy):
    flip(copy / NAMES[2] / "tensors.data-00000-of-00001")
    assert ask(f"checkpoints list {copy}")[0] == 0
    status, said, _ = ask(f"checkpoints verify {copy}")
    assert status == 1
    assert f"{NAMES[2]}" in said
    assert "tensors.data-00000-of-00001 is not as it was written" in said
    assert re.search(r"\n1 of \d folders cannot be used\.\n", said)
    faults = {each["name"]: each["fault"] for each in ask_json(f"checkpoints verify {copy}")[1]["checkpoints"]}
    assert faults == {
        NAMES[0]: None, NAMES[1]: None, NAMES[2]: "tensors.data-00000-of-00001 is not as it was written",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: flip(folder / "checkpoint.json"), "checkpoint.json is not as it was written"),
        (lambda folder: flip(folder / "SHA256SUMS"), "SHA256SUMS is not as it was written"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS cannot be read (No such file or directory)"),
        (lambda folder: (folder / "tensors.index").unlink(), "do not belong there: tensors.index"),
        (lambda folder: lead_nowhere(folder), "SHA256SUMS cannot be read (No such file or directory)"),
        (lambda folder: (folder / "more").touch(), "files are missing or do not belong there: more"),
        (
            lambda folder: shutil.rmtree(next(folder.parent.glob("shared-*"))),
            "shared-000001: it is missing",
        ),
        (
            lambda folder: flip(next(folder.parent.glob("shared-*")) / "SHA256SUMS"),
            "shared-000001: SHA256SUMS is not as it was written",
        ),
    ],
)
def test_what_is_damaged_is_named_in_all_answers(copy, damage, text):
    damage(copy / NAMES[2])
    for command in ("list", "verify"):
        status, said, _ = ask(f"checkpoints {command} {copy}")
        assert status == 1
        assert text in next(line for line in said.splitlines() if line.startswith(NAMES[2]))
    status, said, error = ask(f"checkpoints show {copy}")
    assert status == 1
    assert text in said + error


def test_a_flipped_byte_of_shared_tensors_is_told_of_each_checkpoint_that_needs_it(copy):
    flip(copy / "shared-000001" / "tensors.data-00000-of-00001")
    status, said = ask_json(f"checkpoints verify {copy}")
    why = "tensors.data-00000-of-00001 is not as it was written"
    assert status == 1
    assert {each["fault"] for each in said["checkpoints"]} == {f"shared-000001: {why}"}
    assert [each["fault"] for each in said["shared"] if each["name"] == "shared-000001"] == [why]


def test_what_needs_damaged_tensors_is_counted_with_them(copy):
    flip(copy / "shared-000001" / "tensors.data-00000-of-00001")
    count = len(NAMES) + len(list(copy.glob("shared-*")))
    assert ask(f"checkpoints verify {copy}")[1].endswith(f"\n\n4 of {count} folders cannot be used.\n")


def test_another_folder_of_the_name_is_told_from_the_one_that_is_needed(copy):
    kept = json.loads((copy / NAMES[2] / records.RECORD).read_text())["shared_tensors"]["shared-000001"]
    let_say(copy / NAMES[2], shared_tensors={"shared-000001": {**kept, "digest": "f" * 64}})
    status, said, _ = ask(f"checkpoints list {copy}")
    rows = [re.split(r"  +", line) for line in said.splitlines() if line.startswith("shared-000001")]
    assert status == 1
    assert sorted((users, state) for _, users, _, state in rows) == [
        ("1", "its digest is not the one that the checkpoint recorded"),
        ("2", "fine"),
    ]


def test_one_folder_is_no_folders(run):
    assert "KiB in 1 folder: every byte is as it was written." in ask(f"checkpoints verify {run.parent / 'by-hand'}")[1]


def test_a_checkpoint_of_a_newer_tapeloop(copy, monkeypatch):
    monkeypatch.setattr(records, "FORMAT", 0)
    status, said, error = ask(f"checkpoints show {copy}")
    assert (status, said) == (1, "")
    assert "in format 1; this tapeloop reads formats up to 0. Update tapeloop." in error


def test_what_a_checkpoint_says_of_its_run(run):
    status, said, _ = ask(f"checkpoints show {run}")
    lines = [line.split(None, 1) for line in said.splitlines()]
    assert status == 0
    assert lines[0] == ["checkpoint", str(run / NAMES[2])]
    assert ["step", "8"] in lines
    assert ["policy", "Counted()"] in lines
    assert [line for name, line in lines if name == "phase"] == [
        "from step 0, epoch 0: TrainOnly(glob('head'))",
        "from step 4, epoch 1: TrainOnly(glob('wide'), glob('head'))",
    ]
    assert ["trains", "default: 4 variables"] in lines
    assert ["optimizer", "SGD, learning rate 0.01, state of 4 variables"] in lines
    assert ["ema", "0.9"] in lines
    assert f"by tapeloop {tl.__version__}, tensorflow {tf.__version__}, keras {keras.__version__}" in said
    record = json.loads((run / NAMES[2] / records.RECORD).read_text())
    assert f"logs        loss {record['history']['history']['loss'][-1]:.4g}\n" in said


def test_what_a_checkpoint_says_for_machines(run):
    status, said = ask_json(f"checkpoints show {run / NAMES[1]}")
    record = json.loads((run / NAMES[1] / records.RECORD).read_text())
    assert status == 0
    assert (said["step"], said["epoch"], said["epoch_under_way"]["batches"], said["fault"]) == (6, 1, 2, None)
    assert said["logs"] == {"loss": record["history"]["history"]["loss"][-1]}
    assert said["epoch_under_way"]["logs"] == record["epoch_under_way"]["logs"]
    assert said["policy"] == record["policy"]
    assert said["optimizers"][0]["kind"] == "SGD"
    assert sum(cohort["variables"] for cohort in said["optimizers"][0]["cohorts"]) == 4
    assert said["written_by"]["tensorflow"] == tf.__version__


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_one_that_was_saved_by_hand(run, command):
    status, said, _ = ask(f"checkpoints {command} {run.parent / 'by-hand'}")
    assert status == 0
    assert "by-hand" in said


def test_a_link_to_a_checkpoint(run, tmp_path):
    (tmp_path / "newest").symlink_to(run / NAMES[2])
    assert ask(f"checkpoints verify {tmp_path / 'newest'}") == ask(f"checkpoints verify {run / NAMES[2]}")


def test_one_that_was_being_replaced_when_the_process_was_killed(run, tmp_path):
    shutil.copytree(run.parent / "by-hand", files.replaced(tmp_path / "run"))
    assert ask(f"checkpoints verify {tmp_path / 'run'}")[0] == 0


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_folders_without_checkpoints(tmp_path, command):
    assert ask(f"checkpoints {command} {tmp_path / 'no'}") == (2, "", f"There is no folder {tmp_path / 'no'}.\n")
    status, said, error = ask(f"checkpoints {command} {tmp_path}")
    assert (status, said) == (1, "")
    assert error.startswith(f"There is no checkpoint in {tmp_path}. Give the directory of `fit(checkpoint=...)`, or")


def test_nothing_is_touched_and_a_run_that_has_the_folder_is_not_disturbed(copy):
    (copy / ".writing-0123").mkdir()  # what a run is writing now, or a killed one has left
    lock = FolderLock(copy)
    before = seen(copy)
    for command in ("list", "verify", "show"):
        assert ask(f"checkpoints {command} {copy}")[0] == 0
    assert seen(copy) == before
    lock.release()


def test_what_is_removed_meanwhile_is_not_damaged(copy, monkeypatch):
    def verify(folder, only=None):
        if folder.name == NAMES[0]:
            files.remove(folder)
        real(folder, only)

    real = files.verify
    monkeypatch.setattr(files, "verify", verify)
    status, said = ask_json(f"checkpoints verify {copy}")
    assert (status, [each["name"] for each in said["checkpoints"]]) == (0, [*NAMES[1:]])


def test_what_is_replaced_meanwhile_is_not_damaged(run, tmp_path, monkeypatch):
    place = tmp_path / "run"
    shutil.copytree(run.parent / "by-hand", place)
    left = ["once"]

    def verify(folder, only=None):
        if left:  # another takes its place, between the list of its files and the files
            left.pop()
            with files.written_aside(folder) as aside:
                shutil.copytree(run.parent / "by-hand", aside, dirs_exist_ok=True)
                (aside / files.SUMS).unlink()
            raise files.DamagedError("a mixture of both")
        real(folder, only)

    real = files.verify
    monkeypatch.setattr(files, "verify", verify)
    assert ask(f"checkpoints verify {place}")[0] == 0


def test_a_folder_may_be_looked_at_while_checkpoints_are_written_and_removed(run, tmp_path):
    record = json.loads((run / NAMES[2] / records.RECORD).read_text())
    store, is_over, seen_names = CheckpointStore(tmp_path), threading.Event(), set()
    still = tf.ones((200, 100))  # which is shared

    def write(step):
        store.write({**record, "step": step}, {"a": tf.ones(3) * step, "b": still}, still={"b"})

    def go_on():
        for step in range(2, 30):
            write(step)
            store.remove_all_but(store.names()[-1:])
        is_over.set()

    write(1)
    thread = threading.Thread(target=go_on)
    thread.start()
    while not is_over.is_set():
        looked = Visit(tmp_path, every_byte=True)
        assert [each.fault for each in looked.folders] == [None] * (len(looked.checkpoints) + 1)
        seen_names |= {each.name for each in looked.checkpoints}
    thread.join()
    assert len(seen_names) > 3


def test_the_commands_need_neither_tensorflow_nor_numpy(run, tmp_path):
    for name in ("tensorflow", "keras", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not needed')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tapeloop", "checkpoints", "list", str(run)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ask(f"checkpoints list {run}")[1]
