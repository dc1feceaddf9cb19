"""Tuning from end to end, in processes of its own; and what is refused before any of them runs."""

import inspect
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.tuning import environment, measurement, server, tune
from tapeloop.tuning.importable import Main, Unsendable
from tests.support import tuned
from tests.support.snapshot import snapshot

ROOT = pathlib.Path(__file__).parents[2]
X, Y = tuned.data()


def deadly():
    """A trainer whose frozen part kills its process where it computes in bfloat16."""
    return tl.Trainer(tuned.mlp(tuned.Deadly(name="deadly")), tl.Freeze("base", "deadly"), loss="mse", seed=0)


def test_running_out_of_memory_is_a_row_and_nothing_of_the_trainer_moves(capfd):
    trainer = deadly()
    trainer.fit(X, Y, verbose=0)
    before = snapshot(trainer), trainer.model.get_weights(), np.random.get_state()[1].tolist(), trainer.policy
    draws = tf.random.get_global_generator().state.numpy().tolist(), sys.modules["__main__"], os.environ.copy()
    tuning = trainer.tune(X, Y, options=["frozen_dtype", "fold_frozen"], time_limit=200)
    assert snapshot(trainer) == before[0]
    for one, other in zip(trainer.model.get_weights(), before[1]):
        np.testing.assert_array_equal(one, other)
    assert (np.random.get_state()[1].tolist(), trainer.policy) == before[2:]
    now = tf.random.get_global_generator().state.numpy().tolist(), sys.modules["__main__"], os.environ.copy()
    assert (now[0], now[1] is draws[1], now[2]) == (draws[0], True, draws[2])

    assert [row.label for row in tuning.rows] == ["as it is", "fold_frozen=False", "frozen_dtype='bfloat16'"]
    assert [row.note for row in tuning.rows] == ["", "", "out of memory"]
    assert all(row.step_ms > 0 and row.first_step_s > 0 and row.peak_bytes > 0 for row in tuning.rows[:2])
    assert tuning.rows[0].losses == pytest.approx(tuning.rows[1].losses, rel=1e-3)
    assert set(tuning.options) <= {"fold_frozen"}
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == [row.label for row in tuning.rows]
    assert lines[2] == "frozen_dtype='bfloat16'".ljust(28) + " out of memory"
    assert "\n".join(lines[3:]) == repr(tuning)
    assert lines[-1].startswith("fastest          ")


class Answers:
    """A server that answers as it was told to, in place of one that measures."""

    def __init__(self, *found, ratios=()):
        self.found = list(found)
        self.ratios = list(ratios)
        self.asked = []
        self.compared = []

    def __call__(self, parcel):
        return self

    def ask(self, options, first_s, limit_s, fastest_ms):
        self.asked.append((options, fastest_ms))
        return {"exitcode": 0, **self.found.pop(0)}

    def compare(self, several, limit_s):
        self.compared.append(several)
        return self.ratios.pop(0) if self.ratios else None

    def close(self):
        self.closed = True


FACTS = {"facts": tuned.facts(folds=True, is_frozen=True, can_lower=True, blocks="blocks/*")}


def measured(step_ms, *, losses=(1.0, 0.5), **others):
    return {"first_step_s": 1.0, "losses": losses, "peak_bytes": 2**20, "step_ms": step_ms, **others}


def answered(monkeypatch, *found, **options):
    answers = Answers(*found)
    monkeypatch.setattr(tune, "Server", answers)
    return answers, deadly().tune(X, Y, verbose=0, **options)


