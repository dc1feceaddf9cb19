"""What got slower, larger or wrong from one file of results to another, beyond what processes themselves vary by."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.measure import draws
from benchmarks.results import Row

LEAST_TIME = 0.04  # by which a step must be slower, as a share, to be called so
LEAST_PROCESSES = 3
SHARE = 0.99  # of the drawn differences, that must lie on one side
# What must not be larger, in words, and by how much it must be to be called so: processes of one program differ by some
# KiB in what persists, and the order in which ops happen to run moves the peak of a large graph by a twentieth.
GATES = {
    "nodes": ("{:,.0f} to {:,.0f} nodes in the step's graph", 0, 0.0),
    "weight_bytes": ("{:,.0f} to {:,.0f} bytes of weights", 0, 0.0),
    "optimizer_bytes": ("{:,.0f} to {:,.0f} bytes of optimizer", 0, 0.0),
    "growth": ("growth {:,.0f} to {:,.0f} bytes a step", 4096, 0.0),
    "persistent": ("persistent {:,.0f} to {:,.0f} bytes", 24_576, 0.0),
    "peak": ("peak {:,.0f} to {:,.0f} bytes", 24_576, 0.1),
}
REFERENCES = ("forward", "hand", "hand+guard", "full")  # the arm to whose times those of the others are taken


@dataclasses.dataclass
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
    verdict.said += [f"{name(case)}: only in the first results" for case in one if case not in other]
    for case, rows in other.items():
        errors = [[row["error"] for row in some if row["status"] == "error"] for some in (one.get(case, []), rows)]
        if case not in one:
            what = f"{name(case)}: only in the second results, where it failed: {''.join(errors[1][:1])}"
            verdict.said += [what] * bool(errors[1])
        elif any(errors):
            before_share, after_share = (len(some) / len(of) for some, of in zip(errors, (one[case], rows)))
            if after_share > before_share:
                verdict.worse.append(f"{name(case)}: error: {errors[1][0]}")
            elif after_share < before_share:
                fewer = "fails less often" if errors[1] else "no longer fails"
                verdict.said.append(f"{name(case)}: {fewer}: {errors[0][0]}")
        else:
            invalid = [some[-1].get("invalid", {}) for some in (one[case], rows)]
            verdict.worse += [f"{name(case)}: {arm}: {why}" for arm, why in invalid[1].items() if arm not in invalid[0]]
            used = [results.used_by(case, row["environment"]) for row in (*one[case], *rows)]
            _gates(case, one[case], rows, verdict, is_same=all(other == used[0] for other in used))
            if case.kind == "step":
                _times(case, one, other, verdict)
    return verdict


def confirmed(first: Verdict, again: Verdict) -> list[str]:
    """Return what is worse: what is sure, then or when it was measured again, and what seemed slower twice."""
    sure = dict.fromkeys([*first.worse, *again.worse])
    return [*sure, *(text for case, text in again.slower.items() if case in first.slower)]


def measured_again(verdict: Verdict, after: Sequence[Row], run: Callable[[list[Case]], list[Row]]) -> list[Row]:
    """Measure anew, in other processes, what seems slower, with what it is compared with, and return the new rows."""
    wanted = {(case.group, arm) for case in verdict.slower for arm in (case.arm, *REFERENCES)}
    there = {Case.of(row) for row in after if row["case"]["kind"] == "step"}
    more = max((case.process for case in there), default=0) + 1
    some = [c for c in there if (c.group, c.arm) in wanted and c.process < LEAST_PROCESSES]
    again = [dataclasses.replace(c, process=more + c.process) for c in some]
    return run(sorted(again, key=lambda case: (str(case.group), case.process, case.arm)))


def name(case: Case) -> str:
    """Return a case in words."""
    return f"{case}, {case.arm}" + f", {case.kind}" * (case.kind not in ("step", "memory"))


def _by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    found: dict[Case, list[Row]] = {}
    for row in results.newest(results.ended(rows)):
        found.setdefault(dataclasses.replace(Case.of(row), process=0), []).append(row)
    return found


def _gates(case: Case, old: list[Row], new: list[Row], verdict: Verdict, is_same: bool) -> None:
    """Compare what is no time: what is exact, if machine and versions are the same, and bytes of memory."""
    for what, (text, least, share) in GATES.items():
        sides = [[row[what] for row in rows if row.get(what) is not None] for rows in (old, new)]
        is_read_beside = what == "peak" and new[0]["environment"]["device"] != "CPU"  # there no other process tells it
        if not all(sides) or (least and case.kind != "memory" and not is_read_beside):
            continue
        one, other = map(statistics.median, sides)
        if abs(other - one) > max(least, share * one):
            is_worse = other > one and (is_same or least)
            (verdict.worse if is_worse else verdict.said).append(f"{name(case)}: {text.format(one, other)}")


def _times(case: Case, before: Any, after: Any, verdict: Verdict) -> None:
    """Compare the times of a step, relative to the first reference arm that both have.

    Where there is none, times are as the machine was, and a difference is no regression.
    """
    sides, unit = [[row["rounds_ms"] for row in rows[case]] for rows in (before, after)], " ms"
    for arm in REFERENCES:
        base = dataclasses.replace(case, arm=arm)
        if arm != case.arm and all(row.get("rounds_ms") for rows in (before, after) for row in rows.get(base, [{}])):
            sides, unit = [_relative(rows[case], rows[base]) for rows in (before, after)], f" of `{arm}`"
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
    said = f"{np.median(old):.3f} to {np.median(new):.3f}{unit} ({change:+.1%}, {low:+.1%} to {high:+.1%})"
    text = f"{name(case)}: a step {said}"
    if change > 0 and unit != " ms":
        verdict.slower[case] = text
    else:
        verdict.said.append(f"{text}: no other arm beside it, so this may be the machine's" if unit == " ms" else text)


def _relative(rows: Sequence[Row], base: Sequence[Row]) -> list[list[float]]:
    """Return rounds relative to the reference: to its rounds of the same process, as it took turns with it."""
    medians = {Case.of(row).process: statistics.median(row["rounds_ms"]) for row in base}
    middle = statistics.median(medians.values())
    beside = [medians.get(Case.of(row).process, middle) for row in rows]
    return [[one / other for one in row["rounds_ms"]] for row, other in zip(rows, beside)]
