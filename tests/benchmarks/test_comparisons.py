"""The benchmark suite, with a clock and an allocator that tell what the test decides."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import measure, runner, tables
from benchmarks.cases import Case, Group
from benchmarks.compare import compare
from benchmarks.measure import Measured
from benchmarks.results import Results, group_of

GROUP = Group("mlp", "head", 64, steps=10, rounds=7)
ACTIVATION = 64 * 128 * 4  # bytes
SECONDS = {"forward": 0.001, "full": 0.004, "selective": 0.0015, "tapeloop": 0.002}
LOSSES = {"forward": 0.0, "full": 1.0, "selective": 2.0, "tapeloop": 2.0}


SEEDS = itertools.count()


class Bench:
    """A clock that steps advance, by a hundredth more or less, and an allocator of which they take."""

    def __init__(self, arm, slower=1.0, leak=0, held=0, kept=0, loss=None):
        self.now, self.current, self.peak = 0.0, 1_000_000 + held, 1_000_000
        self.jitter = np.random.default_rng(next(SEEDS))  # of each process another
        self.step = SECONDS[arm] * slower
        self.leak, self.activations = leak, 5 * ACTIVATION + kept
        self.loss = LOSSES[arm] if loss is None else loss

    def clock(self):
        return self.now

    def reset(self):
        self.peak = self.current

    def read(self):
        return self.current, self.peak

    def __call__(self, steps):
        self.now += steps * self.step * (1 + 0.01 * self.jitter.normal())
        for _ in range(steps):
            self.peak = max(self.peak, self.current + self.activations)
            self.current += self.leak
        return self.loss


class FakeWorker:
    """What stands for a process."""

    planted: dict = {}
    fails: dict = {}

    def __init__(self, case, policy, one_thread):
        self.case = case
        bench = Bench(case.arm, **self.planted.get(case.arm, {}))
        self.measured = Measured(bench, bench.clock, bench)

    def ask(self, command="", steps=0):
        if self.fails.get(self.case.arm) == command:
            raise runner.Failed("out of memory: the device is full")
        if command == "round":
            return self.measured.round(steps)
        return {**self.measured.memory(), "state_bytes": 8, "ops": 100} if command else {}

    def stop(self):
        pass


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A function that returns the results of a run whose arms are slower, or keep more, or fail, as planted."""
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "prepare", lambda: None)
    # The allocator is made up, so that there is no garbage to collect; after many traces that takes seconds each time.
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)

    def run(name="results", fails=None, group=GROUP, **planted):
        monkeypatch.setattr(FakeWorker, "planted", planted)
        monkeypatch.setattr(FakeWorker, "fails", fails or {})
        results = Results(tmp_path / f"{name}.json", "a command")
        runner.run([(group, [Case(group, arm) for arm in SECONDS])], results, show=lambda line: None)
        return results

    return run


def row_of(results, arm):
    return next(row for row in results.rows if row["arm"] == arm)


def test_the_figures_of_an_arm_are_those_of_the_clock_and_the_allocator(measured):
    row = row_of(measured(), "tapeloop")
    assert row["step_ms"] == pytest.approx(2.0, rel=0.03)
    assert row["steps_timed"] == 70
    assert len(row["rounds_ms"]) == 7
    assert row["examples_per_s"] == pytest.approx(64 / row["step_ms"] * 1e3)
    assert row["first_step_s"] == pytest.approx(0.002, rel=0.05)
    assert row["peak"] == 1_000_000 + 5 * ACTIVATION
    assert (row["persistent"], row["growth"]) == (1_000_000, 0)


@pytest.mark.parametrize("slower", [1.0, 1.3])
def test_two_runs_of_the_same_have_no_regressions_nor_has_a_machine_that_is_slower_as_a_whole(measured, slower):
    assert compare(measured(), measured(**{arm: {"slower": slower} for arm in SECONDS})) == ([], [])


def test_a_step_slower_by_a_tenth_is_found(measured):
    before = measured()
    after = measured(tapeloop={"slower": 1.1})
    (found,), said = compare(before, after)
    assert re.match(r"mlp head, batch 64, tapeloop: a step .* of `forward` \(\+\d", found)
    assert said == []
    assert compare(after, before)[0] == []
    (better,) = compare(after, before)[1]
    assert "(-" in better


def test_alarms_are_rare_and_a_tenth_is_nearly_always_found(measured):
    runs = [measured() for _ in range(30)]
    slow = [measured(tapeloop={"slower": 1.1}) for _ in range(30)]
    false = sum(len(compare(one, other)[0]) for one, other in itertools.pairwise(runs))
    assert false <= 2  # of 29 times 4 comparisons
    assert sum(bool(compare(one, other)[0]) for one, other in zip(runs, slow)) >= 29


