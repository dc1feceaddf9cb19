"""Every class of `keras.callbacks`, told of a fit of tapeloop's as Keras' own `fit` tells it."""

import contextlib
import csv
import json
import math
import pathlib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl

callbacks = keras.callbacks
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(20, 4)).astype("float32"), RANDOM.normal(size=(20, 2)).astype("float32")
HELD_OUT = X[:8] + 1, Y[:8]
# Those that do not go with a trainer, each with what it says; and those that only hold others.
REFUSED = {"BackupAndRestore": "checkpoint=tl.Checkpoints", "OrbaxCheckpoint": "checkpoint=tl.Checkpoints"}
BASES = {"Callback", "CallbackList"}


class Recorder(callbacks.Callback):
    """Writes down every call and what came with it."""

    def __init__(self):
        super().__init__()
        self.calls = []


def _recording(name):
    def record(self, *args, **kwargs):
        number = args[0] if args and not isinstance(args[0], dict) else None
        logs = next((a for a in (*args, *kwargs.values()) if isinstance(a, dict)), None) or {}
        outputs = np.shape(logs["outputs"]) if "outputs" in logs else None
        self.calls.append((name, number, outputs or {key: float(value) for key, value in sorted(logs.items())}))

    return record


for _kind in ("train", "test", "predict"):
    for _moment in (f"on_{_kind}_begin", f"on_{_kind}_end", f"on_{_kind}_batch_begin", f"on_{_kind}_batch_end"):
        setattr(Recorder, _moment, _recording(_moment))
for _moment in ("on_epoch_begin", "on_epoch_end"):
    setattr(Recorder, _moment, _recording(_moment))


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(keras.layers.Dense(3, name="base")(inputs)))


def fit(kind, given, **options):
    """Train a new model, by Keras or by tapeloop; returns who trained it and the history."""
    model, metrics = network(), [keras.metrics.MeanAbsoluteError(name="mae")]
    options = {"epochs": 3, "batch_size": 8, "shuffle": False, "validation_data": HELD_OUT, "verbose": 0, **options}
    if kind == "keras":
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", metrics=metrics)
        return model, model.fit(X, Y, callbacks=given, **options)
    trainer = tl.Trainer(model, loss="mse", metrics=metrics, optimizer=keras.optimizers.SGD(0.1), nonfinite="ignore")
    return trainer, trainer.fit(X, Y, callbacks=given, **options)


