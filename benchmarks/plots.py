"""Results as pictures: time and memory by arm, one against the other, what memory is made of, and how both scale."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.cases import UNFREEZE, Case
from benchmarks.results import Row, newest
from benchmarks.tables import BASES, MIB

SHARED = ("forward", *BASES["full"])  # arms that do not depend on what trains
CUT = 2  # bars end here, with a mark; their labels go on
PARTS = {
    "weight_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "rest": "data and buffers",
    "activation_bytes": "activations",
}
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999", "#F0E442", "#555555")


def draw(frame: pd.DataFrame, rows: list[Row], folder: pathlib.Path) -> list[str]:
    """Draw what there is to draw, and return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = frame[frame["step_ms"].notna() & (frame["error"] == "") & (frame["invalid"] == "")]
    drawn = [
        _bars(frame, "/ full", "time of a step / full backprop", folder / "step-time.png"),
        _bars(frame, "peak / full", "peak memory / full backprop", folder / "peak-memory.png"),
        _against(frame, folder / "memory-against-time.png"),
        _stacked(frame, folder / "memory-parts.png"),
        *[_sweep(frame, axis, folder / f"{axis}.png") for axis in ("batch", "depth", "width")],
        _largest(rows, folder / "largest-batch.png"),
    ]
    return [name for name in drawn if name]


def colour(frame: pd.DataFrame, arm: str) -> str:
    """Return the colour of an arm, the same in all pictures of some results."""
    arms = list(dict.fromkeys(["full", "forward", "hand", "tapeloop", *frame["arm"]]))
    return COLOURS[arms.index(arm) % len(COLOURS)]


def _bars(frame: pd.DataFrame, what: str, label: str, path: pathlib.Path) -> str:
    """Draw what arms take of full backprop, by group."""
    some = frame[frame[what].notna() & ~frame["arm"].isin(BASES["full"])]
    some = some[some.groupby("group", sort=False)["arm"].transform("count") > 1]
    if some.empty:
        return ""
    arms = list(dict.fromkeys(some["arm"]))
    ends = ("least", "most") if what == "/ full" else (what, what)
    table, low, high = (
        some.assign(name=some["group"].map(str)).pivot_table(column, "name", "arm", sort=False, dropna=False)
        .astype(float).reindex(columns=arms) for column in (what, *ends)
    )  # fmt: skip
    drawn = table.clip(upper=CUT)
    low, high = (end.reindex_like(table).fillna(table).clip(upper=CUT) for end in (low, high))
    errors = np.stack([(drawn - low).abs().T, (high - drawn).abs().T], axis=1)  # as pandas takes them: arm, side, group
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * len(table) * (len(arms) + 1)), layout="constrained")
    shades = [colour(frame, arm) for arm in arms]
    drawn.plot.barh(
        ax=axes, xerr=errors, error_kw={"elinewidth": 0.6}, color=shades, width=0.85, fontsize=8, legend=False
    )
    for container, arm in zip([c for c in axes.containers if hasattr(c, "patches")], arms):
        said = ["" if np.isnan(value) else f"{value:.2f}" + " //" * bool(value > CUT) for value in table[arm]]
        axes.bar_label(container, said, padding=2, fontsize=6)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * min(max(1.0, table.max().max()), CUT))
    axes.set(xlabel=f"{label} (the line at 1; // where a bar is cut)", ylabel="")
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return _saved(figure, path)


def _against(frame: pd.DataFrame, path: pathlib.Path) -> str:
    """Draw peak memory against time, both relative to full backprop: what lies to the lower left is better in both."""
    some = frame[frame["/ full"].notna() & frame["peak / full"].notna() & ~frame["arm"].isin(BASES["full"])]
    if some.empty:
        return ""
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for arm, points in some.groupby("arm", sort=False):
        axes.scatter(points["/ full"], points["peak / full"], label=arm, color=colour(frame, str(arm)), s=24, alpha=0.8)
    axes.plot(1, 1, marker="*", markersize=12, color="black", linestyle="none", label="full backprop")
    axes.set(xlabel="time of a step / full backprop", ylabel="peak memory / full backprop")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _stacked(frame: pd.DataFrame, path: pathlib.Path) -> str:
    """Draw what peak memory is made of."""
    some = frame[frame["peak"].notna() & frame["weight_bytes"].notna()]
    some = some[some["arm"].isin(["full", "forward", "hand", "tapeloop", "tapeloop+cache", "tapeloop+fold"])]
    if some.empty:
        return ""
    rest = (some["persistent"] - some["weight_bytes"] - some["optimizer_bytes"]).clip(lower=0)
    some = some.assign(rest=rest, name=some["group"].map(str) + ": " + some["arm"]).set_index("name")
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(some)), layout="constrained")
    parts = some[list(PARTS)].astype(float).rename(columns=PARTS) / MIB
    parts.plot.barh(ax=axes, stacked=True, width=0.8, fontsize=7, color=COLOURS[1:5], ylabel="", legend=False)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory (MiB)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return _saved(figure, path)


