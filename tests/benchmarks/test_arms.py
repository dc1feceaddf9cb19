"""The arms of the benchmark suite as they are, small: what they train, that they compute the same, what is counted."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import tapeloop as tl
from benchmarks import arms, cases, compare, kinds, results, runner
from benchmarks.cases import PEERS, Case
from benchmarks.workloads import freeze, make, policy_of
from tests.support.params import params
from tests.support.planted import make_arm as make_planted

ROOT = pathlib.Path(__file__).parents[2]
HERE = "tests.benchmarks.test_arms"
layers = keras.layers
MLP = Case("mlp", "head", "tapeloop", 8, steps=5, rounds=2)


def own_model():
    """What `--model tests.benchmarks.test_arms:own_model` measures."""
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, name="body"), layers.Dense(1)])


def two_headed_model():
    """A model with two outputs, penalties and a layer that adds a loss."""
    inputs = keras.Input((3,))
    body = layers.Dense(4, kernel_regularizer="l2", name="body")(inputs)
    body = layers.ActivityRegularization(l2=0.1, name="activity")(body)
    heads = [layers.Dense(width, kernel_regularizer="l2", name=f"head_{width}") for width in (1, 2)]
    return keras.Model(inputs, [head(body) for head in heads])


def dropping_model():
    """A model with Dropout in a part that may be frozen."""
    backbone = keras.Sequential([layers.Dense(4), layers.Dropout(0.5)], name="backbone")
    return keras.Sequential([keras.Input((3,)), backbone, layers.Dense(2)])


def model_of_any_length():
    """A model that takes sequences of any length."""
    return keras.Sequential([keras.Input((None, 3)), layers.GlobalAveragePooling1D(), layers.Dense(1)])


def model_of_tokens():
    """A model of whole numbers."""
    return keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(7, 2), layers.Flatten(), layers.Dense(1)]
    )


class Subclassed(keras.Model):
    """A model that does not say what its inputs are."""

    def __init__(self):
        super().__init__()
        self.body, self.head = layers.Dense(4, name="body"), layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.body(x))


def sequences(count):
    return np.ones((count, 5, 3), "float32"), np.ones((count, 1), "float32")


def vectors(count):
    return np.ones((count, 3), "float32"), np.zeros(count, "int64")


def own_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Biases(tl.VariablePolicy):
    """A policy of the user's own, for `--policy tests.benchmarks.test_arms:Biases`."""

    def group(self, variable):
        return "default" if variable.name == "bias" else None


def own(name, policy="TrainAll()", **options):
    given = {"model": f"{HERE}:{name}", "data": "", "loss": "", "optimizer": "", "policy": policy, **options}
    return Case("own", policy, "tapeloop", 4, steps=2, own=tuple(given.items()))


