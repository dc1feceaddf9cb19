"""What the command line answers about models."""

import pytest

import tapeloop as tl
from tests.support import commands
from tests.support.commands import HERE, ask, ask_json

MODEL = f"{HERE}:MODEL"
BODY = f"{MODEL} --policy 'Freeze(\"body\")'"
FRONTIER = f"frontier {BODY} --data {HERE}"

PATHS = """\
path                       type                shape   parameters  Keras' flag
(model)                    Functional                          42
body                       Sequential                          32
body/dense                 Dense                               16
body/dense/kernel          float32             (3, 4)          12  trainable
body/dense/bias            float32             (4,)             4  trainable
body/norm                  BatchNormalization                  16
body/norm/gamma            float32             (4,)             4  trainable
body/norm/beta             float32             (4,)             4  trainable
body/norm/moving_mean      float32             (4,)             4  non-trainable
body/norm/moving_variance  float32             (4,)             4  non-trainable
body/flat                  Flatten                              0
head                       Dense                               10
head/kernel                float32             (4, 2)           8  trainable
head/bias                  float32             (2,)             2  trainable

8 variables, 42 parameters
"""


def test_all_paths(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which is of no use to those who read a pipe
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert ask(f"paths {MODEL}") == (0, PATHS, "")
    status, said = ask_json(f"paths {MODEL}")
    assert status == 0
    assert [entry["path"] for entry in said["paths"]][:3] == ["", "body", "body/dense"]
    assert said["paths"][3] == {
        "path": "body/dense/kernel", "kind": "variable", "type": "float32", "shape": [3, 4], "parameters": 12,
        "keras_flag": "trainable", "paths": ["body/dense/kernel"],
    }  # fmt: skip


def test_what_a_glob_matches():
    status, said, _ = ask(f"paths {MODEL} '**/bias'")
    assert status == 0
    assert [line.split()[0] for line in said.splitlines() if line] == [
        "path", "body/dense/bias", "head/bias", "'**/bias'",
    ]  # fmt: skip
    assert "'**/bias' matches 2 variables, 6 parameters" in said
    assert "'head/bias' matches 1 variable, 2 parameters" in ask(f"paths {MODEL} head/bias")[1]
    assert ask_json(f"paths {MODEL} '*/norm'")[1]["matches"][0]["path"] == "body/norm/gamma"


@pytest.mark.parametrize(
    ("pattern", "hint", "near"),
    [
        ("boddy/dense", "The nearest paths are `body/dense`", "body/dense"),
        ("xyz", "The model has `body`, `head` at the top.", None),
        ("body/flat", "`body/flat` has no variables.", "body/flat"),
    ],
)
def test_a_glob_that_matches_nothing(pattern, hint, near):
    status, said, _ = ask(f"paths {MODEL} {pattern}")
    assert status == 1
    assert said.startswith(f"glob({pattern!r}) matches no variable of the model. {hint}")
    status, said = ask_json(f"paths {MODEL} {pattern}")
    assert (status, said["matches"], said["near"][:1]) == (1, [], [near] if near else [])


def test_a_model_without_variables_yet():
    status, said, _ = ask(f"paths {HERE}:unbuilt")
    assert status == 0
    assert said.endswith("0 variables, 0 parameters\nCall it on a batch first, in the function that makes it.\n")
    assert ask(f"explain {HERE}:unbuilt")[::2] == (
        1,
        "TrainAll() was asked what trains, but the model has no variables. Pass a model with weights; one that makes "
        "them in its first call has them after `fit` has seen a batch, or once it was called on one.\n",
    )


@pytest.mark.parametrize("policy", ["'Freeze(\"body\")'", f"{HERE}:POLICY", f"{HERE}:freeze_body"])
def test_what_trains_is_the_table_of_explain(policy):
    expected = tl.Trainer(commands.MODEL, tl.Freeze("body")).explain()
    assert ask(f"explain {MODEL} --policy {policy}") == (0, f"{expected}\n", "")


def test_the_options_of_explain():
    trainer = tl.Trainer(commands.MODEL, tl.TrainOnly("**/bias"), optimizer="sgd")
    assert ask(f"explain {MODEL} --policy 'TrainOnly(\"**/bias\")' --depth 1 --optimizer sgd")[1].startswith(
        trainer.explain(depth=1)
    )
    said = ask_json(f"explain {BODY}")[1]
    assert said["policy"] == "Freeze(glob('body'))"
    assert said["parameters"] == {"total": 42, "train": 10, "frozen": 24, "non_trainable": 8}
    assert said["groups"] == {"default": {"parameters": 10, "multiplier": 1.0}}
    assert said["inference"] == ["body", "body/dense", "body/norm", "body/flat"]
    assert said["optimizer_state_bytes"] == 80
    assert said["variables"][-1] == {
        "path": "head/bias", "state": "trains", "group": "default", "rule": "Freeze: all else", "parameters": 2,
        "optimizer_state_bytes": 16,
    }  # fmt: skip
    assert [each["state"] for each in said["variables"]] == ["frozen"] * 4 + ["non-trainable"] * 2 + ["trains"] * 2


def test_a_policy_that_does_not_fit_the_model():
    status, said, error = ask(f"explain {MODEL} --policy 'Freeze(\"boddy\")'")
    assert (status, said) == (1, "")
    assert error.startswith("glob('boddy') in Freeze(glob('boddy')) matches no variable of the model. The nearest")


def test_what_would_be_cached():
    status, said, _ = ask(f"{FRONTIER}:classes")
    lines = said.splitlines()
    assert status == 0
    assert lines[:2] == ["Before the frontier: `body`", "Features: 20 bytes an example, 120 bytes for 6 examples"]
    assert lines[2].startswith("Share of a step's forward and backward pass that they save: ")


def test_nothing_to_cache():
    status, said = ask_json(f"frontier {MODEL} --data {HERE}:regression --batch-size 4")
    assert (status, said["submodels"], said["bytes"]) == (1, [], None)
    assert said["obstacles"] == ["`body/dense/kernel` trains and comes first"]


@pytest.mark.parametrize("loss", ["mae", f"{HERE}:absolute", "keras.losses.MeanSquaredError()"])
def test_a_loss_by_name_and_by_expression(loss):
    assert ask_json(f"{FRONTIER}:regression --loss '{loss}'")[1]["bytes_per_example"] == 24


def test_the_default_loss_of_several_outputs():
    # Squared error for the first, cross-entropy for the second.
    line = f"frontier {HERE}:two_outputs --policy 'Freeze(\"head_1\")' --data {HERE}:two_targets"
    status, said = ask_json(line)
    assert status == 0
    assert said["submodels"] == ["head_1"]


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ("wrong_shape", 1, "the targets are (None, 5) float32, the model's output is (None, 2) float32"),
        ("wrong_shape", 1, "no default loss fits these shapes: give one by --loss"),
        ("no_targets", 1, "The loss needs targets, but the batch has none."),
        ("regression --loss None", 1, "There is no loss: `loss` is None and no layer adds one."),
        ("regression --loss mean_sqared_error", 2, "Did you mean 'mean_squared_error'?"),
        ("MISSING", 1, "must be a `tf.data.Dataset`, arrays `(x, y)`"),
    ],
)
def test_data_and_losses_that_do_not_fit(options, status, text):
    found, said, error = ask(f"{FRONTIER}:{options}")
    assert (found, said) == (status, "")
    assert text in error
