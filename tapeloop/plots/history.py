"""A picture of a history: its logs with the phases behind them, and what trained when below."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tapeloop.plots.course import Axis, Course, Line, Phase
from tapeloop.plots.drawing import Colour, Drawing, Figure, legend_groups, plain, shortened_path

WIDTH = 9.0  # inches, as all sizes
MARKED = 40  # epochs up to which each has a dot
SHADED = 100  # phases up to which each has a shade
FEW = 12  # phases up to which those are labelled that have room
SMALL, NORMAL = 7.5, 9.0  # points
SOLID, DASHED = 0, 1  # the places of the colours of training and validation


def plot_history(
    logs: Mapping[str, Sequence[Any]],
    epochs: Sequence[int],
    steps: Sequence[int],
    phases: Sequence[Phase],
    path: str | os.PathLike[str] | None,
    metrics: str | Sequence[str] | None,
    by: str,
) -> Figure:
    """Draw a history; see `History.plot`.

    Args:
        logs: The values of each log by epoch.
        epochs: The number of each epoch.
        steps: The steps trained by the end of each epoch.
        phases: What trained from which step on.
        path: Where the picture is written, if anywhere.
        metrics: The names of the logs to draw; None means all.
        by: What the axis counts: `"epoch"` or `"step"`.
    """
    axis = _axis(epochs, steps, phases, by)
    panels = _panels(logs, metrics)
    course = Course(phases) if phases else None
    lines = [] if course is None else course.lines()
    # Panels and rows become thinner where there are many.
    heights = [1.9 if len(panels) < 4 else max(0.8, min(1.4, 20 / len(panels)))] * len(panels)
    if lines:
        heights.append(max(0.5, min(0.24 * len(lines), 6.0)))
    drawing = Drawing("history.plot", path, (WIDTH, sum(heights) + 1.3))
    drawing.figure.set_layout_engine("constrained", h_pad=0.04, hspace=0.03)
    grid = drawing.figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, curves) in zip(grid, panels.items()):
        _draw_panel(drawing, panel, shortened_path(name, int(12 * heights[0])), curves, axis.ends)
    for panel in grid[:-1]:
        panel.tick_params(labelbottom=False)
    _draw_axis(drawing, grid, axis, len(panels))
    if course is not None:
        bands = axis.bands(phases, epochs, steps)
        if len(bands) <= SHADED:
            for panel in grid:
                _shade(drawing, panel, bands)
        if lines:
            _draw_timeline(drawing, grid[-1], course, lines, bands)
        _label_bands(drawing, grid[0], course, bands)
    return drawing.finish()


def _axis(epochs: Sequence[int], steps: Sequence[int], phases: Sequence[Phase], by: str) -> Axis:
    if by not in ("epoch", "step"):
        raise ValueError(f"`by` must be 'epoch' or 'step'. Received: {by!r}.")
    if not epochs:
        raise ValueError(
            "There is nothing to draw: the history has no epoch that was finished. Train one by `fit`; steps of "
            "`train_on_batch` have no logs in a history."
        )
    if by == "epoch":
        return Axis(by, epochs[0] - 1, epochs)
    if len(steps) != len(epochs):
        raise ValueError(
            f"`by='step'` needs the step at which each epoch ended. The history has {len(epochs)} epochs and "
            f"{len(steps)} steps: it was saved before steps were recorded. Draw it by='epoch'."
        )
    return Axis(by, min(phases[0].step if phases else 0, steps[0] - 1), steps)


def _panels(logs: Mapping[str, Sequence[Any]], metrics: str | Sequence[str] | None) -> dict[str, dict[bool, Any]]:
    """Return the values to draw in each panel: those of training under False, of the validation under True."""
    panels: dict[str, dict[bool, Any]] = {}
    for name, values in logs.items():
        # A log of training may begin with `val_` itself: it has a panel of its own unless it stands beside another.
        is_validation = name.startswith("val_") and (name.removeprefix("val_") in logs or f"val_{name}" not in logs)
        panels.setdefault(name.removeprefix("val_") if is_validation else name, {})[is_validation] = values
    if metrics is None:
        return panels
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    unknown = [name for name in wanted if name not in panels]
    if unknown or not wanted:
        raise ValueError(
            f"`metrics` must name logs of the history, without `val_`, which is drawn beside them. "
            f"They are {list(panels)}. Received: {metrics!r}."
        )
    return {name: panels[name] for name in dict.fromkeys(wanted)}


def _draw_panel(drawing: Drawing, panel: Any, name: str, curves: Mapping[bool, Any], ends: Sequence[float]) -> None:
    """Draw a log, training solid and validation dashed."""
    colours, is_empty, has_several = drawing.colours(2), True, False
    for is_validation, values in sorted(curves.items()):
        middle, low, high = _as_curve(values)
        colour = colours[DASHED if is_validation else SOLID]
        finite = np.isfinite(middle)
        is_empty &= not finite.any()
        # Between epochs without a value, one with a value would be no line at all.
        beside = np.pad(finite, 1)
        alone = finite & ~beside[:-2] & ~beside[2:]
        marked = finite if len(middle) <= MARKED else alone
        panel.plot(
            ends,
            middle,
            "--" if is_validation else "-",
            color=colour,
            marker="o",
            markersize=4,
            markevery=list(np.flatnonzero(marked)),
            label="validation" if is_validation else "training",
        )
        if low is not None:
            has_several = True
            panel.fill_between(ends, low, high, color=colour, alpha=0.2, linewidth=0)
    panel.set_ylabel(plain(name) + "\n(mean and range)" * has_several, fontsize=NORMAL)
    panel.grid(True, alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if is_empty:
        panel.set_yticks([])
        panel.text(0.5, 0.5, "no finite value", transform=panel.transAxes, ha="center", va="center", fontsize=NORMAL)
    else:
        panel.locator_params(axis="y", nbins=5)


def _as_curve(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return a log by epoch, NaN where it is not finite: its values, or of one with several mean, least and largest."""
    several = [np.asarray(value, float).ravel() for value in values]
    if all(value.size == 1 for value in several):
        flat = np.concatenate(several)
        return np.where(np.isfinite(flat), flat, np.nan), None, None
    # Epochs without the log have one NaN in place of an array.
    kept = [value[np.isfinite(value)] for value in several]
    rows = [(value.mean(), value.min(), value.max()) if value.size else (np.nan,) * 3 for value in kept]
    middle, low, high = np.array(rows).T
    return middle, low, high


