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

from benchmarks.cases import SHARED, UNFREEZE, Case
from benchmarks.results import Row, newest

MIB = 2**20
FULL = ("full", "full+xla")
CUT = 2  # bars end here, with a mark; their labels go on
PARTS = {
    "weight_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "rest": "data and buffers",
    "activation_bytes": "activations",
}
X_LABELS = {"batch": "batch size", "depth": "stages unfrozen, the head first", "width": "width, relative"}
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999", "#F0E442", "#555555",
           *map(matplotlib.colors.to_hex, matplotlib.colormaps["tab20b"].colors))  # fmt: skip


def draw(frame: pd.DataFrame, rows: list[Row], folder: pathlib.Path) -> list[str]:
    """Draw what there is to draw, and return the names of the files."""
    is_shown = frame["step_ms"].notna() & (frame["error"] == "") & (frame["invalid"] == "")
    frame = frame[is_shown.astype(bool)]  # of no lines it is of another type
    figures = {
        "step-time.png": _bars(frame, "/ full", "time of a step / full backprop"),
        "peak-memory.png": _bars(frame, "peak / full", "peak memory / full backprop"),
        "memory-against-time.png": _against(frame),
        "memory-parts.png": _stacked(frame),
        **{f"{axis}.png": _sweep(frame, axis) for axis in X_LABELS if not frame.empty},
        "largest-batch.png": _largest(rows),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
    return list(drawn)


def colour(frame: pd.DataFrame, arm: str) -> str:
    """Return the colour of an arm, the same in all pictures of some results."""
    arms = list(dict.fromkeys(["full", "forward", "hand", "tapeloop", *frame["arm"]]))
    return COLOURS[arms.index(arm) % len(COLOURS)]


def _bars(frame: pd.DataFrame, what: str, label: str) -> Any:
    """Draw what arms take of full backprop, by group."""
    some = frame[frame[what].notna() & ~frame["arm"].isin(FULL)]
    some = some[some.groupby("group", sort=False)["arm"].transform("count") > 1]
    if some.empty:
        return None
    names, ends = some["group"].map(str), ("least", "most") if what == "/ full" else (what, what)
    some = some.assign(name=names, y=np.arange(len(some)) + 0.7 * (names != names.shift()).cumsum())
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.14 * some["y"].max()), layout="constrained")
    for arm, lines in some.groupby("arm", sort=False):
        value, low, high = (lines[end].fillna(lines[what]).clip(upper=CUT) for end in (what, *ends))
        style = {"error_kw": {"elinewidth": 0.6}, "color": colour(frame, str(arm)), "label": arm}
        bars = axes.barh(lines["y"], value, 0.9, xerr=[(value - low).abs(), (high - value).abs()], **style)
        said = [f"{ratio:.2f}" + " //" * (ratio > CUT) for ratio in lines[what]]
        axes.bar_label(bars, said, padding=2, fontsize=6)
    middles = some.groupby("name", sort=False)["y"].mean()
    axes.set_yticks(middles, middles.index)
    axes.set_ylim(some["y"].max() + 1, some["y"].min() - 1)
    axes.tick_params(labelsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.12 * min(max(1.0, some[what].max()), CUT))
    axes.set_xlabel(f"{label} (the line at 1; // where a bar is cut)")
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return figure


