"""Results as a frame, and the frame as tables and sentences: what is saved, and at what cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.cases import ARMS, CHANGES, Case
from benchmarks.measure import interval
from benchmarks.results import Row, newest

MIB = 2**20
# What lines are compared with, the fastest of some arms of the same group. The first two do not depend on what trains:
# where they were measured once for all selections, they stand with `all`.
BASES = {
    "floor": ("forward",),
    "full": ("full", "full+xla"),
    "by hand": ("hand", "hand+xla"),
    "Keras": ("keras", "keras+tuned", "keras+xla"),
    "PyTorch": ("torch", "torch+compile"),
}
SHARED = ("floor", "full")
VARIANTS = {"cached": "tapeloop+cache", "folded": "tapeloop+fold"}  # which are compared with `tapeloop`
TIMES = ("step_ms", "fixed_ms", "first_step_s", "compile_s", "examples_per_s", "joules_a_step")
BYTES = ("peak", "persistent", "growth", "weight_bytes", "optimizer_bytes", "data_bytes", "activation_bytes", "nodes")
SAID = {
    "all": "training all of it", "head": "training the head", "last_block": "training the last block and the head",
    "first_block": "training the first block", "biases": "training the biases", "norm": "training the norms",
    "lora": "training low-rank terms (LoRA)", "adapters": "training adapters",
    "middle": "training the first block and the head",
}  # fmt: skip


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a line for each arm of each group: its figures over all its processes, and what it takes of other arms.

    Times are medians over processes, with an interval of 95% in which processes are drawn again, and rounds in each.
    Memory is that of the case that measures it alone, or where there is none what was read beside the times.
    """
    found: dict[tuple[Case, str], dict[str, list[Row]]] = {}
    invalid: dict[Any, str] = {}
    for row in newest(rows):
        case = Case.of(row)
        if case.kind in ("step", "memory"):
            found.setdefault((case.group, case.arm), {"step": [], "memory": []})[case.kind].append(row)
        elif case.kind == "equivalence":
            invalid |= {(_like(case), arm): why for arm, why in row.get("invalid", {}).items()}
    lines = [
        {"group": group, "arm": arm, **_figures(**kinds), "invalid": invalid.get((_like(group), arm), "")}
        for (group, arm), kinds in found.items()
    ]
    groups = list(dict.fromkeys(line["group"] for line in lines))
    lines.sort(key=lambda line: (groups.index(line["group"]), _place(line["arm"])))
    sound = [line for line in lines if (line["step_ms"] or 0) > 0 and not line["error"] + line["invalid"]]
    valid = {(line["group"], line["arm"]): line for line in sound}
    for line in lines:
        _compare(line, valid)
    return pd.DataFrame(lines)


def _place(arm: str) -> tuple[int, int, str]:
    base, *changes = arm.split("+")
    return list(ARMS).index(base), len(changes), arm


def _like(case: Case) -> Any:
    """Return what an equivalence case shares with those that it vouches for: it is of a smaller batch and size."""
    return case.workload, case.selection, case.width, case.own


def _figures(step: list[Row], memory: list[Row]) -> dict[str, Any]:
    timed = [row for row in step if "rounds_ms" in row]
    errors = [row["error"] for row in (*step, *memory) if row["status"] == "error"]
    figures: dict[str, Any] = {"error": errors[0] if errors else "", "processes": len(timed), "low": None, "high": None}
    if timed:
        figures["low"], figures["high"] = interval([row["rounds_ms"] for row in timed], np.random.default_rng(0))
    for names, some in ((TIMES, timed), (BYTES, [row for row in memory if "peak" in row] or timed)):
        for name in names:
            values = [row[name] for row in some if row.get(name) is not None]
            figures[name] = float(np.median(values)) if values else None
    return figures