def test_what_gains_is_tried_together_before_what_is_only_shown(monkeypatch):
    answers, tuning = answered(
        monkeypatch,
        FACTS | measured(10.0),
        measured(7.0),
        measured(8.0),
        measured(6.0),
        measured(12.0),
        measured(4.0, losses=(1.05, 0.5)),
        measured(20.0),
    )
    both = {"jit_compile": True, "fold_frozen": False}
    assert answers.asked == [
        ({}, None),
        ({"jit_compile": True}, 10.0),
        ({"fold_frozen": False}, 7.0),
        (both, 7.0),
        ({"steps_per_call": 1}, 6.0),
        ({"frozen_dtype": "bfloat16"}, 6.0),
        ({"remat": "blocks/*"}, 4.0),
    ]
    assert answers.closed
    assert answers.compared == [[{}, {"jit_compile": True}, {"fold_frozen": False}], [{}, both]]
    assert tuning.options == both
    assert tuning.rows[5].note == "lower precision"
    assert repr(tuning).splitlines()[-2:] == [
        "fastest          Trainer(..., jit_compile=True, fold_frozen=False)",
        "faster still     frozen_dtype='bfloat16', in lower precision: `lower_precision=True` counts it",
    ]


FAILURES = {
    "stopped after 12 s": {"first_step_s": 1.0, "stopped_s": 12.3, "exitcode": -9},
    "stopped after 12 s, in its first step": {"stopped_s": 12.3, "exitcode": -9},
    "out of memory": {"exitcode": -9},
    "ValueError: no": {"error": "ValueError: no"},
    "ended by SIGABRT": {"exitcode": -6},
    "ended with exit code 3": {"exitcode": 3},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_candidate_that_fails_is_a_row_that_says_how(monkeypatch, failure):
    _, tuning = answered(monkeypatch, FACTS | measured(10.0), FAILURES[failure], options=["jit_compile"])
    assert [row.note for row in tuning.rows] == ["", failure]
    assert repr(tuning).splitlines()[-1] == "fastest          the trainer as it is, the only one that could be measured"


def test_the_trainer_as_it_is_may_fail_and_others_not(monkeypatch):
    _, tuning = answered(monkeypatch, FACTS | {"out_of_memory": True}, measured(7.0), options=["jit_compile"])
    assert tuning.options == {"jit_compile": True}
    _, tuning = answered(monkeypatch, {"error": "ValueError: no"})
    assert (tuning.options, len(tuning.rows)) == ({}, 1)
    assert repr(tuning).splitlines()[-1] == "fastest          not known: no candidate could be measured"


def test_a_candidate_of_other_losses_is_not_picked_and_one_without_time_is_named(monkeypatch):
    answers = [FACTS | measured(10.0), measured(5.0, losses=(1.1, 0.5))]
    clock = iter([0.0, 0.0, 1.0, 56.5, 56.6, 57.0])
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    _, tuning = answered(monkeypatch, *answers, options=["jit_compile", "steps_per_call"])
    assert (tuning.options, tuning.rows[1].note) == ({}, "other losses")
    assert repr(tuning).splitlines()[-1] == "no time left for steps_per_call=1"


@pytest.mark.parametrize(
    ("step_ms", "ratio", "compared", "options"),
    [
        (9.0, 1.01, True, {}),  # the machine was busy when the trainer as it is was measured
        (11.0, 0.8, True, {"jit_compile": True}),
        (11.0, None, True, {}),  # it failed, or there was no time
        (4.0, None, False, {"jit_compile": True}),
        (16.0, None, False, {}),
    ],
)
def test_what_is_about_as_fast_is_compared_in_turns(monkeypatch, step_ms, ratio, compared, options):
    answers = Answers(FACTS | measured(10.0), measured(step_ms), ratios=[ratio and [1.0, ratio]])
    monkeypatch.setattr(tune, "Server", answers)
    tuning = deadly().tune(X, Y, verbose=0, options=["jit_compile"])
    assert answers.compared == ([[{}, {"jit_compile": True}]] if compared else [])
    assert tuning.options == options
    assert tuning.rows[1].step_ms == (10.0 * ratio if ratio else step_ms)


@pytest.mark.slow
def test_candidates_take_turns_and_one_that_fails_ends_them():
    trainer = deadly()
    serving = server.Server(tune.packed(trainer, vars(trainer)["_made"], trainer.selection, [(X, Y)]))
    try:
        ratios = serving.compare([{}, {"steps_per_call": 1}], 60)
        assert serving.compare([{}, {"frozen_dtype": "bfloat16"}], 60) is None
        assert serving.compare([{}, {}], 0.01) is None
    finally:
        serving.close()
    assert ratios[0] == 1.0
    assert ratios[1] > 0


def test_a_candidate_is_stopped_at_its_time_and_the_next_is_measured():
    trainer = tl.Trainer(tuned.mlp(), loss="mse")
    parcel = tune.packed(trainer, vars(trainer)["_made"], trainer.selection, [(X, Y)])
    serving = server.Server(parcel)
    try:
        first = serving.ask({}, 0.05, 60, None)
        second = serving.ask({}, 60, 60, 1e-6)  # far slower than that: not measured to the end
    finally:
        serving.close()
    assert first["stopped_s"] >= 0.05
    assert first.keys() <= {"facts", "stopped_s", "exitcode"}
    assert second["is_done"]
    assert second["exitcode"] == 0
    assert not serving._process.is_alive()


def test_a_server_that_has_died_is_told_of():
    serving = server.Server(b"")
    serving._process.kill()
    with pytest.raises(
        RuntimeError, match=r"^The process that `tune` starts candidates from ended with exit code -9: "
    ):
        serving.ask({}, 60, 60, None)
    serving.close()


def test_a_step_is_the_difference_of_longer_and_shorter_fits():
    fits = []

    def fit(steps):
        fits.append(steps)
        return 0.5 + 0.01 * steps

    assert measurement._step(fit, float("inf")) == pytest.approx(0.01)
    assert max(fits) <= 3 * 0.3 / 4 / 0.01


def test_batches_of_one_size_are_arrays_and_others_a_list():
    found = measurement.data_of([({"a": X[:4], "b": None}, Y[:4]), ({"a": X[4:8], "b": None}, Y[4:8])])
    assert found["batch_size"] == 4
    np.testing.assert_array_equal(found["data"][0]["a"], X[:8])
    batches = [(X[:4], Y[:4]), (X[:3], Y[:3])]
    assert measurement.data_of(batches) == {"data": batches, "batch_size": None}
    assert measurement.data_of([[X[:4]]])["batch_size"] is None
    assert measurement.data_of([(X[:4], np.float32(1))])["batch_size"] is None


def test_the_last_batch_is_left_out_if_it_is_smaller():
    loader = tune.DataSpec("x", (X[:40], Y[:40]), 16).loader()
    assert [len(x) for x, _ in tune._first_batches(loader)] == [16, 16]


WRONG = {
    "options": [("jit", "'jit'"), ([], r"\[\]"), (["jit"], r"\['jit'\]")],
    "time_limit": [(0, "0"), (float("inf"), "inf"), ("60", "'60'")],
}


@pytest.mark.parametrize(("name", "value", "said"), [(n, v, s) for n, cases in WRONG.items() for v, s in cases])
def test_wrong_arguments_are_refused(name, value, said):
    with pytest.raises(ValueError, match=rf"^`{name}` must be .* Received: {said}\.$"):
        tl.Trainer(tuned.mlp(), loss="mse").tune(X, Y, **{name: value})


def test_what_stands_in_the_way_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(tune, "Server", lambda parcel: pytest.fail("a process was started"))
    trainer = tl.Trainer(tuned.mlp(), loss="mse")
    with pytest.raises(tl.DataError, match="`tune` would take batches from an iterator, which a fit would then miss"):
        trainer.tune(iter([(X, Y)]))
    with pytest.raises(ValueError, match="`run_eagerly=True`, whose steps no option makes faster"):
        tl.Trainer(tuned.mlp(), loss="mse", run_eagerly=True).tune(X, Y)
    with pytest.raises(
        TypeError, match=r"^`tune` measures in processes of their own, and cannot send this one: the arg"
    ):
        tl.Trainer(tuned.mlp(), loss=lambda y, outputs: 0.0).tune(X, Y)
    monkeypatch.setattr(Main, "is_running", True)
    with pytest.raises(RuntimeError, match="this call of `tune` stands in it unguarded"):
        trainer.tune(X, Y)


def test_a_call_within_a_fit_is_refused():
    trainer, said = tl.Trainer(tuned.mlp(), loss="mse"), []

    class Tunes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(RuntimeError, match="`tune` was called within a fit of the same trainer") as caught:
                trainer.tune(X, Y)
            said.append(caught)

    trainer.fit(X, Y, callbacks=[Tunes()], verbose=0)
    assert said


def test_a_gpu_whose_memory_is_taken_is_refused(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [gpu])
    monkeypatch.setattr(tf.config, "get_logical_device_configuration", lambda device: None)
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", lambda device: False)
    with pytest.raises(
        RuntimeError, match=r"^TensorFlow has taken the whole memory of /physical_device:GPU:0 for this"
    ):
        environment.check_gpu_memory()
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", lambda device: True)
    environment.check_gpu_memory()


SCRIPT = """
    import os
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras, numpy as np, tapeloop as tl

    class Own(keras.layers.Layer):
        def call(self, x):
            return x

    print("runs", flush=True)
    with open("runs.txt", "a") as file:
        file.write("x")

    def main(layers):
        model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
        trainer = tl.Trainer(model, loss="mse")
        tuning = trainer.tune(np.ones((64, 4)), np.ones((64, 2)), options=["jit_compile"], verbose=0)
        print([row.note for row in tuning.rows])

"""


def run(tmp_path, ending):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(SCRIPT) + ending)
    environment_ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment_
    )
    return result, len((tmp_path / "runs.txt").read_text())


