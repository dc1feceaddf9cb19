"""Running cases: a process for each, the arms of a group in turns, and a row for whatever comes of it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tqdm import tqdm

from benchmarks.cases import CACHED, PEERS, Case, Group
from benchmarks.measure import summary
from benchmarks.results import Results

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # by which losses of arms that compute the same may differ
PATIENCE_S = 900  # for one answer of a process
Chosen: TypeAlias = "Sequence[tuple[Group, list[Case]]]"
METHOD = "forkserver"  # TensorFlow is imported once, in a process that never runs an op, and is there for all others


class Failed(Exception):
    """What a process was asked for did not come."""


class Worker:
    """A process that measures one case, and the pipe to it."""

    def __init__(self, case: Case, policy: str, one_thread: bool) -> None:
        """Start it; it answers when its arm is built."""
        context = multiprocessing.get_context("spawn" if case.arm in PEERS else METHOD)
        self._pipe, theirs = context.Pipe()
        module = "benchmarks.peers" if case.arm in PEERS else "benchmarks.worker"
        self._process = context.Process(target=_serve, args=(module, theirs, case, policy, one_thread), daemon=True)
        self._process.start()
        theirs.close()
        self.case = case

    def ask(self, command: str = "", steps: int = 0) -> Any:
        """Have it do something, and return its answer; with no command, return what it says when it is ready.

        Raises:
            Failed: It says that it cannot, has died, or does not answer.
        """
        try:
            if command:
                self._pipe.send((command, steps))
            if not self._pipe.poll(PATIENCE_S):
                raise Failed(f"no answer within {PATIENCE_S} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise Failed(f"the process died with exit code {self._process.exitcode}") from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        if not self._pipe.closed:
            self._pipe.close()


def installed(
    chosen: Sequence[tuple[Group, list[Case]]], show: Callable[[str], None]
) -> list[tuple[Group, list[Case]]]:
    """Return the cases without those of frameworks that are not installed, and say which these are."""
    missing = {arm for arm in PEERS if not all(map(importlib.util.find_spec, {arm, "torch"}))}
    asked = {case.arm for _, some in chosen for case in some}
    for arm in sorted(missing & asked):
        show(f"The arm `{arm}` is skipped: it needs the package `{arm}`, which is not installed.")
    return [(group, [case for case in some if case.arm not in missing]) for group, some in chosen]


def has_gpu() -> bool:
    """Tell whether TensorFlow sees a GPU, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return bool(pool.apply(_gpus))


def _gpus() -> list[str]:
    tensorflow = importlib.import_module("tensorflow")
    return [device.name for device in tensorflow.config.list_physical_devices("GPU")]


def prepare() -> None:
    """Have TensorFlow imported once for all processes to come, with an allocator that counts on the CPU too."""
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    multiprocessing.get_context(METHOD).set_forkserver_preload(["benchmarks.worker"])


def run(
    chosen: Chosen,
    results: Results,
    policy: str = "",
    show: Callable[[str], None] = tqdm.write,
) -> None:
    """Measure all groups that `results` has no rows of, and write after each.

    Args:
        chosen: The cases, by group.
        results: Where rows go.
        policy: For a user's own model: its policy.
        show: Takes a line to show.
    """
    prepare()
    chosen = [(group, some) for group, some in installed(chosen, show) if some]
    waiting = [(group, some) for group, some in chosen if not results.has(group)]
    if len(waiting) < len(chosen):
        show(f"{len(chosen) - len(waiting)} of {len(chosen)} groups were measured before: going on.")
    with tqdm(waiting, unit="group", dynamic_ncols=True, disable=None) as bar:
        for group, some in bar:
            bar.set_postfix_str(str(group))
            rows = measure(group, some, policy, results.describe)
            results.add(rows)
            for row in rows:
                show(f"  {group!s:<44} {row['arm']:<10} {_said(row)}")


def measure(group: Group, some: Sequence[Case], policy: str, describe: Callable[[dict[str, Any]], None]) -> list[Any]:
    """Measure the arms of a group: memory in processes of one thread, then times, a round of each arm in turn."""
    workers = [Worker(case, policy, one_thread=True) for case in some]
    memory: dict[str, dict[str, Any]] = {}
    for worker in workers:
        try:
            describe(worker.ask())
            memory[worker.case.arm] = worker.ask("memory")
        except Failed as error:
            memory[worker.case.arm] = {"error": f"while memory was measured: {error}"}
        worker.stop()
    workers = [Worker(case, policy, one_thread=False) for case in some if "error" not in memory[case.arm]]
    times: dict[str, list[dict[str, float]]] = {}
    for worker in workers:  # all are there before the first is timed
        _attempt(worker, times, worker.ask)
    for worker in workers:
        _attempt(worker, times, lambda worker=worker: worker.ask("round", 1))
    for number in range(-1, group.rounds):
        turn = number % len(workers) if workers else 0
        for worker in (*workers[turn:], *workers[:turn]):
            _attempt(worker, times, lambda worker=worker: worker.ask("round", group.steps))
    for worker in workers:
        worker.stop()
    rows = [{**dataclasses.asdict(case.group), "arm": case.arm, **memory[case.arm]} for case in some]
    for row in rows:
        if "error" in row or row["arm"] not in times:
            continue
        found = times[row["arm"]]
        if isinstance(found[-1].get("error"), str):
            row["error"] = found[-1]["error"]
            continue
        _, first, _, *rest = found  # it was ready, then its first step, then warm-up
        row |= summary([one["seconds"] for one in rest], group.steps, group.batch, first["seconds"])
        row["loss"] = rest[-1]["loss"]
    judge(group, rows)
    return rows


def _attempt(worker: Worker, times: dict[str, list[Any]], ask: Callable[[], Any]) -> None:
    """Note an answer, or why there was none, after which the arm is asked nothing more."""
    noted = times.setdefault(worker.case.arm, [])
    if noted and "error" in noted[-1]:
        return
    try:
        noted.append(ask())
    except Failed as error:
        noted.append({"error": str(error)})
        worker.stop()


def judge(group: Group, rows: Sequence[dict[str, Any]]) -> None:
    """Compare the losses of the arms that compute the same, and note where they disagree.

    The reference is the arm by hand in inference mode, or what there is of the others. Where all trains, full backprop
    computes the same too, and so does `subset`; where less trains, `subset` runs the frozen part in training mode.
    """
    by_arm = {row["arm"]: row for row in rows if "loss" in row}
    alike = ["selective", "keras", "tapeloop", CACHED]
    if group.selection in ("all", "TrainAll()"):
        alike += ["full", "subset"]
    losses = {arm: by_arm[arm]["loss"] for arm in alike if arm in by_arm}
    if not losses:
        return
    reference = next(iter(losses))
    for arm, loss in losses.items():
        if not abs(loss - losses[reference]) <= TOLERANCE[group.dtype] * max(abs(losses[reference]), 1e-3):
            said = f"its loss after the same steps is {loss:.6g}, that of `{reference}` {losses[reference]:.6g}"
            by_arm[arm]["invalid"] = said


def _said(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    peak = "" if row.get("peak") is None else f", peak {row['peak'] / 2**20:.1f} MiB"
    return f"{row['step_ms']:.3g} ms a step{peak}" + (f", INVALID: {row['invalid']}" if "invalid" in row else "")


def _serve(module: str, *args: Any) -> None:
    """Measure by a module that is imported in the process alone, since the runner needs no framework."""
    importlib.import_module(module).serve(*args)
