"""What got slower, larger or wrong from one run to another, beyond what the runs themselves vary by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Group
from benchmarks.results import Results, differences, group_of

LEAST_TIME = 0.04  # by which a step must be slower, as a share, to be called so
LEAST_ROUNDS = 3
SIGMAS = 3  # standard errors that a difference must exceed
# By which memory must be larger, in bytes: processes of the same program differ by some KiB in what persists.
LEAST_BYTES = {"growth": 4096, "persistent": 24576, "peak": 24576}
LEAST_PEAK = 0.1  # and as a share: the order in which ops happen to run moves the peak of a large graph by a twentieth
REFERENCES = ("forward", "selective", "full")  # the arm to whose times those of the others are taken


def compare(one: Results, other: Results) -> tuple[list[str], list[str]]:
    """Compare a run with one before it.

    Times are taken relative to those of the same round of a reference arm in the same run, since machines drift; the
    noise is that of these ratios. Memory is compared in bytes.

    Args:
        one: The run before.
        other: The run to judge.

    Returns:
        Regressions, then everything else that is to be said: warnings and improvements.
    """
    said = []
    found = differences(one, other)
    if found:
        said.append(
            f"WARNING: the two runs are of different machines or versions ({'; '.join(found)}): only ratios tell."
        )
    before, after = _by_case(one), _by_case(other)
    for missing in sorted(set(before) - set(after), key=str):
        said.append(f"{_name(missing)}: only in the first run")
    regressions = []
    for case, row in after.items():
        if case in before:
            worse, better = _changes(case, before, after)
            regressions += [f"{_name(case)}: {change}" for change in worse]
            said += [f"{_name(case)}: {change}" for change in better]
        elif "error" in row:
            said.append(f"{_name(case)}: only in the second run, where it failed: {row['error']}")
    return regressions, said


def _by_case(results: Results) -> dict[Any, dict[str, Any]]:
    return {(group_of(row).key, row["arm"]): row for row in results.rows}


def _name(case: Any) -> str:
    key, arm = case
    return f"{Group(*key)}, {arm}"


def _changes(case: Any, before: dict[Any, Any], after: dict[Any, Any]) -> tuple[list[str], list[str]]:
    old, new = before[case], after[case]
    for problem in ("error", "invalid"):
        if problem in new:
            return ([f"{problem}: {new[problem]}"] if problem not in old else []), []
        if problem in old:
            return [], [f"no longer {problem}: {old[problem]}"]
    worse, better = _times(case, before, after)
    for what in ("peak", "persistent", "growth"):
        if old.get(what) is None or new.get(what) is None:
            continue
        least = max(LEAST_BYTES[what], LEAST_PEAK * old[what] * (what == "peak"))
        change = new[what] - old[what]
        text = f"{what} {old[what]:,.0f} to {new[what]:,.0f} bytes{' a step' * (what == 'growth')}"
        if change > least:
            worse.append(text)
        elif change < -least:
            better.append(text)
    return worse, better


def _times(case: Any, before: dict[Any, Any], after: dict[Any, Any]) -> tuple[list[str], list[str]]:
    """Compare the times of a step, relative to the first reference arm that both runs have.

    Where there is none, times are as the machine was, and a difference is no regression.
    """
    group, arm = case
    for reference in REFERENCES:
        bases = [rows.get((group, reference), {"invalid": ""}) for rows in (before, after)]
        others = [base.get("rounds_ms") if "invalid" not in base else None for base in bases]
        if reference != arm and all(others):
            old, new = (_ratios(rows[case]["rounds_ms"], base) for rows, base in zip((before, after), others))
            unit, is_paired = f" of `{reference}`", True
            break
    else:
        old, new, unit, is_paired = before[case]["rounds_ms"], after[case]["rounds_ms"], " ms", False
    if min(len(old), len(new)) < LEAST_ROUNDS:
        differs = abs(statistics.median(new) / statistics.median(old) - 1) > LEAST_TIME
        return [], ["too few rounds to tell a step's time"] * differs
    middle_old, middle_new = statistics.median(old), statistics.median(new)
    change = middle_new / middle_old - 1
    noise = SIGMAS * math.hypot(_error(old) / middle_old, _error(new) / middle_new)
    text = f"a step {middle_old:.3f} to {middle_new:.3f}{unit} ({change:+.1%}, noise {noise:.1%})"
    if abs(change) <= max(noise, LEAST_TIME):
        return [], []
    if not is_paired:
        return [], [f"{text}: no other arm ran beside it, so this may be the machine's"]
    return ([text], []) if change > 0 else ([], [text])


def _ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, base)]


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a median, from the quartiles: 1.25 deviations by the root of the count."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))