def _draw_axis(drawing: Drawing, grid: Any, axis: Axis, panels: int) -> None:
    width = axis.ends[-1] - axis.start
    grid[-1].set_xlim(axis.start - 0.012 * width, axis.ends[-1] + 0.012 * width)
    grid[-1].xaxis.set_major_locator(drawing.part("ticker").MaxNLocator(integer=True))
    grid[-1].set_xlabel(axis.unit, fontsize=NORMAL)
    for panel in grid:
        panel.tick_params(labelsize=SMALL)
    handles = {line.get_label(): line for panel in grid[:panels] for line in panel.get_lines()}
    if len(handles) > 1:
        legend = grid[0].legend(handles.values(), handles, fontsize=SMALL, loc="best", framealpha=0.7)
        legend.get_frame().set_linewidth(0)


def _shade(drawing: Drawing, panel: Any, bands: Sequence[tuple[float, float]]) -> None:
    for number, (start, end) in enumerate(bands):
        if end > start:
            shade = drawing.mixed(drawing.ink, 0.04 if number % 2 == 0 else 0.11)
            panel.axvspan(start, end, color=shade, linewidth=0, zorder=0)


def _draw_timeline(
    drawing: Drawing, panel: Any, course: Course, lines: Sequence[Line], bands: Sequence[tuple[float, float]]
) -> None:
    """Draw a row for each submodel, with bars where it trained, in the colours of the groups."""
    colours = dict(zip(course.groups, drawing.colours(len(course.groups))))
    for place, line in enumerate(lines):
        for group, start, height in _lanes(line, place):
            for is_part in (False, True):
                spans = _spans(course, line, group, bands, is_part=is_part)
                colour = colours[group]
                if spans:
                    face = drawing.mixed(colour, 0.45) if is_part else colour
                    panel.broken_barh(spans, (start, height), facecolor=face, edgecolor=colour, linewidth=0.4)
    every = max(1, round(len(lines) * 0.15 / panel.get_position().height / drawing.figure.get_figheight()))
    shown = range(0, len(lines), every)
    labels = [plain(shortened_path(lines[place].label)) for place in shown]
    panel.set_yticks(list(shown), labels, fontsize=SMALL)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    _draw_key(drawing, panel, course, lines, colours)


