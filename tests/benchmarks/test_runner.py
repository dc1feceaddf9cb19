"""Runs of real processes: what is killed, resumed, merged, out of time, or fails."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import __main__ as cli
from benchmarks import cases, devices, results, runner
from benchmarks.cases import Case
from tests.support.measured import case_of, lines

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import pathlib, sys
from benchmarks import results, runner
from tests.support.measured import case_of
if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    cases = [case_of("brief", arm, process=number) for number in range(6) for arm in ("forward", "tapeloop")]
    runner.run(cases, out, before=results.load(out) if out.exists() else [])
"""


def run(chosen, out, **options):
    return runner.run(chosen, out, show=lambda line: None, **options)


def signature(path):
    return {(row["key"], row["status"], row.get("figure")) for row in results.ended(results.load(path))}


def test_a_run_that_is_killed_at_random_and_resumed_ends_with_the_rows_of_one_that_is_not(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    subprocess.run([sys.executable, "-c", SCRIPT, str(whole)], cwd=ROOT, check=True, capture_output=True)
    chance = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(cut)], cwd=ROOT, stdout=subprocess.DEVNULL)
        before = lines(cut)
        while lines(cut) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(cut, "ab") as file:  # as if it had been killed while it wrote
            file.write(b'{"key": "torn", "status"')
    assert 3 <= len(signature(cut)) < len(signature(whole))
    subprocess.run([sys.executable, "-c", SCRIPT, str(cut)], cwd=ROOT, check=True, capture_output=True)
    assert signature(cut) == signature(whole)
    assert len(signature(whole)) == 12


def test_what_was_measured_is_not_measured_again_and_never_written_over(tmp_path):
    out = tmp_path / "results.jsonl"
    chosen = [case_of("brief", process=number) for number in range(2)]
    made, left = run(chosen, out)
    first = out.read_bytes()
    assert (len(made), left) == (2, [])
    assert run(chosen, out, before=results.load(out)) == ([], [])
    more = [*chosen, case_of("brief", process=2)]
    assert [Case.of(row).process for row in run(more, out, before=results.load(out))[0]] == [2]
    assert out.read_bytes().startswith(first)


def test_nothing_begins_that_is_not_thought_to_fit_and_what_takes_longer_is_killed(tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    monkeypatch.setitem(runner.PRIOR_S, "small", 0.1)
    began = time.monotonic()
    made, left = run([case_of("endless"), case_of("brief")], out, limit_s=2.0)
    assert time.monotonic() - began < 3.0
    assert [row["status"] for row in made] == ["cut"]
    assert {case.kind.split(":")[1] for case in left} == {"endless", "brief"}
    # What was cut off is thought to take twice as long now, and is left for a longer run; the other has its turn.
    made, left = run([case_of("endless"), case_of("brief")], out, before=results.load(out), limit_s=2.5)
    assert [(row["status"], row["figure"]) for row in made] == [("ok", 64)]
    assert [case.kind for case in left] == [case_of("endless").kind]
    assert [row["status"] for row in results.ended(results.load(out))] == ["ok"]


def test_what_like_cases_took_is_what_one_is_thought_to_take():
    case = case_of("brief")
    estimates = runner.Estimates([])
    assert estimates.of(case) == runner.PRIOR_S["small"]
    estimates.add(results.row_of(case_of("brief", process=1), "ok", 3.0))
    assert estimates.of(case) == pytest.approx(3.6)
    estimates.add(results.row_of(case, "cut", 5.0))
    assert estimates.of(case) == 10.0
    assert estimates.of(case_of("brief", process=2)) == pytest.approx(3.6)


def test_arms_take_turns_there_and_back(tmp_path):
    own = (("file", str(tmp_path / "turns")),)
    block = [case_of("noted", arm, own=own) for arm in ("a", "b", "c")]
    assert [row["status"] for row in runner.drive(block, time.monotonic() + 60)] == ["ok"] * 3
    assert (tmp_path / "turns").read_text() == "a b c c b a a b c c b a "


def test_arms_are_alive_together_where_there_is_room_for_all(monkeypatch):
    timed = [Case("mlp", "head", arm, 64) for arm in ("forward", "hand", "lightning", "tapeloop")]
    memory = Case("mlp", "head", "tapeloop", 64, kind="memory")
    assert runner.blocks([*timed, memory]) == [timed[:2], timed[2:3], timed[3:], [memory]]
    monkeypatch.setattr(runner.devices, "memory_mb", lambda: 10)  # a GPU
    assert runner.blocks(timed[:2]) == [timed[:1], timed[1:2]]
    for peak, together in ((2**20, True), (9 * 2**20, False)):
        rows = [results.row_of(case, "ok", 1.0, peak=peak) for case in timed[:2]]
        assert (len(runner.blocks(timed[:2], rows)) == 1) == together


def test_a_case_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    made, left = run([case_of("broken"), case_of("killed"), case_of("brief")], tmp_path / "results.jsonl")
    assert left == []
    assert [row["status"] for row in made] == ["error", "error", "ok"]
    assert made[0]["error"] == "RuntimeError: this case cannot be measured"
    assert made[1]["error"] == "its process died with exit code 9"
    assert "ERROR: RuntimeError: this case" in runner.said(made[0])


def test_results_of_other_code_or_another_machine_are_none_of_this(monkeypatch):
    case = case_of("brief")
    key = results.key_of(case)
    assert key == results.key_of(Case.of(json.loads(json.dumps(results.row_of(case, "ok", 1.0)))))
    monkeypatch.setattr(results, "code", lambda: "other code")
    assert results.key_of(case) != key
    monkeypatch.undo()
    here = results.environment()
    monkeypatch.setattr(results, "environment", lambda: {**here, "torch": "another"})
    assert results.key_of(case) == key  # which has nothing to do with PyTorch
    monkeypatch.setattr(results, "environment", lambda: {**here, "processor": "another"})
    assert results.key_of(case) != key


def test_an_own_model_is_another_when_anything_in_its_package_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ownmodule.py", "ownpackage/__init__.py", "ownpackage/parts.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for named, changed in (("ownmodule:f", "ownmodule.py"), ("ownpackage:f", "ownpackage/parts.py")):
        case = case_of("brief", own=(("model", named),))
        before = results.key_of(case)
        assert results.key_of(case) == before
        (tmp_path / changed).write_text("1")
        assert results.key_of(case) != before


def test_of_what_was_cut_off_the_longest_counts_until_it_ends(tmp_path):
    path = tmp_path / "results.jsonl"
    for status, seconds, expected in (
        ("cut", 100.0, 100.0),
        ("cut", 540.0, 540.0),
        ("cut", 50.0, 540.0),
        ("ok", 7.0, 7.0),
    ):
        results.append(path, [results.row_of(case_of("brief"), status, seconds, error="cut")])
        assert [row["wall_s"] for row in results.load(path)] == [expected]


def test_the_gpu_that_programs_see_first_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(devices.subprocess, "run", lambda command, **options: asked.append(command[1]) or 1 / 0)
    for visible, expected in (("1,0", "--id=1"), ("GPU-12ab", "--id=GPU-12ab"), (None, "--id=0")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ZeroDivisionError):
            devices.gpus.__wrapped__()
        assert asked.pop() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices.gpus.__wrapped__() == []


def test_what_failed_is_measured_again_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "selected", lambda options: [case_of("broken")])
    out = tmp_path / "results.jsonl"
    for more, count in (([], 1), ([], 1), (["--retry"], 2)):
        assert cli.main(["run", "--out", str(out), *more]) == 1
        assert lines(out) == count
        said = capsys.readouterr().err
        assert "RuntimeError: this case cannot be measured" in said
        assert "Nothing could be measured." in said