def model_of(run):
    return run.model if isinstance(run, tl.Trainer) else run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One fit of each kind with all callbacks that go together: by name, the callback, the folder and the history."""
    found = {}
    for kind in ("keras", "tapeloop"):
        folder, posted = tmp_path_factory.mktemp(kind), []
        with pytest.MonkeyPatch.context() as patch:
            requests = types.SimpleNamespace(
                post=lambda url, posted=posted, **given: posted.append(given["json"]),
                exceptions=types.SimpleNamespace(RequestException=OSError),
            )
            patch.setattr("keras.src.callbacks.remote_monitor.requests", requests)
            seen = []
            given = {
                "Recorder": Recorder(),
                "CSVLogger": callbacks.CSVLogger(folder / "log.csv"),
                "EarlyStopping": callbacks.EarlyStopping(monitor="val_mae", patience=9),
                "LambdaCallback": callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs, seen=seen: seen.append((batch, float(logs["loss"])))
                ),
                "LearningRateScheduler": callbacks.LearningRateScheduler(lambda epoch, rate: float(rate) * 0.5),
                "ModelCheckpoint": callbacks.ModelCheckpoint(folder / "best.weights.h5", save_best_only=True,
                                                            save_weights_only=True, monitor="val_mae"),
                "ProgbarLogger": callbacks.ProgbarLogger(),
                "ReduceLROnPlateau": callbacks.ReduceLROnPlateau(min_delta=10.0, patience=1, factor=0.1),
                "RemoteMonitor": callbacks.RemoteMonitor(send_as_json=True),
                "TensorBoard": callbacks.TensorBoard(folder / "board", update_freq=1),
                "TerminateOnNaN": callbacks.TerminateOnNaN(),
                "History": callbacks.History(),  # last, so that it sees what others add to the logs
            }  # fmt: skip
            run, history = fit(kind, list(given.values()))
        found[kind] = types.SimpleNamespace(
            given=given, folder=folder, posted=posted, seen=seen, history=history, run=run
        )
    return found["keras"], found["tapeloop"]


def scalars(folder):
    """What TensorBoard's files hold: by writer and tag, the steps and values."""
    found = {}
    for path in sorted(folder.rglob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" and "per_second" not in value.tag:
                    held = float(tf.make_ndarray(value.tensor))
                    found.setdefault((path.parent.name, value.tag), []).append((event.step, held))
    return found


def close(one, other):
    """Whether two structures are alike, numbers to 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(close, one, other))
    return math.isclose(one, other, rel_tol=1e-5) if isinstance(one, float) else one == other


def written(folder):
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    return [{name: value if value == "NA" else float(value) for name, value in row.items()} for row in rows]


WHAT_IT_DID = {
    "CSVLogger": lambda ran: written(ran.folder),
    "EarlyStopping": lambda ran: (ran.given["EarlyStopping"].wait, float(ran.given["EarlyStopping"].best)),
    "History": lambda ran: (ran.given["History"].epoch, ran.given["History"].history),
    "LambdaCallback": lambda ran: ran.seen,
    "LearningRateScheduler": lambda ran: ran.history.history["learning_rate"],
    "ModelCheckpoint": lambda ran: float(ran.given["ModelCheckpoint"].best),
    "ReduceLROnPlateau": lambda ran: (ran.given["ReduceLROnPlateau"].wait, ran.history.history["learning_rate"]),
    "RemoteMonitor": lambda ran: json.loads(json.dumps(ran.posted)),
    "TensorBoard": lambda ran: scalars(ran.folder / "board"),
    "TerminateOnNaN": lambda ran: len(ran.history.epoch),
    "ProgbarLogger": lambda ran: ran.given["ProgbarLogger"].target,
}


@pytest.mark.parametrize("name", WHAT_IT_DID)
def test_a_callback_of_keras_does_what_it_does_in_keras_fit(ran, name):
    expected, found = map(WHAT_IT_DID[name], ran)
    assert expected not in ([], {}, None)
    assert close(found, expected), (found, expected)


def test_every_class_of_keras_is_tried_or_refused():
    names = {name for name, kind in vars(callbacks).items() if isinstance(kind, type)}
    known = {*WHAT_IT_DID, *REFUSED, *BASES, "SwapEMAWeights"}
    assert names == {name for name in known if hasattr(callbacks, name)}  # some came with later releases


def test_callbacks_are_called_at_the_same_moments_with_the_same_logs(ran):
    expected, found = (each.given["Recorder"].calls for each in ran)
    assert len(found) > 30
    for mine, theirs in zip(found, expected):
        assert mine[:2] == theirs[:2]
        # While a batch begins Keras passes nothing, or nothing yet.
        assert close(mine[2], theirs[2]), (mine, theirs)
    assert len(found) == len(expected)


def test_the_best_weights_are_written_as_keras_writes_them(ran):
    expected, found = (network() for _ in ran)
    expected.load_weights(ran[0].folder / "best.weights.h5")
    found.load_weights(ran[1].folder / "best.weights.h5")
    for mine, theirs in zip(found.weights, expected.weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_training_is_that_of_keras_with_the_same_callbacks(ran):
    assert close(dict(ran[1].history.history), dict(ran[0].history.history))
    for mine, theirs in zip(model_of(ran[1].run).weights, ran[0].run.weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_fit_ends_early_with_the_best_weights():
    runs = []
    for kind in ("keras", "tapeloop"):
        stopping = callbacks.EarlyStopping(monitor="loss", patience=2, min_delta=10.0, restore_best_weights=True)
        runs.append((*fit(kind, stopping if kind == "tapeloop" else [stopping], epochs=9), stopping))
    (keras_run, keras_history, _), (run, history, stopping) = runs
    assert history.epoch == [1, 2, 3]
    assert stopping.stopped_epoch == 2
    assert close(history.history["loss"], keras_history.history["loss"])
    for mine, theirs in zip(model_of(run).weights, keras_run.weights):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    run.fit(X, Y, verbose=0)
    assert run.epoch == 4  # the next fit goes on


def test_a_callback_may_end_a_fit_in_the_middle_of_an_epoch():
    class Enough(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    (model, expected), (run, history) = (fit(kind, [Enough()]) for kind in ("keras", "tapeloop"))
    assert run.step == int(model.optimizer.iterations) == 2
    assert close(history.history, expected.history)


def test_nan_ends_a_fit_where_the_trainer_does_not_look():
    given = {"validation_data": None, "epochs": 4}
    x = X.copy()
    x[9] = np.nan
    trainer = tl.Trainer(network(), loss="mse", nonfinite="ignore")
    trainer.fit(x, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[callbacks.TerminateOnNaN()], **given)
    assert trainer.step == 2


def test_averages_are_swapped_in_for_validation():
    def trainer():
        return tl.Trainer(network(), loss="mse", optimizer=keras.optimizers.SGD(0.1), ema=0.9)

    given = {"epochs": 2, "batch_size": 8, "shuffle": False, "validation_data": HELD_OUT, "verbose": 0}
    one, other = trainer(), trainer()
    swapped = one.fit(X, Y, callbacks=[callbacks.SwapEMAWeights()], **given).history
    named = other.fit(X, Y, validate_with="ema", **given).history
    assert swapped == named
    with other.ema_weights():
        assert math.isclose(other.evaluate(*HELD_OUT, verbose=0)["loss"], named["val_loss"][-1], rel_tol=1e-6)
    assert other.evaluate(*HELD_OUT, verbose=0)["loss"] != named["val_loss"][-1]
    assert one.evaluate(*HELD_OUT, callbacks=callbacks.SwapEMAWeights(), verbose=0)["loss"] == swapped["val_loss"][-1]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (lambda: callbacks.BackupAndRestore("x"), ValueError, "`BackupAndRestore` does not go with a trainer:"),
        (lambda: callbacks.SwapEMAWeights(swap_on_epoch=True), ValueError, "leaves the averages in the model between"),
        (lambda: callbacks.SwapEMAWeights(), ValueError, "it has no `ema`"),
        (lambda: callbacks.EarlyStopping, TypeError, r"Make an object of it: `EarlyStopping\(\)`"),
        (lambda: print, TypeError, "`callbacks` must be objects of `keras.callbacks.Callback`. Received: <built-in"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_said_before_anything_has_moved(given, error, text):
    trainer = tl.Trainer(network(), loss="mse")
    with pytest.raises(error, match=text):
        trainer.fit(X, Y, verbose=0, callbacks=[given()])
    assert trainer.step == 0


def test_a_model_is_not_compiled_by_a_callback():
    class Compiles(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.compile("sgd")

    with pytest.raises(RuntimeError, match=r"A trainer is not compiled: `trainable` flags are read at the start"):
        fit("tapeloop", [Compiles()])


def test_a_flag_that_a_callback_lifts_holds_from_that_epoch_on():
    class Unfreezes(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.get_layer("base").trainable = epoch >= 1

    _, history = fit("tapeloop", [Unfreezes()])
    assert [(phase.epoch, len(phase.selection.trained)) for phase in history.phases] == [(0, 2), (1, 4)]


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
    reason="before Keras 3.15 its callbacks do not look for several optimizers",
)
def test_every_group_has_its_rate_and_one_may_be_seen_alone():
    class Reads(callbacks.Callback):
        seen = None

        def on_epoch_end(self, epoch, logs=None):
            with contextlib.suppress(AttributeError):
                self.seen = "no one number"
                self.seen = float(self.model.optimizer.learning_rate)

    halved = callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    everywhere, alone, unclear = halved, tl.ForGroup("head", Reads()), Reads()
    trainer = tl.Trainer(network(), tl.Groups({"base": "base", "head": "head"}), loss="mse",
                         optimizer={"base": keras.optimizers.SGD(0.1), "head": keras.optimizers.SGD(0.4)})  # fmt: skip
    trainer.policy = tl.Groups({"base": "base", "head": "head"})
    history = trainer.fit(X, Y, epochs=2, verbose=0, callbacks=[everywhere, alone, unclear])
    assert dict(trainer.learning_rates) == pytest.approx({"base": 0.025, "head": 0.1})
    assert history.history["learning_rate_head"] == pytest.approx([0.2, 0.1])
    assert alone.callback.seen == pytest.approx(0.1)
    assert unclear.seen == "no one number"
    assert repr(alone) == "ForGroup('head', Reads)"


def test_a_policy_is_asked_no_more_often_with_callbacks_that_look_at_learning_rates():
    class Counts(tl.VariablePolicy):
        asked = 0

        def at(self, progress):
            self.asked += 1
            return tl.TrainOnly("head") if progress.epoch == 0 else tl.Groups({"base": "base"})

    class Reads(callbacks.Callback):
        seen = []

        def look(self, *args, **kwargs):
            self.seen.append(list(self.model._rates()))

        on_train_begin = on_epoch_begin = on_train_batch_end = on_epoch_end = on_train_end = look

    trainer = tl.Trainer(network(), Counts(), loss="mse")
    trainer.fit(X, Y, epochs=2, batch_size=20, verbose=0, callbacks=[Reads()])
    assert trainer.policy.asked == 2
    assert Reads.seen == [["default"]] * 4 + [["base"]] * 4


def test_a_prediction_and_an_evaluation_are_told_of():
    expected, found = Recorder(), Recorder()
    model, trainer = network(), tl.Trainer(network(), loss="mse")
    model.compile(loss="mse")
    model.predict(X, batch_size=8, verbose=0, callbacks=[expected])
    model.evaluate(X, Y, batch_size=8, verbose=0, callbacks=[expected])
    trainer.predict(X, batch_size=8, callbacks=[found])
    trainer.evaluate(X, Y, batch_size=8, verbose=0, callbacks=[found])
    assert [call[:2] for call in found.calls] == [call[:2] for call in expected.calls]
    assert all(close(mine[2], theirs[2]) for mine, theirs in zip(found.calls, expected.calls))


def test_models_in_a_mapping_are_saved_by_the_trainer():
    trainer = tl.Trainer({"one": network()}, loss="mse")
    trainer.forward = lambda inputs, training: trainer.model["one"](inputs)
    for given in (callbacks.ModelCheckpoint("unused.keras"), callbacks.EarlyStopping(restore_best_weights=True)):
        with pytest.raises(ValueError, match=r"keeps the weights of one model, .* a mapping of 'one'.*tl.Checkpoints"):
            trainer.fit(X, Y, verbose=0, callbacks=[given])
    saving = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: saving.model.save("unused.keras"))
    assert trainer.step == 0
    with pytest.raises(AttributeError, match=r"asks for `self.model.save`, and .* a mapping of 'one'.*tl.Checkpoints"):
        trainer.fit(X, Y, verbose=0, callbacks=[saving])
    assert not pathlib.Path("unused.keras").exists()


def test_a_group_that_never_comes_is_found_before_anything_has_moved():
    stages = tl.GradualUnfreeze(["head", "base"], decay=0.5)
    late, wrong = (tl.ForGroup(group, callbacks.ReduceLROnPlateau("loss")) for group in ("stage1", "stage2"))
    trainer = tl.Trainer(network(), stages, loss="mse")
    with pytest.raises(tl.PolicyError, match=r"`ForGroup\('stage2', ReduceLROnPlateau\)`: there is no group 'stage2'"):
        trainer.fit(X, Y, verbose=0, callbacks=[wrong])
    assert trainer.step == 0
    with pytest.raises(tl.PolicyError, match="The groups are \\['default'\\]"):
        tl.Trainer(network(), loss="mse").fit(X, Y, verbose=0, callbacks=[late])


def test_a_fit_within_a_fit_is_refused():
    trainer = tl.Trainer(network(), loss="mse")
    again = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: trainer.fit(X, Y, verbose=0))
    with pytest.raises(RuntimeError, match=r"`fit` was called within a fit of the same trainer.*`trainer.stop"):
        trainer.fit(X, Y, epochs=2, verbose=0, callbacks=[again])
    assert trainer.fit(X, Y, verbose=0).epoch == [1]


def test_a_run_that_was_stopped_early_is_over_when_it_is_run_again(tmp_path):
    def run(epochs):
        trainer = tl.Trainer(network(), loss="mse", seed=0)
        stopping = callbacks.EarlyStopping(monitor="loss", patience=1, min_delta=10.0, restore_best_weights=True)
        trainer.fit(X, Y, epochs=epochs, verbose=0, callbacks=[stopping], checkpoint=tmp_path)
        return trainer

    first, again = run(5), run(5)
    assert (first.epoch, again.epoch, again.step) == (2, 2, first.step)
    for mine, theirs in zip(again.model.weights, first.model.weights):
        np.testing.assert_array_equal(mine, theirs)  # the best ones, which were put back after the last epoch
    assert run(6).epoch > 2  # of another fit


class Interrupts(callbacks.Callback):
    """Stops the program after an epoch, as Ctrl-C would."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.after:
            raise KeyboardInterrupt


def test_callbacks_go_on_with_a_run_that_was_stopped(tmp_path):
    def run(folder, stop):
        given = [
            callbacks.EarlyStopping(monitor="loss", patience=3, min_delta=10.0, restore_best_weights=True),
            callbacks.ReduceLROnPlateau(monitor="loss", patience=2, factor=0.5, min_delta=10.0),
            callbacks.CSVLogger(folder / "log.csv"),
            Interrupts(stop),
        ]
        trainer = tl.Trainer(network(), loss="mse", seed=0)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit(X, Y, epochs=8, batch_size=8, verbose=0, callbacks=given, checkpoint=folder / "run")
        given[2].csv_file.close()  # as the end of the process does
        return trainer, written(folder)

    folders = [tmp_path / "stopped", tmp_path / "whole"]
    for folder in folders:
        folder.mkdir()
    for stop in (1, 3):
        run(folders[0], stop)
    (trainer, log), (expected, expected_log) = run(folders[0], None), run(folders[1], None)
    assert trainer.epoch == expected.epoch == 4
    assert dict(trainer.learning_rates) == dict(expected.learning_rates)
    assert log == expected_log
    for mine, theirs in zip(trainer.model.weights, expected.model.weights):
        np.testing.assert_array_equal(mine, theirs)  # those of the first epoch, which a process before had seen


def test_a_csv_file_has_one_row_for_an_epoch_that_was_trained_twice(tmp_path):
    def run(fails_at):
        def fail(epoch, logs):
            if epoch == fails_at:
                raise RuntimeError("stopped")

        given = [callbacks.CSVLogger(tmp_path / "log.csv"), callbacks.LambdaCallback(on_epoch_end=fail)]
        saved = tl.Checkpoints(tmp_path / "run", every_epochs=3)
        trainer = tl.Trainer(network(), loss="mse")
        try:
            trainer.fit(X, Y, epochs=6, verbose=0, callbacks=given, checkpoint=saved)
        finally:
            given[0].csv_file.close()

    with pytest.raises(RuntimeError, match="stopped"):
        run(fails_at=4)
    run(fails_at=None)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3", "4", "5"]


def test_it_is_said_that_other_callbacks_than_were_saved_begin_anew(tmp_path, caplog):
    for epochs, given in ((1, [callbacks.EarlyStopping("loss")]), (2, [callbacks.History()])):
        trainer = tl.Trainer(network(), loss="mse")
        trainer.fit(X, Y, epochs=epochs, verbose=0, callbacks=given, checkpoint=tmp_path / "run")
    assert (
        "The callbacks begin anew: they are History, and were EarlyStopping in the checkpoint. Pass the same in the "
        "same order."
    ) in caplog.text
    assert "step 1, after 1 epoch." in caplog.text


def test_callbacks_write_nothing_to_the_users_model():
    model = network()
    model(X)  # what Keras notes of a first call is Keras' own
    before, flags = dict(vars(model)), [layer.trainable for layer in model.layers]
    trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse", optimizer="sgd")
    given = [callbacks.History(), callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)]
    trainer.fit(X, Y, epochs=4, verbose=0, callbacks=given)
    assert trainer.epoch == 2
    assert {name for name in vars(model) if vars(model)[name] is not before.get(name)} == set()
    assert [layer.trainable for layer in model.layers] == flags


def test_another_folder_of_the_program_is_not_taken_from_the_checkpoint(tmp_path):
    def run(epochs, board):
        callback = callbacks.TensorBoard(tmp_path / board, write_graph=False)
        trainer = tl.Trainer(network(), loss="mse")
        trainer.fit(X, Y, epochs=epochs, verbose=0, callbacks=callback, checkpoint=tmp_path / "run",
                    validation_data=HELD_OUT)  # fmt: skip

    run(1, "one")
    run(2, "other")
    found = scalars(tmp_path / "other")
    assert {writer for writer, _ in found} == {"train", "validation"}
    assert found["train", "epoch_loss"][0][0] == found["validation", "epoch_loss"][0][0] == 1