def _compare(line: dict[str, Any], valid: dict[tuple[Case, str], dict[str, Any]]) -> None:
    """Add to a line what it takes of other arms, and the bounds of what it takes of full backprop."""
    group, line["least"], line["most"] = line["group"], None, None
    for name, arms in BASES.items():
        some: list[dict[str, Any]] = []
        for where in (group, *[dataclasses.replace(group, selection="all")] * (name in SHARED)):
            some = some or [valid[where, arm] for arm in arms if (where, arm) in valid]
        base = min(some, key=lambda one: one["step_ms"], default={})
        is_one = (group, line["arm"]) in valid
        line[f"/ {name}"] = _ratio(line["step_ms"], base.get("step_ms")) if is_one else None
        line[f"peak / {name}"] = _ratio(line["peak"], base.get("peak")) if is_one else None
        line[f"{name} ms"] = base.get("step_ms")
        if name == "full" and base and is_one and min(line["processes"], base["processes"]) > 1:
            line["least"], line["most"] = line["low"] / base["high"], line["high"] / base["low"]
    for name, arm in VARIANTS.items():
        line[name] = _ratio(valid.get((group, arm), {}).get("step_ms"), line["step_ms"])


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def number(value: Any) -> str:
    """Return a figure of three digits, or `-`."""
    return "-" if pd.isna(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def share(value: Any) -> str:
    """Return a ratio of two decimals, or `-`."""
    return "-" if pd.isna(value) else f"{value:.2f}"


def mib(value: Any) -> str:
    """Return bytes as MiB, or `-`."""
    return "-" if pd.isna(value) else f"{value / MIB:,.1f}"


# The columns of tables: what they are called, of what they are made, and how that is written.
FLOORS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "what trains": ("group", str), "floor ms": ("floor ms", number), "tapeloop ms": ("step_ms", number),
    **{name: (name, share) for name in ("/ floor", "/ by hand", "/ full", "peak / floor", "peak / full", "/ Keras",
                                        "/ PyTorch", "cached", "folded")},
}  # fmt: skip
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "arm": ("arm", str), "as": ("as", str), "step ms": ("step_ms", number), "from": ("low", number),
    "to": ("high", number), "/ forward": ("/ floor", share), "/ full": ("/ full", share), "/ first": ("/ first", share),
    "peak / first": ("peak / first", share), "fit ms": ("fixed_ms", number), "compile s": ("compile_s", number),
    "examples/s": ("examples_per_s", number), "J a step": ("joules_a_step", number), "peak MiB": ("peak", mib),
    "weights": ("weight_bytes", mib), "optimizer": ("optimizer_bytes", mib), "activations": ("activation_bytes", mib),
    "nodes": ("nodes", number), "": ("note", str),
}  # fmt: skip


def _shown(lines: pd.DataFrame, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> pd.DataFrame:
    return pd.DataFrame({title: lines[name].map(write) for title, (name, write) in columns.items()})


def floors(frame: pd.DataFrame) -> pd.DataFrame:
    """Say for each group how far tapeloop is from the forward pass alone, from code by hand, and from full backprop."""
    compared = frame[["/ floor", "/ full", "/ by hand"]].notna().any(axis=1)
    return _shown(frame[(frame["arm"] == "tapeloop") & compared], FLOORS)


def sentences(frame: pd.DataFrame) -> list[str]:
    """Say for each group in a plain sentence what tapeloop saves of full backprop."""
    said = []
    for _, line in frame[(frame["arm"] == "tapeloop") & frame["/ full"].notna()].iterrows():
        group, peak = line["group"], line["peak / full"]
        bounds = "" if pd.isna(line["least"]) else f" ({line['least']:.2f} to {line['most']:.2f})"
        memory = "" if pd.isna(peak) else f" and {peak:.2f} of the memory"
        what = SAID.get(group.selection, f"training {group.selection}")
        named = str(group).replace(f" {group.selection}", "", 1)
        said.append(f"{named}: {what} takes {line['/ full']:.2f}{bounds} of the time{memory} of full backprop.")
    return said


def group_table(frame: pd.DataFrame, group: Case) -> pd.DataFrame:
    """Return all figures of the arms of a group, those that there are."""
    some = frame[frame["group"] == group]
    tuned = [
        ARMS[arm.split("+")[0]][0] == "tuned" or bool({"tuned", "compile", "xla", "fold"} & set(arm.split("+")[1:]))
        for arm in some["arm"]
    ]
    notes = np.where(some["error"] != "", "failed", np.where(some["invalid"] != "", "invalid", ""))
    added: dict[str, Any] = {"note": notes, "as": np.where(tuned, "tuned", "defaults")}
    for name, what in (("/ first", "step_ms"), ("peak / first", "peak")):  # where it is not said of full backprop
        first = None if some["/ full"].notna().any() else some[what].iloc[0]
        added[name] = some[what] / first if first and not pd.isna(first) else None
    table = _shown(some.assign(**added), FIGURES)
    return table.loc[:, [name for name in table if not table[name].isin(["-", ""]).all()]]


def others(rows: Sequence[Row]) -> pd.DataFrame:
    """Return what cases beside times and memory found: the largest batch, the time to an accuracy, checkpoints."""
    lines = []
    for row in newest(rows):
        case = Case.of(row)
        if case.kind not in ("step", "memory"):
            found = row.get("said") or (f"batch {row['largest_batch']}" if "largest_batch" in row else row.get("error"))
            lines.append(
                {"what": str(case), "arm": case.arm, "kind": case.kind, "process": case.process, "found": found}
            )
    return pd.DataFrame(lines)


def legend(frame: pd.DataFrame) -> list[str]:
    """Say what the arms are that a frame has."""
    names = {
        part for arm in frame["arm"] for part in [arm.split("+")[0], *(f"+{change}" for change in arm.split("+")[1:])]
    }
    lines = [f"`{arm}` ({kind}): {said}" for arm, (kind, said) in ARMS.items() if arm in names]
    return lines + [f"`+{change}`: {said}" for change, said in CHANGES.items() if f"+{change}" in names]


def markdown(table: pd.DataFrame) -> list[str]:
    """Return a table in Markdown, the first column to the left."""
    if table.empty:
        return ["Nothing was measured."]
    cells = [table.columns, ["---", *["--:"] * (len(table.columns) - 1)], *table.astype(str).to_numpy()]
    return [f"| {' | '.join(row)} |" for row in cells]