def test_one_round_says_nothing(measured):
    once = dataclasses.replace(GROUP, rounds=1)
    before, after = measured(group=once), measured(group=once, tapeloop={"slower": 9})
    assert compare(before, after) == ([], ["mlp head, batch 64, tapeloop: too few rounds to tell a step's time"])


def test_times_of_an_arm_alone_may_be_the_machines(measured):
    before, after = (measured(tapeloop={"slower": slower}) for slower in (1.0, 1.3))
    for results in (before, after):
        results.rows = [row_of(results, "tapeloop")]
    regressions, (said,) = compare(before, after)
    assert regressions == []
    assert said.endswith("no other arm ran beside it, so this may be the machine's")


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({"leak": ACTIVATION}, {"peak", "persistent", "growth"}),
        ({"held": ACTIVATION}, {"persistent"}),
        ({"kept": 10 * ACTIVATION}, {"peak"}),
    ],
    ids=["leaked at each step", "held for good", "ten more at a time"],
)
def test_one_activation_more_is_found(measured, planted, expected):
    before, after = measured(), measured(tapeloop=planted)
    regressions, _ = compare(before, after)
    assert {line.split("tapeloop: ")[1].split()[0] for line in regressions} == expected


def test_a_case_that_fails_is_a_row_and_the_others_go_on(measured):
    results = measured(fails={"full": "memory", "selective": "round"})
    assert row_of(results, "full")["error"] == "while memory was measured: out of memory: the device is full"
    assert row_of(results, "selective")["error"] == "out of memory: the device is full"
    assert "step_ms" in row_of(results, "tapeloop")
    text = tables.report(results, [])
    assert "- `full` failed: while memory was measured: out of memory: the device is full" in text
    regressions, _ = compare(measured(), results)
    assert len([line for line in regressions if "error: " in line]) == 2


def test_arms_that_compute_something_else_are_invalid_and_stand_in_no_comparison(measured):
    results = measured(tapeloop={"loss": 2.01})
    assert row_of(results, "tapeloop")["invalid"] == "its loss after the same steps is 2.01, that of `selective` 2"
    assert "invalid" not in row_of(results, "full")  # it trains more
    assert "`tapeloop` is **invalid**" in tables.report(results, [])
    assert any("invalid" in line for line in compare(measured(), results)[0])
    assert len(tables.floors(tables.by_group(results.rows))) == 2  # the header alone
    assert "tapeloop (invalid)" in tables.report(results, [])


def test_a_run_goes_on_where_it_was_cut_off(measured):
    first = measured()
    assert not Results.load(first.path).complete
    resumed = Results.resume(first.path, "a command")
    assert resumed.has(GROUP)
    lines = []
    runner.run([(GROUP, [Case(GROUP, "tapeloop")])], resumed, show=lines.append)
    assert lines == ["1 of 1 groups were measured before: going on."]
    assert len(resumed.rows) == len(SECONDS)
    resumed.complete = True
    resumed.write()
    assert Results.resume(first.path, "a command").rows == []  # what came to its end begins anew


def test_results_of_another_run_are_not_gone_on_with(measured):
    path = measured().path
    text = r"has results of another run: `a command`.*Give another `--out`, or delete it"
    with pytest.raises(ValueError, match=text):
        Results.resume(path, "another command")


def test_a_file_cut_short_is_named(measured, capsys):
    path = measured().path
    path.write_text(path.read_text()[:-200])
    assert cli.main(["report", str(path)]) == 2
    assert "is no file of results, or was cut short" in capsys.readouterr().err


def test_a_run_that_did_not_end_is_reported_as_such(measured):
    assert "The run did not come to its end" in tables.report(measured(), [])


def test_different_machines_are_warned_of(measured, capsys):
    one, other = measured("one"), measured("other")
    other.machine["processor"] = "another processor"
    other.write()
    assert cli.main(["compare", str(one.path), str(other.path)]) == 0
    assert "WARNING: the two runs are of different machines or versions (processor:" in capsys.readouterr().out


def test_compare_ends_with_1_where_something_got_worse(measured, capsys):
    one = measured("one")
    other = measured("other", tapeloop={"slower": 1.2})
    assert cli.main(["compare", str(one.path), str(other.path)]) == 1
    assert "WORSE: mlp head, batch 64, tapeloop: a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workloads", "resnet"], "There is no workload 'resnet'. There are: mlp, mobilenetv2,"),
        (["--arms", "jax"], "There is no arm 'jax'. There are: forward, full,"),
        (["--workloads", "resnet50"], "Nothing is left to run: no group has the workloads ['resnet50']"),
        (["--suite", "gpu"], "The suite `gpu` needs a GPU that TensorFlow sees"),
    ],
)
def test_wrong_use_is_a_clear_error(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(runner, "has_gpu", lambda: False)
    assert cli.main(["run", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_group_can_be_made_of_its_row(measured):
    results = measured()
    assert {group_of(row) for row in json.loads(results.path.read_text())["rows"]} == {GROUP}