def finished(generator):
    """What a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def test_a_process_measures_the_time_and_memory_of_an_arm(tmp_path):
    chosen = [
        dataclasses.replace(MLP, arm=arm, kind=kind) for kind in ("memory", "step") for arm in ("full", "tapeloop")
    ]
    made, left = runner.run(chosen, tmp_path / "results.jsonl", show=lambda line: None)
    assert left == []
    assert not [row["error"] for row in made if row["status"] != "ok"]
    found = {(row["case"]["arm"], row["case"]["kind"]): row for row in made}
    for (_, kind), row in found.items():
        assert row["peak"] >= row["persistent"] > row["weight_bytes"] > 0
        assert row["growth"] == 0 or kind == "step"
        if kind == "step":
            assert len(row["rounds_ms"]) == 2
            assert row["first_step_s"] > row["fixed_ms"] / 1e3
    head, all_of_it = 2 * 4 * (128 * 10 + 10), 2 * 4 * (64 * 128 + 128 + 128 * 128 + 128 + 1290)
    sizes = [found[arm, "memory"]["optimizer_bytes"] for arm in ("tapeloop", "full")]
    assert sizes == [4 + 8 + head, 4 + 8 + all_of_it]  # the learning rate and the count beside the moments
    assert found["tapeloop", "memory"]["nodes"] < found["full", "memory"]["nodes"]


ALL_ARMS = ("hand+guard", "tapeloop", "tapeloop+cache", "tapeloop+plain", "keras")


@pytest.mark.parametrize(
    ("case", "arms_of"),
    [
        (dataclasses.replace(MLP, steps=2), ALL_ARMS),
        pytest.param(Case("mobilenetv2", "head", "tapeloop", 2, 32, steps=2), ALL_ARMS, marks=pytest.mark.slow),
        pytest.param(Case("vit", "norm", "tapeloop", 2, 16, steps=2, scale=0.3), ALL_ARMS, marks=pytest.mark.slow),
        (own("two_headed_model", "TrainOnly('head_*')"), ("tapeloop", "keras")),
        pytest.param(own("two_headed_model"), ("tapeloop", "keras", "full", "subset"), marks=pytest.mark.slow),
    ],
    ids=["mlp", "mobilenetv2", "vit", "two heads", "two heads, all"],
)
def test_arms_compute_the_same(case, arms_of):
    found = kinds.compared(case, arms_of)
    assert found["invalid"] == {}
    assert set(found["errors"]) == {arm for arm in arms_of if cases.is_there(dataclasses.replace(case, arm=arm))}
    assert all(error["gradients"] < 1e-3 for error in found["errors"].values())


def test_arms_of_an_own_model_whose_frozen_backbone_drops_out_compute_the_same():
    case = own("dropping_model", "Freeze('backbone')", data=f"{HERE}:vectors", loss=f"{HERE}:own_loss")
    found = kinds.compared(dataclasses.replace(case, kind="equivalence"), kinds.COMPARED)
    assert found["said"] == "5 arms compute the same"


def test_a_frozen_network_tells_inputs_apart_when_its_gradients_are_compared():
    case = Case("mobilenetv2", "head", "hand", 4, 32, steps=2)
    gradients = kinds._stepped(case)["gradients"]
    norms = [np.linalg.norm(gradient) for gradient in gradients.values()]
    assert min(norms) > 1e-2 * max(norms)  # or those of the kernel would be lost beside those of the bias


def test_an_arm_that_computes_something_else_is_found(monkeypatch):
    plain = arms.keras_fit

    def wrong(case, work, optimizer):
        return plain(case, dataclasses.replace(work, loss=Larger()), optimizer)

    monkeypatch.setattr(arms, "keras_fit", wrong)
    found = kinds.compared(dataclasses.replace(MLP, steps=2), ("tapeloop", "keras"))
    assert list(found["invalid"]) == ["keras"]
    assert "its gradients differ from those of `hand` by 0.01 of their norm" in found["said"]


class Larger(keras.losses.Loss):
    """The loss, and a hundredth of it."""

    def call(self, y, outputs):
        return 1.01 * keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


@pytest.mark.parametrize("planted", [False, True])
def test_a_forward_pass_too_many_in_the_step_is_an_alarm_each_time_and_the_same_code_is_none(planted):
    case = dataclasses.replace(MLP, kind="memory", steps=2)

    def row_of(make):
        return results.row_of(case, "ok", 1.0, nodes=kinds.count_nodes(make(case)), peak=0, persistent=0, growth=0)

    before = [row_of(arms.make_arm)]
    for _ in range(2):
        verdict = compare.compare(before, [row_of(make_planted if planted else arms.make_arm)])
        assert bool(verdict.worse) == planted
        assert not planted or "nodes in the step's graph" in verdict.worse[0]


COMPARISONS = int(os.environ.get("BENCHMARK_COMPARISONS", "2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes"),
    [(MLP, 3), (Case("mobilenetv2", "head", "tapeloop", 4, 32), 0)],
    ids=["mlp", "mobilenetv2, nodes and bytes alone"],
)
def test_comparisons_of_measurements_raise_alarms_of_a_forward_pass_too_many_alone(case, processes):
    case = dataclasses.replace(case, rounds=3, steps=25)

    def measured(first=0, kind="memory"):
        found = list(runner.drive([dataclasses.replace(case, kind=kind)], time.monotonic() + 600))
        for process in range(first, first + processes * (kind == "memory")):
            some = [dataclasses.replace(case, arm=arm, process=process) for arm in ("forward", "tapeloop")]
            found += runner.drive(some, time.monotonic() + 600)
        assert not [row["error"] for row in found if row["status"] != "ok"]
        found[0]["case"]["kind"] = "memory"
        return found

    runner.prepare([case])
    sets = [measured(3 * number) for number in range(COMPARISONS + 2)]
    for before, after, again in zip(sets, sets[1:], sets[2:]):
        assert compare.confirmed(compare.compare(before, after), compare.compare(before, again)) == []
    for before in sets[:COMPARISONS]:
        verdict = compare.compare(before, measured(kind="tests.support.planted:memory"))
        assert any("nodes in the step's graph" in line for line in verdict.worse)


CHANGED = [
    "subset", "hand+guard+dataset", "hand+epochwise", "tapeloop+dataset", "tapeloop+metrics", "tapeloop+onbatch",
    "tapeloop+epochwise", "tapeloop+micro2", "tapeloop+plain", "tapeloop+watches", "tapeloop+saved", "keras+tuned",
    "keras+onbatch", "keras+tuned+dataset", "keras+looks", "keras+metrics", "forward+xla", "hand+xla", "full+xla",
    "tapeloop+xla",
]  # fmt: skip
QUICK = ["hand+guard+dataset", "tapeloop+dataset", "tapeloop+onbatch", "tapeloop+micro2", "keras+tuned", "hand+xla"]


@pytest.mark.parametrize("arm", params(CHANGED, [arm for arm in CHANGED if arm not in QUICK]))
def test_every_change_of_an_arm_trains(arm):
    run = arms.make_arm(dataclasses.replace(MLP, arm=arm, steps=2))
    run(1)
    assert np.isfinite(run(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "selection", "arm"),
    [
        ("gan", "all", "tapeloop"), ("gan", "all", "full"), ("resnet50", "head", "hand+features"),
        ("encoder", "all", "tapeloop+remat"), ("unet", "last_block", "tapeloop"), ("gpt2-small", "lora", "hand"),
        ("bert-base", "last_block", "tapeloop"), ("vit-b16", "head", "tapeloop+cache"), ("vit-b16", "adapters", "hand"),
    ],
)  # fmt: skip
def test_every_workload_trains_when_it_is_shrunk(workload, selection, arm):
    size = 16 if workload in ("encoder", "gpt2-small", "bert-base") else 32
    run = arms.make_arm(Case(workload, selection, arm, 2, size, steps=2, scale=0.1))
    run(1)
    assert np.isfinite(run(2))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("tests.nowhere:model", {}, "`--model` must be `package.module:function`. Received: 'tests.nowhere"),
        (f"{HERE}:own_model", {"policy": "Freeze("}, "`--policy` must be a policy such as"),
        (f"{HERE}:own_loss", {}, "must return a Keras model. It returned"),
        (f"{HERE}:model_of_any_length", {}, "has a dimension that it does not know: .* Give data.*`--data package"),
        (f"{HERE}:model_of_tokens", {}, "is of whole numbers, and which of them is unknown. Give data"),
        (f"{HERE}:Subclassed", {}, "does not say what its inputs are, as a subclassed one does not. Give data"),
        (f"{HERE}:own_model", {"loss": "Nothing"}, "`--loss` must be a class of `keras.losses`.* Received: 'Nothing'"),
        (f"{HERE}:own_model", {"optimizer": "none"}, "`--optimizer` must be the name of .* Received: 'none'"),
        (f"{HERE}:own_model", {"data": f"{HERE}:own_model"}, "takes 0 positional arguments"),
    ],
)
def test_what_an_own_model_does_not_say_is_asked_for(model, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        make(own("", **{"model": model, **options}))


def test_an_own_model_comes_with_its_data_loss_and_optimizer():
    assert arms.make_arm(own("model_of_any_length", data=f"{HERE}:sequences"))(2) >= 0
    arm = arms.make_arm(own("own_model", f"{HERE}:Biases"))
    assert np.isfinite(arm(2))
    assert isinstance(arm.work.policy, Biases)
    case = own("Subclassed", "Freeze('body')", data=f"{HERE}:vectors", loss=f"{HERE}:own_loss", optimizer="sgd")
    arm = arms.make_arm(case)
    assert np.isfinite(arm(2))
    assert isinstance(arm.optimizers[0], keras.optimizers.SGD)
    assert np.isfinite(arms.make_arm(dataclasses.replace(case, arm="keras"))(2))


@pytest.mark.slow
def test_an_own_model_by_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "run", "--policy", 'Freeze("body")', "--batch", "4", "--steps", "5"]

    def run(model, *more):
        asked = [*command, "--model", f"{HERE}:{model}", "--out", str(tmp_path / f"{model}.jsonl"), *more]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=300)

    result = run("own_model", "--processes", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = results.load(tmp_path / "own_model.jsonl")
    assert {row["case"]["arm"] for row in rows} == set(cases.OWN_ARMS)
    assert "step-time.png" in {path.name for path in (tmp_path / "own_model").iterdir()}
    result = run("Subclassed", "--arms", "tapeloop", "--processes", "1")
    assert result.returncode == 1
    assert "FAILED:" in result.stderr
    assert "does not say what its inputs are" in result.stderr


@pytest.mark.parametrize("workload", params(["mlp", "vit", "unet", "lstm"], ["vit", "unet", "lstm"]))
def test_every_selection_of_a_workload_trains_something(workload):
    size = {"mlp": 0, "vit": 16, "unet": 16, "lstm": 4}[workload]
    counts = {}
    for selection in cases.SELECTIONS[workload]:
        work = make(Case(workload, selection, "tapeloop", 2, size, steps=1, scale=0.3))
        counts[selection] = len(tl.Trainer(work.model, work.policy).selection.trained)
    assert counts["head"] == 2
    assert all(2 <= count <= counts["all"] for name, count in counts.items() if name not in cases.ADDED)
    assert len(set(counts.values())) > 2


@pytest.mark.slow
def test_the_stages_of_the_mobilenet_are_a_chain_that_ends_near_the_stem():
    model = make(Case("mobilenetv2", "all", "tapeloop", 1, 32, steps=1)).model
    trained = []
    for selection in cases.UNFREEZE:
        selected = tl.Trainer(model, policy_of(Case("mobilenetv2", selection, "", 1))).selection.trained
        trained.append({variable.path for variable in selected})
    assert all(less < more for less, more in itertools.pairwise(trained))
    everything = {variable.path for variable in tl.Trainer(model).selection.trained}
    assert {path.split("/")[1] for path in everything - trained[-1]} == {
        "Conv1", "bn_Conv1", "expanded_conv_depthwise", "expanded_conv_depthwise_BN", "expanded_conv_project",
        "expanded_conv_project_BN",
    }  # fmt: skip


@pytest.mark.parametrize("arm", ["tapeloop+cache", "hand+features"])
def test_a_round_on_features_has_as_many_steps_as_are_asked_for(arm):
    made = arms.make_arm(dataclasses.replace(MLP, arm=arm, steps=10))
    for steps in (1, 2, 10):
        assert np.isfinite(made(steps))
    assert int(made.optimizers[0].iterations.numpy()) == 13


def test_flags_freeze_what_is_not_chosen_and_nothing_else():
    model = make(Case("vit", "norm", "hand", 1, 16, steps=1, scale=0.3)).model
    norms = [v for v in model.variables if "norm" in v.path]
    assert len(norms) == 8
    freeze(model, norms)
    assert {id(variable) for variable in model.trainable_variables} == {id(variable) for variable in norms}


def test_the_largest_batch_is_found_to_a_sixteenth(monkeypatch):
    monkeypatch.setattr(kinds, "fits", lambda case, batch: batch <= 700)
    monkeypatch.setattr(kinds, "set_up", lambda case: "")
    found = kinds.capacity(dataclasses.replace(MLP, batch=1, kind="capacity"))
    assert 700 * 15 / 16 <= found["largest_batch"] <= 700
    monkeypatch.setattr(kinds, "fits", lambda case, batch: False)
    assert kinds.capacity(dataclasses.replace(MLP, batch=1, kind="capacity"))["largest_batch"] == 0


@pytest.mark.slow
def test_memory_is_capped_and_digits_are_learnt(tmp_path):
    small = Case("mlp", "all", "tapeloop", 64, width=8.0, steps=1, kind="capacity", cap_mb=48)
    chosen = [small, Case("digits", "head", "tapeloop", 32, kind="accuracy")]
    (capped, learnt), _ = runner.run(chosen, tmp_path / "results.jsonl", show=lambda line: None)
    assert 64 <= capped["largest_batch"] < kinds.LARGEST_BATCH
    assert learnt["accuracy"] >= kinds.ACCURACY
    assert learnt["seconds_to_accuracy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["torch", "torch+compile", "lightning", "jax"])
def test_other_frameworks_are_timed_where_they_are_installed(arm, tmp_path):
    for package in PEERS[arm.split("+")[0]][1]:
        pytest.importorskip(package)
    case = dataclasses.replace(MLP, arm=arm)
    (row,), _ = runner.run([case], tmp_path / "results.jsonl", show=lambda line: None)
    assert row["status"] == "ok", row["error"]
    assert row["step_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["resnet50", "encoder", "vit-b16", "gpt2-small"])
def test_the_models_of_other_frameworks_have_as_many_weights(workload):
    peers = pytest.importorskip("benchmarks.torch_peer", reason="needs PyTorch")
    case = Case(workload, "all", "torch", 1, {"encoder": 16, "gpt2-small": 16}.get(workload, 32), steps=1, scale=0.2)
    backbone, head, *_ = peers.make(case)
    theirs = sum(parameter.numel() for parameter in [*backbone.parameters(), *head.parameters()])
    ours = sum(int(np.prod(variable.shape)) for variable in make(case).model.trainable_variables)
    assert theirs == ours