def _sweep(frame: pd.DataFrame, axis: str, path: pathlib.Path) -> str:
    """Draw time and memory where one thing differs alone, a line for each arm with its band."""
    panels: dict[Case, list[tuple[float, Any]]] = {}
    shared: dict[Any, dict[float, Any]] = {}  # of what does not depend on what trains, which stands in all panels
    for _, row in frame.iterrows():
        group = row["group"]
        if axis == "depth":
            if group.workload != "mobilenetv2":
                continue
            key = dataclasses.replace(group, selection="by depth")
            x = 1 + UNFREEZE.index(group.selection) if group.selection in UNFREEZE else 0
        else:
            key, x = dataclasses.replace(group, **{axis: 0}), getattr(group, axis)
        if row["arm"] in SHARED:
            shared.setdefault((dataclasses.replace(key, selection=""), row["arm"]), {}).setdefault(x, row)
        elif x:
            panels.setdefault(key, []).append((x, row))
    for key, points in panels.items():
        xs = sorted({x for x, _ in points})
        for (like, _), by_x in shared.items():
            if like == dataclasses.replace(key, selection=""):
                points += [(x, next(iter(by_x.values()))) for x in xs] if axis == "depth" else by_x.items()
    panels = {key: points for key, points in panels.items() if len({x for x, _ in points}) > 1}
    if not panels:
        return ""
    figure, grid = plt.subplots(2, len(panels), figsize=(1 + 4 * len(panels), 6.4), layout="constrained", squeeze=False)
    for (key, points), column in zip(panels.items(), grid.T):
        for arm in dict.fromkeys(row["arm"] for _, row in points):
            line = sorted(((x, row) for x, row in points if row["arm"] == arm), key=lambda point: point[0])
            if len(line) > 1:
                _line(column, line, arm, colour(frame, arm))
        column[0].set_title(str(key).replace(", batch 0", ""), fontsize=9)
        for axes, label in zip(column, ("time of a step (ms)", "peak memory (MiB)")):
            axes.set_xlabel(
                {"batch": "batch size", "depth": "stages unfrozen, the head first"}.get(axis, "width, relative")
            )
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if axis != "depth":
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                for formatted in (axes.xaxis.set_major_formatter, axes.yaxis.set_major_formatter):
                    formatted("{x:g}")
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
        column[0].legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _line(column: Any, line: list[tuple[float, Any]], arm: str, shade: str) -> None:
    xs = [x for x, _ in line]
    column[0].plot(xs, [row["step_ms"] for _, row in line], marker="o", label=arm, color=shade)
    column[0].fill_between(
        xs, [row["low"] for _, row in line], [row["high"] for _, row in line], color=shade, alpha=0.2
    )
    known = [(x, row["peak"] / MIB) for x, row in line if not pd.isna(row["peak"])]
    if known:
        column[1].plot(*zip(*known), marker="o", color=shade)


def _largest(rows: list[Row], path: pathlib.Path) -> str:
    """Draw the largest batch that fits, under each cap."""
    found = [(Case.of(row), row["largest_batch"]) for row in newest(rows) if "largest_batch" in row]
    if not found:
        return ""
    lines = [(case.cap_mb / 1024, f"{case.arm}, {case.selection}", batch) for case, batch in found]
    bars = pd.DataFrame(lines, columns=["GiB", "arm", "batch"]).pivot_table("batch", "GiB", "arm")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bars.plot.bar(ax=axes, rot=0, ylabel="largest batch that fits", xlabel="memory (GiB)")
    for container in axes.containers:
        axes.bar_label(container, fmt="%d", padding=2, fontsize=7)
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _saved(figure: Any, path: pathlib.Path) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name