def test_files_are_merged_into_one_that_is_not_there_yet(tmp_path, capsys):
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for number, path in enumerate(paths):
        results.append(path, [results.row_of(case_of("brief", process=p), "ok", 1.0) for p in (number, number + 1)])
    results.append(paths[0], [results.row_of(case_of("brief", process=9), "cut", 1.0, error="cut")])
    command = ["merge", *map(str, paths), "--out", str(tmp_path / "all.jsonl")]
    assert cli.main(command) == 0
    assert sorted(Case.of(row).process for row in results.load(tmp_path / "all.jsonl")) == [0, 1, 2]
    assert cli.main(command) == 2
    assert "is there already, and results are never written over" in capsys.readouterr().err


def test_a_file_of_something_else_is_named(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text('{"rows": []}\n')
    assert cli.main(["report", str(path)]) == 2
    assert "has no results of this suite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workloads", "resnet"], "There is no workload 'resnet'. There are: mlp, mobilenetv2,"),
        (["--arms", "mxnet"], "There is no arm 'mxnet'. There are: forward, full,"),
        (["--arms", "hand+magic"], "There is no arm 'hand+magic'."),
        (["--workloads", "resnet50"], "Nothing is left to run: no case has the workloads ['resnet50']"),
        (["--suite", "gpu"], "The suite `gpu` needs a GPU, and `nvidia-smi` shows none. `--scale 0.1` tries"),
        (["--scale", "2"], "`--scale` must be above 0, and 1 at most. Received: 2.0."),
        (["--model", "a:b", "--steps", "1"], "`--batch` must be 1 or more and `--steps` 2 or more. Received: 16, 1."),
        (["--model", "a:b", "--suite", "cpu"], "`--model` is instead of a suite: leave out `--suite`, `--workloads`"),
        (["--processes", "0"], "`--processes` must be 1 or more. Received: 0."),
        (["--arms", "jax", "--workloads", "mlp"], "Nothing is left to run."),
        (["--workloads", "mlp", "--out", "a.json"], "`--out` must be a file that ends in .jsonl. Received: 'a.json'"),
    ],
)
def test_wrong_use_is_a_clear_error(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(cli.devices, "gpus", list)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)  # as if no other framework were there
    assert cli.main(["run", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [*cases.SUITES, *cases.FEATURES])
def test_suites_name_what_there_is(name):
    found = cases.suite(name)
    assert len({results.key_of(case) for case in found}) == len(found)
    for case in found:
        assert case.selection in cases.SELECTIONS[case.workload]
        assert case.base in cases.ARMS
        assert set(case.changes) <= set(cases.CHANGES)
        assert case.kind in cases.KINDS
        assert case.kind != "step" or case.steps >= 2


def test_the_gpu_suite_begins_with_a_table_of_all_workloads():
    found = cases.suite("gpu")
    cells = {case.group for case in found if case.kind == "step"}
    assert 30 <= len(cells) <= 45
    first = [case for case in found[:45] if case.process == 0]
    assert {case.workload for case in first} == set(cases.ON_GPU)
    assert {"full", "hand", "tapeloop", "forward"} == {case.arm for case in first}
    shrunk = cases.suite("gpu", 0.1)
    assert all(case.size <= 64 and case.batch <= 25 for case in shrunk)
    rest = cases.suite("gpu-full")
    assert not set(rest) & set(found)
