"""What got slower, larger or wrong from one file of results to another, beyond what processes themselves vary by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.measure import draws
from benchmarks.results import Row

LEAST_TIME = 0.04  # by which a step must be slower, as a share, to be called so
LEAST_PROCESSES = 3
SHARE = 0.99  # of the drawn differences, that must lie on one side
# By which memory must be larger, in bytes: processes of one program differ by some KiB in what persists.
LEAST_BYTES = {"growth": 4096, "persistent": 24_576, "peak": 24_576}
LEAST_PEAK = 0.1  # and as a share: the order in which ops happen to run moves the peak of a large graph by a twentieth
EXACT = {
    "nodes": "nodes in the step's graph",
    "weight_bytes": "bytes of weights",
    "optimizer_bytes": "bytes of optimizer",
}
REFERENCES = ("forward", "hand", "hand+guard", "full")  # the arm to whose times those of the others are taken


@dataclass
class Verdict:
    """What a comparison found."""

    worse: list[str]  # what is sure: more nodes, more bytes, a failure
    slower: dict[Case, str]  # steps that seem slower, by case without its process
    said: list[str]  # all else that is to be said: warnings and what got better


def compare(before: Sequence[Row], after: Sequence[Row]) -> Verdict:
    """Compare results with those before them.

    Times are relative to those of a reference arm of the same group, since machines drift. Processes are the unit.
    """
    verdict = Verdict([], {}, [])
    differing = results.differences(before, after)
    if differing:
        verdict.said.append(f"WARNING: two machines or versions ({'; '.join(differing)}): only ratios tell.")
    one, other = _by_case(before), _by_case(after)
    for case in one:
        if case not in other:
            verdict.said.append(f"{name(case)}: only in the first results")
    for case, rows in other.items():
        if case in one:
            _judge(case, one, other, verdict, is_same=not differing)
        elif any(row["status"] == "error" for row in rows):
            verdict.said.append(f"{name(case)}: only in the second results, where it failed: {rows[0]['error']}")
    return verdict


def confirmed(first: Verdict, again: Verdict) -> list[str]:
    """Return what is worse: what is sure, and what seemed slower twice."""
    return [*first.worse, *(text for case, text in again.slower.items() if case in first.slower)]


def measured_again(verdict: Verdict, after: Sequence[Row], run: Callable[[list[Case]], list[Row]]) -> list[Row]:
    """Measure anew, in other processes, what seems slower, with what it is compared with, and return the new rows."""
    groups = {case.group for case in verdict.slower}
    wanted = {(case.group, case.arm) for case in verdict.slower} | {
        (group, arm) for group in groups for arm in REFERENCES
    }
    there = [Case.of(row) for row in after if row["case"]["kind"] == "step"]
    highest = max((case.process for case in there), default=0) + 1
    found = [
        Case(**{**case.__dict__, "process": highest + case.process})
        for case in there
        if (case.group, case.arm) in wanted
    ]
    return run(sorted(set(found), key=lambda case: (str(case.group), case.process)))


def name(case: Case) -> str:
    """Return a case in words."""
    return f"{case}, {case.arm}" + f", {case.kind}" * (case.kind not in ("step", "memory"))


def _by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    found: dict[Case, list[Row]] = {}
    for row in results.newest(results.ended(rows)):
        found.setdefault(Case(**{**Case.of(row).__dict__, "process": 0}), []).append(row)
    return found


def _judge(case: Case, before: Any, after: Any, verdict: Verdict, is_same: bool) -> None:
    failed = [[row for row in rows[case] if row["status"] == "error"] for rows in (before, after)]
    if any(failed):
        if failed[1] and not failed[0]:
            verdict.worse.append(f"{name(case)}: error: {failed[1][0]['error']}")
        elif failed[0] and not failed[1]:
            verdict.said.append(f"{name(case)}: no longer fails: {failed[0][0]['error']}")
        return
    invalid = [rows[case][-1].get("invalid", {}) for rows in (before, after)]
    verdict.worse += [f"{name(case)}: {arm}: {why}" for arm, why in invalid[1].items() if arm not in invalid[0]]
    _bytes(case, before[case], after[case], verdict, is_same)
    if case.kind == "step":
        _times(case, before, after, verdict)


def _bytes(case: Case, old: list[Row], new: list[Row], verdict: Verdict, is_same: bool) -> None:
    for what, words in EXACT.items():
        sides = [max((row[what] for row in rows if row.get(what) is not None), default=None) for rows in (old, new)]
        if None not in sides and sides[0] != sides[1]:
            text = f"{name(case)}: {sides[0]:,} to {sides[1]:,} {words}"
            is_worse = sides[1] > sides[0] and is_same
            (verdict.worse if is_worse else verdict.said).append(text)
    if case.kind != "memory":
        return
    for what, least in LEAST_BYTES.items():
        sides = [statistics.median(row[what] for row in rows) for rows in (old, new)]
        change = sides[1] - sides[0]
        if abs(change) > max(least, LEAST_PEAK * sides[0] * (what == "peak")):
            text = f"{name(case)}: {what} {sides[0]:,.0f} to {sides[1]:,.0f} bytes{' a step' * (what == 'growth')}"
            (verdict.worse if change > 0 else verdict.said).append(text)


def _times(case: Case, before: Any, after: Any, verdict: Verdict) -> None:
    """Compare the times of a step, relative to the first reference arm that both have.

    Where there is none, times are as the machine was, and a difference is no regression.
    """
    sides, reference = [[row["rounds_ms"] for row in rows[case]] for rows in (before, after)], ""
    for arm in REFERENCES:
        base = Case(**{**case.__dict__, "arm": arm})
        if arm != case.arm and all(row.get("rounds_ms") for rows in (before, after) for row in rows.get(base, [{}])):
            reference = arm
            sides = [_relative(rows[case], rows[base]) for rows in (before, after)]
            break
    if min(map(len, sides)) < LEAST_PROCESSES:
        one, other = (statistics.median(map(statistics.median, side)) for side in sides)
        if abs(other / one - 1) > LEAST_TIME:
            verdict.said.append(f"{name(case)}: too few processes to tell a step's time ({other / one - 1:+.0%})")
        return
    generator = np.random.default_rng(0)
    old, new = (draws(side, generator) for side in sides)
    change = float(np.median(new) / np.median(old) - 1)
    low, high = np.quantile(new / old - 1, [1 - SHARE, SHARE])
    if abs(change) <= LEAST_TIME or low <= 0 <= high:
        return
    unit = f" of `{reference}`" if reference else " ms"
    said = f"{np.median(old):.3f} to {np.median(new):.3f}{unit} ({change:+.1%}, {low:+.1%} to {high:+.1%})"
    text = f"{name(case)}: a step {said}"
    if change > 0 and reference:
        verdict.slower[case] = text
    else:
        verdict.said.append(text if reference else f"{text}: no other arm beside it, so this may be the machine's")


def _relative(rows: Sequence[Row], base: Sequence[Row]) -> list[list[float]]:
    """Return rounds relative to the reference: to its rounds of the same process, as it took turns with it."""
    by_process = {Case.of(row).process: row["rounds_ms"] for row in base}
    middle = statistics.median(map(statistics.median, by_process.values()))
    found = []
    for row in rows:
        beside = by_process.get(Case.of(row).process, [middle] * len(row["rounds_ms"]))
        found.append([one / statistics.median(beside) for one in row["rounds_ms"]])
    return found
