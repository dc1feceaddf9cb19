"""The benchmark suite on real processes, small."""

import itertools
import pathlib
import subprocess
import sys

import keras
import pytest

import tapeloop as tl
from benchmarks import cases, runner
from benchmarks.cases import Case, Group
from benchmarks.results import Results
from benchmarks.worker import freeze, make_arm
from benchmarks.workloads import make, policy_of
from tests.support.params import params

ROOT = pathlib.Path(__file__).parents[2]
MLP = Group("mlp", "head", 8, steps=3, rounds=2)
layers = keras.layers


def own_model():
    """What `--model tests.benchmarks.test_runs:own_model` measures."""
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, name="body"), layers.Dense(1)])


def two_headed_model():
    """A model with two outputs, penalties and a layer that adds a loss."""
    inputs = keras.Input((3,))
    body = layers.Dense(4, kernel_regularizer="l2", name="body")(inputs)
    body = layers.ActivityRegularization(l2=0.1, name="activity")(body)
    heads = [layers.Dense(width, kernel_regularizer="l2", name=f"head_{width}") for width in (1, 2)]
    return keras.Model(inputs, [head(body) for head in heads])


def broken_model():
    raise RuntimeError("this model cannot be built")


def test_a_run_measures_what_can_be_and_goes_on(tmp_path):
    broken = Group("own", "TrainAll()", 8, steps=2, rounds=1, model="tests.benchmarks.test_runs:broken_model")
    chosen = [
        (broken, [Case(broken, "tapeloop")]),
        (MLP, [Case(MLP, arm) for arm in ("forward", "full", "subset", "selective", "tapeloop", "keras")]),
    ]
    results = Results(tmp_path / "results.json", "a command")
    runner.run(chosen, results, "TrainAll()", show=lambda line: None)
    failed, *rows = Results.load(results.path).rows
    assert "RuntimeError: this model cannot be built" in failed["error"]
    assert results.machine["tensorflow"]
    by_arm = {row["arm"]: row for row in rows}
    assert not [row for row in rows if "error" in row or "invalid" in row]
    assert all(row["step_ms"] > 0 and row["peak"] >= row["persistent"] > 0 for row in rows)
    head, all_of_it = 4 + 8 + 2 * 4 * (128 * 10 + 10), 4 + 8 + 2 * 4 * (64 * 128 + 128 + 128 * 128 + 128 + 1290)
    assert by_arm["tapeloop"]["state_bytes"] == by_arm["selective"]["state_bytes"] == head
    assert by_arm["full"]["state_bytes"] == all_of_it
    assert by_arm["forward"]["ops"] < by_arm["tapeloop"]["ops"] < by_arm["full"]["ops"]
    assert by_arm["tapeloop"]["growth"] == 0
    losses = [by_arm[arm]["loss"] for arm in ("subset", "selective", "tapeloop", "keras")]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.slow
def test_a_users_own_model_by_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "run", "--model", "tests.benchmarks.test_runs:own_model", "--policy"]
    arguments = ['Freeze("body")', "--batch", "4", "--steps", "2", "--out", str(tmp_path / "own.json")]
    result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = Results.load(tmp_path / "own.json").rows
    assert [row["arm"] for row in rows] == list(cases.OWN_MODEL_ARMS)
    assert not [row for row in rows if "error" in row or "invalid" in row]
    assert "step-time.png" in {path.name for path in (tmp_path / "own").iterdir()}


@pytest.mark.parametrize("policy", [pytest.param("TrainAll()", marks=pytest.mark.slow), "TrainOnly('head_*')"])
def test_arms_of_a_model_with_several_outputs_and_penalties_compute_the_same(policy):
    group = Group("own", policy, 4, steps=3, model="tests.benchmarks.test_runs:two_headed_model")
    arms = ("selective", "tapeloop", "keras", *["full", "subset"] * (policy == "TrainAll()"))
    losses = [[make_arm(Case(group, arm), policy)(3) for _ in range(2)] for arm in arms]
    for one in losses[1:]:
        assert one == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "policy", "said"),
    [
        ("tests.nowhere:model", "TrainAll()", "`--model` must be `package.module:function`. Received: 'tests.nowhere"),
        ("tests.benchmarks.test_runs:own_model", "Freeze(", "`--policy` must be a policy such as"),
        ("tests.support.models:trainer_of", "TrainAll()", "must be `package.module:function`|must return|missing"),
    ],
)
def test_wrong_models_and_policies(model, policy, said):
    with pytest.raises((ValueError, TypeError), match=said):
        make(Group("own", policy, 2, steps=1, model=model), policy)


@pytest.mark.parametrize("workload", params(["mlp", "vit", "encoder", "lstm"], ["vit", "lstm"]))
def test_every_selection_of_a_workload_trains_something(workload):
    size = {"mlp": 0, "vit": 16, "encoder": 4, "lstm": 4}[workload]
    counts = {}
    for selection in cases.SELECTIONS[workload]:
        work = make(Group(workload, selection, 2, size, steps=1))
        counts[selection] = len(tl.Trainer(work.model, work.policy).selection.trained)
    assert counts["head"] == 2
    assert all(2 <= count <= counts["all"] for name, count in counts.items() if name not in cases.ADDED)
    assert len(set(counts.values())) > 2


def test_the_stages_of_the_mobilenet_are_a_chain_that_ends_near_the_stem():
    model = make(Group("mobilenetv2", "all", 1, 32, steps=1)).model
    trained = []
    for selection in cases.UNFREEZE:
        selected = tl.Trainer(model, policy_of(Group("mobilenetv2", selection, 1))).selection.trained
        trained.append({variable.path for variable in selected})
    assert all(less < more for less, more in itertools.pairwise(trained))
    everything = {variable.path for variable in tl.Trainer(model).selection.trained}
    assert {path.split("/")[1] for path in everything - trained[-1]} == {
        "Conv1", "bn_Conv1", "expanded_conv_depthwise", "expanded_conv_depthwise_BN", "expanded_conv_project",
        "expanded_conv_project_BN",
    }  # fmt: skip


def test_flags_freeze_what_is_not_chosen_and_nothing_else():
    model = make(Group("vit", "norm", 1, 16, steps=1)).model
    norms = [v for layer in model.layers if isinstance(layer, layers.LayerNormalization) for v in layer.variables]
    freeze(model, norms)
    assert {id(variable) for variable in model.trainable_variables} == {id(variable) for variable in norms}