def _against(frame: pd.DataFrame) -> Any:
    """Draw peak memory against time, both relative to full backprop: what lies to the lower left is better in both."""
    some = frame[frame["/ full"].notna() & frame["peak / full"].notna() & ~frame["arm"].isin(FULL)]
    if some.empty:
        return None
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for arm, points in some.groupby("arm", sort=False):
        axes.scatter(points["/ full"], points["peak / full"], label=arm, color=colour(frame, str(arm)), s=24, alpha=0.8)
    axes.plot(1, 1, marker="*", markersize=12, color="black", linestyle="none", label="full backprop")
    axes.set(xlabel="time of a step / full backprop", ylabel="peak memory / full backprop")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _stacked(frame: pd.DataFrame) -> Any:
    """Draw what peak memory is made of."""
    some = frame[frame["peak"].notna() & frame["weight_bytes"].notna()]
    some = some[some["arm"].isin(["full", "forward", "hand", "tapeloop", "tapeloop+cache", "tapeloop+plain"])]
    if some.empty:
        return None
    rest = (some["persistent"] - some["weight_bytes"] - some["optimizer_bytes"]).clip(lower=0)
    some = some.assign(rest=rest, name=some["group"].map(str) + ": " + some["arm"]).set_index("name")
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(some)), layout="constrained")
    parts = some[list(PARTS)].astype(float).rename(columns=PARTS) / MIB
    parts.plot.barh(ax=axes, stacked=True, width=0.8, fontsize=7, color=COLOURS[1:5], ylabel="", legend=False)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory (MiB)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _sweep(frame: pd.DataFrame, axis: str) -> Any:
    """Draw time and memory where one thing differs alone, a line for each arm with its band."""

    def panel_of(group: Case) -> Case:
        return dataclasses.replace(group, **({"selection": "by depth"} if axis == "depth" else {axis: 0}))

    if axis == "depth":
        frame = frame[[group.workload == "mobilenetv2" for group in frame["group"]]]
        xs = [1 + UNFREEZE.index(one.selection) if one.selection in UNFREEZE else 0 for one in frame["group"]]
    else:
        xs = [getattr(group, axis) for group in frame["group"]]
    frame = frame.assign(x=xs, panel=[panel_of(group) for group in frame["group"]])
    frame["like"] = [dataclasses.replace(panel, selection="") for panel in frame["panel"]]
    is_shared = frame["arm"].isin(SHARED)  # what does not depend on what trains, which stands in all panels
    shared = frame[is_shared].drop_duplicates(["like", "arm", "x"])
    panels = {}
    for panel, points in frame[~is_shared & (frame["x"] > 0)].groupby("panel", sort=False):
        others = shared[shared["like"] == points["like"].iloc[0]]
        if axis == "depth":
            others = others.drop_duplicates("arm").drop(columns="x").merge(points[["x"]].drop_duplicates(), how="cross")
        points = pd.concat([points, others])
        if points["x"].nunique() > 1:
            panels[panel] = points
    if not panels:
        return None
    figure, grid = plt.subplots(2, len(panels), figsize=(1 + 4 * len(panels), 6.4), layout="constrained", squeeze=False)
    for (panel, points), (above, below) in zip(panels.items(), grid.T):
        for arm, line in points.groupby("arm", sort=False):
            line = line.sort_values("x", kind="stable").astype({"low": float, "high": float})
            if len(line) > 1:
                shade = colour(frame, str(arm))
                above.plot(line["x"], line["step_ms"], marker="o", label=arm, color=shade)
                above.fill_between(line["x"], line["low"], line["high"], color=shade, alpha=0.2)
                line = line[line["peak"].notna()]
                below.plot(line["x"], line["peak"] / MIB, marker="o", color=shade)
        above.set_title(str(panel).replace(", batch 0", ""), fontsize=9)
        for axes, label in ((above, "time of a step (ms)"), (below, "peak memory (MiB)")):
            axes.set(xlabel=X_LABELS[axis], ylabel=label)
            axes.grid(alpha=0.3)
            if axis == "depth":
                axes.xaxis.get_major_locator().set_params(integer=True)
                continue
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for one in (axes.xaxis, axes.yaxis):
                one.set_major_formatter("{x:g}")
        above.legend(frameon=False, fontsize=8)
    return figure


def _largest(rows: list[Row]) -> Any:
    """Draw the largest batch that fits, under each cap."""
    found = [(Case.of(row), row["largest_batch"]) for row in newest(rows) if "largest_batch" in row]
    if not found:
        return None
    lines = [(case.cap_mb / 1024, f"{case.arm}, {case.selection}", batch) for case, batch in found]
    bars = pd.DataFrame(lines, columns=["GiB", "arm", "batch"]).pivot_table("batch", "GiB", "arm")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bars.plot.bar(ax=axes, rot=0, ylabel="largest batch that fits", xlabel="memory (GiB)")
    for container in axes.containers:
        axes.bar_label(container, fmt="%d", padding=2, fontsize=7)
    axes.legend(frameon=False, fontsize=8)
    return figure
