"""Results as Markdown: a table for each comparison, how far each is from the floor, and how it scales."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import ARMS, CACHED, UNFREEZE, Group
from benchmarks.results import Results, group_of

MIB = 2**20
HEADER = ("arm", "step ms", "quartiles", "/ forward", "/ full", "examples/s", "peak MiB", "/ full",
          "persistent MiB", "optimizer state", "first step s", "nodes")  # fmt: skip


def report(results: Results, pictures: Sequence[str]) -> str:
    """Return the whole report.

    Args:
        results: What was measured.
        pictures: The names of the pictures that stand beside it.
    """
    groups = by_group(results.rows)
    lines = ["# Benchmarks", "", *_where(results), ""]
    if not results.complete:
        lines += ["**The run did not come to its end: what follows is what there is.**", ""]
    lines += ["## Floors", "", *floors(groups), ""]
    for picture in pictures:
        lines += [f"![{picture.removesuffix('.png').replace('-', ' ')}]({picture})", ""]
    lines += ["## Scaling", "", *scaling(groups), "", "## All figures", ""]
    lines += ["`forward` is inference alone. The arms:", "", *(f"- `{arm}`: {said}" for arm, said in ARMS.items()), ""]
    for group, rows in groups.items():
        lines += [f"### {group}", "", *_table(HEADER, [_row(row, rows) for row in rows.values()]), ""]
        lines += [f"- `{arm}` is **invalid**: {row['invalid']}" for arm, row in rows.items() if "invalid" in row]
        lines += [f"- `{arm}` failed: {row['error']}" for arm, row in rows.items() if "error" in row]
        lines += [""] * any("invalid" in row or "error" in row for row in rows.values())
    return "\n".join(lines).rstrip() + "\n"


def by_group(rows: Iterable[dict[str, Any]]) -> dict[Group, dict[str, dict[str, Any]]]:
    """Return rows by group and arm."""
    groups: dict[Group, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), {})[row["arm"]] = row
    return groups


def ratio(rows: dict[str, dict[str, Any]], arm: str, base: str, what: str = "step_ms") -> float | None:
    """Return what an arm takes, relative to another of its group; None where either has no such figure."""
    one, other = (rows.get(name, {}) for name in (arm, base))
    if not all(row.get(what) and is_valid(row) for row in (one, other)):
        return None
    if what == "step_ms":  # of the same round, so that drift has no part in it
        return statistics.median(mine / theirs for mine, theirs in zip(one["rounds_ms"], other["rounds_ms"]))
    return float(one[what] / other[what])


def is_valid(row: dict[str, Any]) -> bool:
    """Tell whether a row has figures that can be compared."""
    return "step_ms" in row and "error" not in row and "invalid" not in row


def floors(groups: dict[Group, dict[str, dict[str, Any]]]) -> list[str]:
    """Say for each group how far tapeloop is from the forward pass alone, from code by hand, and from full backprop.

    The last column is a step on cached features relative to one without.
    """
    header = ("what trains", "floor ms", "tapeloop ms", "/ floor", "/ by hand", "/ full", "peak / floor", "peak / full",
              "/ Keras", "cached")  # fmt: skip
    table = []
    for group, rows in groups.items():
        mine = rows.get("tapeloop", {})
        if is_valid(mine) and len(rows) > 1:
            floor = rows.get("forward", {}).get("step_ms")
            peaks = [ratio(rows, "tapeloop", base, "peak") for base in ("forward", "full")]
            times = [ratio(rows, "tapeloop", base) for base in ("forward", "selective", "full")]
            cells = [_number(floor), _number(mine["step_ms"]), *map(_ratio, times), *map(_ratio, peaks)]
            others = ratio(rows, "tapeloop", "keras"), ratio(rows, CACHED, "tapeloop")
            table.append((str(group), *cells, *map(_ratio, others)))
    return _table(header, table)


def scaling(groups: dict[Group, dict[str, dict[str, Any]]]) -> list[str]:
    """Say how time and memory grow with batch size, depth unfrozen and width."""
    lines: list[str] = []
    for title, axis, unit in (
        ("batch size", "batch", "example more"),
        ("depth unfrozen", "depth", "stage more"),
        ("width", "width", "doubling"),
    ):
        table = []
        for (name, arm), points in series(groups, axis).items():
            cells = [_slope(points, what, axis) for what in ("step_ms", "peak")]
            where = ", ".join(f"{x:g}" for x, _ in points)
            table.append((name, arm, where, cells[0], "-" if cells[1] == "-" else cells[1]))
        if table:
            header = ("what", "arm", title, f"ms for each {unit}", f"MiB for each {unit}")
            lines += [*_table(header, table), ""]
    return lines[:-1] if lines else ["Nothing was measured at more than one size."]


def series(groups: dict[Group, dict[str, dict[str, Any]]], axis: str) -> dict[tuple[str, str], list[tuple[float, Any]]]:
    """Return rows in which only one thing differs, by what they are and by arm, in order of it.

    Args:
        groups: Rows by group and arm.
        axis: `"batch"`, `"width"`, or `"depth"`, which counts the stages that train.
    """
    found: dict[tuple[str, str], list[tuple[float, Any]]] = {}
    for group, rows in groups.items():
        fixed = [group.workload, group.dtype, *["xla"] * group.xla, f"{group.size or ''}"]
        if axis == "depth":
            if group.workload != "mobilenetv2" or group.selection not in UNFREEZE:
                continue
            x: float = 1 + UNFREEZE.index(group.selection)
        else:
            x = getattr(group, axis)
            fixed.append(group.selection)
        fixed += [f"b{group.batch}"] * (axis != "batch") + [f"width {group.width:g}"] * (
            axis != "width" and group.width != 1
        )
        for arm, row in rows.items():
            if is_valid(row):
                found.setdefault((" ".join(filter(None, fixed)), arm), []).append((x, row))
    return {key: sorted(some, key=lambda point: point[0]) for key, some in found.items() if len(some) > 1}


def _slope(points: Sequence[tuple[float, Any]], what: str, axis: str) -> str:
    """Return the slope by least squares: for width, the factor for each doubling, from the slope of the logarithms."""
    some = [(x, row[what] / (MIB if what == "peak" else 1)) for x, row in points if row.get(what)]
    if len(some) < 2:
        return "-"
    if axis == "width":
        some = [(math.log2(x), math.log2(y)) for x, y in some]
    mean_x, mean_y = (sum(values) / len(some) for values in zip(*some))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in some) / sum((x - mean_x) ** 2 for x, _ in some)
    return f"x {2**slope:.2f}" if axis == "width" else f"{slope:.3g}"


def _where(results: Results) -> list[str]:
    machine = results.machine
    device = machine.get("device", "CPU")
    on = f"{machine['cores']} cores of {machine['processor']}" if device == "CPU" else device
    versions = ", ".join(
        f"{name} {machine[key]}"
        for name, key in (("TensorFlow", "tensorflow"), ("Keras", "keras"), ("PyTorch", "torch"), ("CUDA", "cuda"))
        if machine.get(key)
    )
    return [
        f"Measured on {on}, {versions}, by `{results.command}`. A step is the median over rounds in which the arms "
        "take turns, with its quartiles; the peak is that of TensorFlow's own allocator, weights and data included, "
        "one process for each arm.",
    ]


def _row(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    arm = row["arm"]
    if "step_ms" not in row:
        return (arm, "failed", *["-"] * (len(HEADER) - 2))
    peak, persistent, state = (row.get(name) for name in ("peak", "persistent", "state_bytes"))
    times = [ratio(rows, arm, base) for base in ("forward", "full")]
    return (
        arm + " (invalid)" * ("invalid" in row),
        _number(row["step_ms"]),
        " to ".join(map(_number, row["step_ms_quartiles"])),
        *map(_ratio, times),
        f"{row['examples_per_s']:,.0f}",
        "-" if peak is None else f"{peak / MIB:,.1f}",
        _ratio(ratio(rows, arm, "full", "peak")),
        "-" if persistent is None else f"{persistent / MIB:,.1f}",
        "-" if state is None else f"{state / MIB:,.2f} MiB",
        f"{row['first_step_s']:.2f}",
        str(row.get("ops") or "-"),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows)]
