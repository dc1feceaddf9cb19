"""Results as pictures: time and memory by arm, memory against depth, time against batch size."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.cases import ARMS, Group
from benchmarks.results import Results
from benchmarks.tables import MIB, by_group, ratio, series

# Okabe and Ito's colours, which the colour-blind can tell apart.
CUT = 2  # bars end here; their labels go on
COLOURS = dict(zip(ARMS, ("#999999", "#000000", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7")))


def draw(results: Results, folder: pathlib.Path) -> list[str]:
    """Draw what there is to draw, and return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = by_group(results.rows)
    drawn = [
        _bars(groups, "step_ms", "time of a step / full backprop", folder / "step-time.png"),
        _bars(groups, "peak", "peak memory / full backprop", folder / "peak-memory.png"),
        _lines(groups, "depth", "peak", "stages unfrozen, the head first", "peak memory (MiB)", folder / "depth.png"),
        _lines(groups, "batch", "step_ms", "batch size", "time of a step (ms)", folder / "batch.png"),
        _lines(groups, "width", "step_ms", "width, relative", "time of a step (ms)", folder / "width.png"),
    ]
    return [name for name in drawn if name]


def _bars(groups: dict[Group, dict[str, Any]], what: str, label: str, path: pathlib.Path) -> str:
    """Draw bars for each group in which more than two arms were measured against full backprop."""
    shown = {group: rows for group, rows in groups.items() if len(rows) > 3 and rows.get("full", {}).get(what)}
    if not shown:
        return ""
    arms = [arm for arm in ARMS if arm != "full" and any(ratio(rows, arm, "full", what) for rows in shown.values())]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * len(shown) * (len(arms) + 1)), layout="constrained")
    height, longest = 1 / (len(arms) + 1), 1.0
    for place, arm in enumerate(arms):
        values = [ratio(rows, arm, "full", what) or 0 for rows in shown.values()]
        longest = max(longest, *values)
        at = [row + (place - (len(arms) - 1) / 2) * height for row in range(len(shown))]
        bars = axes.barh(at, [min(value, CUT) for value in values], height * 0.9, label=arm, color=COLOURS[arm])
        axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=2, fontsize=6)
    axes.axvline(1, color=COLOURS["full"], linewidth=1)
    axes.set_yticks(range(len(shown)), [str(group) for group in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * min(longest, CUT))
    axes.set_xlabel(f"{label} (the line at 1)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(arms), frameon=False, fontsize=8)
    return _saved(figure, path)


def _lines(groups: dict[Group, dict[str, Any]], axis: str, what: str, across: str, up: str, path: pathlib.Path) -> str:
    """Draw a line for each arm of each series, each series in a panel of its own."""
    found = {key: points for key, points in series(groups, axis).items() if all(row.get(what) for _, row in points)}
    panels = list(dict.fromkeys(name for name, _ in found))
    if not panels:
        return ""
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(1 + 4 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for name, axes in zip(panels, all_axes[0]):
        for (series_name, arm), points in found.items():
            if series_name == name:
                values = [row[what] / (MIB if what == "peak" else 1) for _, row in points]
                axes.plot([x for x, _ in points], values, marker="o", label=arm, color=COLOURS[arm])
        if axis != "depth":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted("{x:g}")
        else:
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _saved(figure: Any, path: pathlib.Path) -> str:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name
