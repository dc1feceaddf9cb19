"""Running cases: a process for each, arms of a group in turns where there is room, a row for whatever comes of it."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import devices, results
from benchmarks.cases import KINDS, PEERS, Case
from benchmarks.measure import serve
from benchmarks.results import Row

METHOD = "forkserver"  # TensorFlow is imported once, in a process that never runs an op, and is there for all others
LONGEST_S = 900.0  # for one case
START_S = 1.0  # kept free for what a case takes beside what its row says
# What a case is thought to take where no like case was measured, by what makes it long. Stated, and not measured.
PRIOR_S = {"small": 5.0, "large": 20.0, "compile": 60.0, "capacity": 120.0, "accuracy": 60.0}
SMALL_WORKLOADS = ("mlp", "lstm", "gan")

print_at_once = functools.partial(print, flush=True)


class Child:
    """A process that measures one case, a turn at a time."""

    def __init__(self, case: Case) -> None:
        is_fresh = case.base in PEERS or case.kind == "capacity"
        context = multiprocessing.get_context("spawn" if is_fresh else METHOD)
        self.case, self.used_s = case, 0.0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case), daemon=True)
        self._process.start()
        theirs.close()

    def turn(self, deadline: float) -> Row | None:
        """Let it go on to the end of its turn, and return its row where it has come to its end.

        What takes too long is killed: past `deadline` its row says that it was cut off.
        """
        began = time.monotonic()
        until = min(deadline, began + LONGEST_S - self.used_s)
        try:
            self._pipe.send("go")
            if self._pipe.poll(max(0.0, until - began)):
                answer = self._pipe.recv()
            elif until == deadline:
                answer = "cut", {"error": "the time limit came before its end"}
            else:
                answer = "error", {"error": f"it took longer than {LONGEST_S:g} s"}
        except (EOFError, OSError):
            self._process.join(10)
            answer = "error", {"error": f"its process died with exit code {self._process.exitcode}"}
        self.used_s += time.monotonic() - began
        if answer is None:
            return None
        self.stop()
        return results.row_of(self.case, answer[0], self.used_s, **answer[1])

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def prepare(cases: Sequence[Case]) -> None:
    """Have TensorFlow imported once for all processes to come."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if any(case.kind in KINDS and case.base not in PEERS for case in cases):
        multiprocessing.get_context(METHOD).set_forkserver_preload(["benchmarks.kinds"])


def prior(case: Case) -> float:
    """Return the seconds that a case is thought to take, where nothing like it was measured."""
    if case.kind in PRIOR_S:
        return PRIOR_S[case.kind]
    if "compile" in case.changes or "xla" in case.changes:
        return PRIOR_S["compile"]
    return PRIOR_S["small" if case.workload in SMALL_WORKLOADS or case.scale < 1 or case.own else "large"]


class Estimates:
    """What cases are thought to take, by those that were measured."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._seconds: dict[Any, list[float]] = {}
        self._least: dict[Case, float] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Take in a row. One that was cut off says only that it takes longer: twice as long, it is thought."""
        case = Case.of(row)
        if row["status"] == "cut":
            self._least[case] = max(2 * row["wall_s"], self._least.get(case, 0.0))
        else:
            for like in self._likes(case):
                self._seconds.setdefault(like, []).append(row["wall_s"])

    def of(self, case: Case) -> float:
        """Return the seconds that a case is thought to take: of the most like ones, or what is stated for it."""
        known = (self._seconds[like] for like in self._likes(case) if like in self._seconds)
        thought = next((1.2 * statistics.median(seconds) for seconds in known), prior(case))
        return max(self._least.get(case, 0.0), thought)

    def _likes(self, case: Case) -> list[Any]:
        same = (case.kind, case.workload, case.arm, case.size, case.scale, case.steps * case.rounds)
        return [(*same, case.selection, case.batch, case.dtype, case.cap_mb), (*same, case.selection), same]


def blocks(cases: Sequence[Case], rows: Iterable[Row] = ()) -> list[list[Case]]:
    """Return cases in lots that are alive at once and take turns, so that drift of the machine hits all alike.

    Those are the arms of a group that are timed. On a GPU they must fit it together, which is known of those alone
    whose peak was measured before.
    """
    peaks = {(Case.of(row).group, row["case"]["arm"]): row["peak"] for row in rows if row.get("peak")}
    room = 0.8 * devices.memory_mb() * 2**20

    def lot(case: Case) -> Any:
        alone = case.kind != "step" or case.base in PEERS  # whose threads do not rest as soon as it has had its turn
        return case if alone else (case.group, case.process)

    found = []
    for _, same in itertools.groupby(cases, key=lot):
        some = list(same)
        fits = not room or sum(peaks.get((case.group, case.arm), room) for case in some) < room
        found += [some] if fits else [[case] for case in some]
    return found


def run(
    cases: Sequence[Case],
    out: pathlib.Path,
    *,
    before: Sequence[Row] = (),
    limit_s: float | None = None,
    show: Callable[[str], None] = print_at_once,
) -> tuple[list[Row], list[Case]]:
    """Measure what is not in the rows from before, in order, and add a line to a file for each case as it ends.

    After so many seconds all has ended: nothing begins that is not thought to fit, and what is not done by then is
    killed. Returns the new rows, and the cases that there was no time for.
    """
    prepare(cases)
    deadline = time.monotonic() + (float("inf") if limit_s is None else limit_s)
    done = {row["key"] for row in results.ended(before)}
    waiting = [case for case in cases if results.key_of(case) not in done]
    if len(waiting) < len(cases):
        show(f"{len(cases) - len(waiting)} of {len(cases)} cases were measured before: going on.")
    estimates, made, left = Estimates(before), [], []
    for block in blocks(waiting, before):
        block = list(block)
        while block and time.monotonic() + sum(map(estimates.of, block)) + START_S > deadline:
            left.append(block.pop())
        if not block:
            continue
        for row in drive(block, deadline):
            results.append(out, [row])
            estimates.add(row)
            if row["status"] == "cut":
                left.append(Case.of(row))
            made.append(row)
            show(said(row))
    return made, left


def drive(block: Sequence[Case], deadline: float) -> Iterable[Row]:
    """Give the rows of cases that take turns, each as it ends: there and back again, so that no arm is always first."""
    children = [Child(case) for case in block]
    try:
        while children:
            for child in list(children):
                row = child.turn(deadline)
                if row is not None:
                    children.remove(child)
                    yield row
            children.reverse()
    finally:
        for child in children:
            child.stop()


def said(row: Row) -> str:
    """Return a line that says what came of a case."""
    case = Case.of(row)
    line = f"  {case!s:<48} {case.arm:<22} {case.kind:<11} {case.process}  {row['wall_s']:6.1f} s"
    if row["status"] != "ok":
        return f"{line}  {row['status'].upper()}: {row['error']}"
    row = {**row, **({"peak_mb": row["peak"] / 2**20} if "peak" in row else {})}
    figures = {"step_ms": "{:.3g} ms a step", "peak_mb": "{:.1f} MiB", "largest_batch": "batch {}", "said": "{}"}
    return "  ".join([line, *(text.format(row[name]) for name, text in figures.items() if name in row)])