@pytest.mark.slow
def test_a_script_without_a_guard_that_defines_a_layer_is_refused(tmp_path):
    result, runs = run(tmp_path, "main([Own()])\n")
    assert runs == 1
    assert result.stderr.splitlines()[-1].startswith(
        "TypeError: `tune` measures in processes of their own, and cannot send this one: `Own` is defined in the "
        "script that runs, which another process must run to find it, and would train from the start: put the "
    )


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once_if_nothing_of_it_is_needed(tmp_path):
    result, runs = run(tmp_path, "main([])\n")
    assert (result.stdout.splitlines(), runs) == (["runs", "['', '']"], 1)


@pytest.mark.slow
def test_a_layer_of_a_guarded_script_is_found(tmp_path):
    result, runs = run(tmp_path, "if __name__ == '__main__':\n    main([Own()])\n")
    assert result.stdout.splitlines() == ["runs", "['', '']"], result.stderr
    assert runs in (3, 5)  # the program, and each of two candidates, perhaps once more in turns


@pytest.mark.slow
def test_a_call_beside_the_guard_is_refused_in_the_process_that_finds_it(tmp_path):
    result, _ = run(tmp_path, "main([Own()])\nif __name__ == '__main__':\n    pass\n")
    assert "this call of `tune` stands in it unguarded" in result.stderr.splitlines()[-1]


def test_the_trainer_says_how_it_is_called_though_it_takes_down_its_arguments():
    assert list(inspect.signature(tl.Trainer).parameters)[:3] == ["model", "policy", "loss"]
    assert list(inspect.signature(tuned.Tempered).parameters)[:2] == ["model", "temperature"]


def test_an_error_of_pickling_is_one_that_cannot_be_sent():
    trainer = tuned.Tempered(tuned.mlp(), 0.5, table=(x for x in ()))
    with pytest.raises(Unsendable, match=r"^the argument `table` of `Tempered`: TypeError: cannot pickle"):
        tune.packed(trainer, vars(trainer)["_made"], trainer.selection, [])