def _lanes(line: Line, place: int) -> list[tuple[str, float, float]]:
    """Return, for each group of a row, where its bars begin and how high they are."""
    # Groups that follow one another take the whole height in turn.
    together = any(len(groups) > 1 for groups in line.trained)
    height = 0.76 / (len(line.groups) if together else 1)
    return [(group, place - 0.38 + number * height * together, height) for number, group in enumerate(line.groups)]


def _spans(
    course: Course, line: Line, group: str, bands: Sequence[tuple[float, float]], *, is_part: bool
) -> list[tuple[float, float]]:
    """Return the beginnings and widths of the stretches in which a row trained in a group, wholly or in part."""
    spans: list[tuple[float, float]] = []
    for number, (start, end) in zip(course.numbers, bands):
        if end > start and group in line.trained[number] and (line.share[number] < 1) == is_part:
            if spans and spans[-1][0] + spans[-1][1] == start:  # goes on
                start = spans.pop()[0]
            spans.append((start, end - start))
    return spans


def _draw_key(
    drawing: Drawing, panel: Any, course: Course, lines: Sequence[Line], colours: Mapping[str, Colour]
) -> None:
    """Say below the timeline what its colours mean."""
    patches = drawing.part("patches")
    shown, rest = legend_groups(list(colours))
    handles = [(patches.Patch(color=colours[group]), f"group {group}") for group in shown if len(colours) > 1]
    if rest:
        last = rest[-1]
        handles.append((patches.Patch(color=colours[last]), f"... {last}, {len(colours)} groups in all"))
    if any(0 < share < 1 for line in lines for share in line.share):
        face, edge = drawing.mixed(drawing.ink, 0.2), drawing.mixed(drawing.ink, 0.6)
        handles.append((patches.Patch(facecolor=face, edgecolor=edge), "pale: a part of it trains"))
    if handles:
        drawing.figure.legend(
            [handle for handle, _ in handles],
            [plain(shortened_path(text)) for _, text in handles],
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=SMALL,
        )


def _label_bands(drawing: Drawing, panel: Any, course: Course, bands: Sequence[tuple[float, float]]) -> None:
    """Write above each phase what trained in it; if there is no room for most of them, how many there were."""
    panel.set_title(" ", fontsize=SMALL)  # keeps the room
    drawing.figure.draw_without_rendering()  # which places the panels
    left, right = panel.get_xlim()
    inches = panel.get_position().width * drawing.figure.get_figwidth() / (right - left)
    labels = {}
    shown = [(number, start, end) for number, (start, end) in zip(course.numbers, bands) if end > start]
    for number, start, end in shown:
        room = (end - start) * inches - 0.12
        names = [shortened_path(name, 30) for name in course.names(number)] if room > 0.2 else []
        more = [f"{names[0]} +{len(names) - 1}"] if len(names) > 1 else []
        text = drawing.fitting([", ".join(names), *more], SMALL, room)
        if text:
            labels[(start + end) / 2] = text
    if len(shown) > FEW and 2 * len(labels) < len(shown):
        labels = {(bands[0][0] + bands[-1][1]) / 2: f"{len(shown)} phases"}
    for place, text in labels.items():
        at = panel.get_xaxis_transform()
        panel.text(place, 1.02, plain(text), transform=at, ha="center", va="bottom", fontsize=SMALL)
