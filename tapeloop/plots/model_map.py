"""A map of a model: areas are parameters, colours are groups; what is frozen is grey and hatched."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tapeloop.model.rows import Info, Row, folded, unfolded
from tapeloop.model.selection import Selection
from tapeloop.model.summary import size_of
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.plots.drawing import Colour, Drawing, Figure, legend_groups, plain, readable_on, shortened_path
from tapeloop.plots.treemap import Rectangle, areas, strips

WIDTH, HEIGHT = 9.0, 5.4  # of the map in inches, as all sizes
MARGIN, LINE = 0.1, 0.19  # around the map, and of the legend
HEADER = 0.2  # above what is in a submodel
SMALL, NORMAL = 7.0, 9.0  # points
FROZEN, FIXED = "frozen", "non-trainable"
HATCH = "////"
DASHES = (0, (3, 2))


@dataclass(frozen=True)
class Area:
    """A part of the map.

    Attributes:
        label: What stands in it, or above what is in it.
        parts: How many parameters each group has, and what is frozen and non-trainable.
        inference: Whether all of it runs in inference mode.
        count: How many submodels it stands for.
        inner: The parts that it is made of.
    """

    label: str
    parts: Counter[tuple[str, str]]
    inference: bool
    count: int = 1
    inner: tuple[Area, ...] = ()

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return self.parts.total()


def plot_model(selection: Selection, title: str, path: str | os.PathLike[str] | None, depth: float) -> Figure:
    """Draw a model; see `Trainer.plot`.

    Args:
        selection: What trains.
        title: What stands above it.
        path: Where the picture is written, if anywhere.
        depth: How many levels of submodels are drawn at most.
    """
    drawing = Drawing("trainer.plot", path, (WIDTH, HEIGHT))
    _MapDrawing(drawing, selection).draw(title, depth)
    return drawing.finish()


class _Areas:
    """Makes the areas of a model."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._inference = set(selection.inference)
        self._shown: set[VariableInfo] = set()
        self._opened: set[SubmodelInfo] = set()

    def of(self, depth: float) -> tuple[Area, ...]:
        """Return the areas of the model's outermost submodels."""
        tree = self._selection.tree
        rows = unfolded(tree, tree.submodels[0], self._opens, depth)
        return _clustered([area for area in (self._area(row, "") for row in folded(rows, self._look)) if area.size])

    def _opens(self, submodel: SubmodelInfo) -> bool:
        """Tell whether what is in a submodel is drawn: of one that is shared, in its first place."""
        if submodel in self._opened or not self._selection.tree.children[submodel]:
            return False
        self._opened.add(submodel)
        return True

    def _look(self, info: Info) -> Any:
        return tuple(self._parts(self._variables(info)).items()), self._is_inference(info)

    def _is_inference(self, info: Info) -> bool:
        return (info if isinstance(info, SubmodelInfo) else info.submodels[-1]) in self._inference

    def _variables(self, info: Info) -> Sequence[VariableInfo]:
        return self._selection.tree.variables_in[info] if isinstance(info, SubmodelInfo) else (info,)

    def _parts(self, variables: Iterable[VariableInfo]) -> Counter[tuple[str, str]]:
        parts: Counter[tuple[str, str]] = Counter()
        for variable in variables:
            parts[treatment_of(self._selection, variable)] += variable.size
        return +parts  # without those that have no parameters

    def _area(self, row: Row, above: str) -> Area:
        label = row.label.removeprefix(above)
        inner = tuple(area for area in (self._area(each, f"{row.label}/") for each in row.inner) if area.size)
        # What is shared has one place on the map, so that areas add up.
        own = [v for info in row.infos for v in self._variables(info) if v not in self._shown]
        self._shown.update(own)
        parts = sum((area.parts for area in inner), self._parts(own))
        inference = all(map(self._is_inference, row.infos))
        return Area(label, parts, inference, len(row.infos), _clustered(inner))


def treatment_of(selection: Selection, variable: VariableInfo) -> tuple[str, str]:
    """Return how a variable is treated: `("group", its name)`, `("frozen", "")` or `("non-trainable", "")`."""
    if variable in selection.group_of:
        return "group", selection.group_of[variable]
    return (FROZEN, "") if variable.trainable else (FIXED, "")


def _clustered(areas: Sequence[Area], level: int = 1) -> tuple[Area, ...]:
    """Return areas with neighbours that are named as parts of one block in one: `block_1_conv` and `block_1_bn`.

    In a functional model all layers stand side by side, and only their names tell what belongs together.
    """
    runs: list[tuple[str | None, list[Area]]] = []
    for area in areas:
        # Up to the first number: `block_1_`, `block6a_`. In `conv2d_7` no name of a part follows.
        found = re.match(r".*?\d+(\.\.\d+)?[a-z]?[_\-/](?=.*[a-zA-Z])", area.label)
        prefix = found.group() if found else None
        if prefix is not None and runs and runs[-1][0] == prefix:
            runs[-1][1].append(area)
        else:
            runs.append((prefix, [area]))
    if len(runs) == 1:
        return tuple(areas)
    return tuple(_cluster(prefix or "", run, level) if len(run) > 1 else run[0] for prefix, run in runs)


def _cluster(prefix: str, run: Sequence[Area], level: int) -> Area:
    inner: Sequence[Area] = [replace(area, label=area.label.removeprefix(prefix)) for area in run]
    if level < 2:
        inner = _clustered(inner, level + 1)
    parts = sum((area.parts for area in run), Counter())
    return Area(f"{prefix}*", parts, all(area.inference for area in run), 1, tuple(inner))


class _MapDrawing:
    """Draws the map of a model on a figure."""

    def __init__(self, drawing: Drawing, selection: Selection) -> None:
        self.drawing = drawing
        self.selection = selection
        self.patches = drawing.part("patches")
        groups = dict(zip(selection.groups, drawing.colours(len(selection.groups))))
        self.colours: dict[tuple[str, str], Colour] = {("group", group): colour for group, colour in groups.items()}
        self.colours[FROZEN, ""] = drawing.mixed(drawing.ink, 0.22)
        self.colours[FIXED, ""] = drawing.mixed(drawing.ink, 0.1)
        self.is_enlarged = False

    def draw(self, title: str, depth: float) -> None:
        """Draw the map, with a title above and a legend below."""
        drawing, figure = self.drawing, self.drawing.figure
        found = _Areas(self.selection).of(depth)
        lines = len(title.split("\n"))
        # Everything has its place in inches, so that what is written fits whatever is drawn.
        entries = self._entries(found)
        columns = 2
        below = MARGIN + LINE * (-(-len(entries) // columns) + 1.7)
        above = MARGIN + 0.2 * lines
        height = HEIGHT + above + below
        figure.set_figheight(height)
        axes = figure.add_axes(
            (MARGIN / WIDTH, below / height, 1 - 2 * MARGIN / WIDTH, HEIGHT / height),
            xlim=(0, WIDTH - 2 * MARGIN),
            ylim=(HEIGHT, 0),
        )
        axes.set_axis_off()
        self._fill(axes, found, Rectangle(0, 0, WIDTH - 2 * MARGIN, HEIGHT), is_marked=False, is_named=True)
        title = "\n".join(self._cut(line) for line in title.split("\n"))
        figure.text(MARGIN / WIDTH, 1 - MARGIN / height, plain(title), va="top", fontsize=NORMAL)
        figure.legend(
            [handle for handle, _ in entries],
            [plain(text) for _, text in entries],
            loc="lower left",
            bbox_to_anchor=(0, LINE / height),
            ncols=columns,
            frameon=False,
            fontsize=NORMAL - 1,
        )
        note = "areas: parameters"
        if self.is_enlarged:
            note += "; the smallest are drawn larger, to be seen"
        figure.text(
            MARGIN / WIDTH, 0.08 / height, note, va="bottom", fontsize=SMALL, color=drawing.mixed(drawing.ink, 0.7)
        )

    def _cut(self, line: str) -> str:
        """Return a line of the title, cut if it is longer than the picture is wide."""
        cut = [line, *(f"{line[:length]}…" for length in range(min(len(line), 160), 0, -4))]
        return self.drawing.fitting(cut, NORMAL, WIDTH - 2 * MARGIN)

    def _fill(self, axes: Any, inner: Sequence[Area], within: Rectangle, *, is_marked: bool, is_named: bool) -> None:
        """Draw some areas within a rectangle.

        Args:
            axes: Where they are drawn.
            inner: The areas.
            within: The rectangle.
            is_marked: Whether it is marked already that all of them run in inference mode.
            is_named: Whether their names are written, if there is room.
        """
        if not inner:
            return
        shares, is_enlarged = areas([area.size for area in inner])
        self.is_enlarged |= is_enlarged
        for area, rectangle in zip(inner, strips(shares, within)):
            self._draw_area(axes, area, rectangle, is_marked=is_marked, is_named=is_named)

    def _draw_area(self, axes: Any, area: Area, place: Rectangle, *, is_marked: bool, is_named: bool) -> None:
        """Draw an area. Inference mode is marked once, around the outermost that runs in it."""
        marks = area.inference and not is_marked
        gap = min(0.025, 0.08 * min(place.width, place.height))
        inside = place.inside(gap)
        if not area.inner:
            self._draw_parts(axes, area, inside, is_named=is_named)
        else:
            header = self._header(area, inside) if is_named else ""
            room = inside.inside(gap, HEADER if header else 0.0)
            # Names of parts say little without the name of what they are parts of.
            named = {"is_marked": is_marked or marks, "is_named": bool(header)}
            self._fill(axes, area.inner, room, **named)
            if header:
                self._write(axes, header, inside.x + 0.05, inside.y + 0.12, NORMAL - 1, ha="left")
            elif is_named:
                self._write_middle(axes, area, inside, self.drawing.paper, self.drawing.ink)
        # Around what is very small, lines would be all that is seen.
        if min(place.width, place.height) > (0.1 if marks else 0.2) and (marks or area.inner):
            style = {"linewidth": 1.2, "linestyle": DASHES} if marks else {"linewidth": 0.6}
            edge = self.drawing.mixed(self.drawing.ink, 0.9 if marks else 0.45)
            outline = self.patches.Rectangle(inside[:2], *inside[2:], fill=False, edgecolor=edge, **style)
            axes.add_artist(outline)

    def _draw_parts(self, axes: Any, area: Area, place: Rectangle, *, is_named: bool) -> None:
        """Draw what has nothing in it, with a stripe for each treatment."""
        left = place.x
        for kind in sorted(area.parts, key=list(self.colours).index):
            width = place.width * area.parts[kind] / area.size
            axes.add_artist(self._patch(kind, (left, place.y), width, place.height))
            left += width
        if is_named:
            fill = self.colours[max(area.parts, key=lambda kind: area.parts[kind])]
            self._write_middle(axes, area, place, fill, readable_on(fill))

    def _patch(self, kind: tuple[str, str], corner: tuple[float, float], width: float, height: float) -> Any:
        fill = self.colours[kind]
        hatch = HATCH if kind[0] == FROZEN else None
        edge = self.drawing.mixed(self.drawing.ink, 0.38) if hatch else fill
        return self.patches.Rectangle(corner, width, height, facecolor=fill, edgecolor=edge, linewidth=0, hatch=hatch)

    def _header(self, area: Area, place: Rectangle) -> str:
        """Return what stands above the parts of an area, if there is room."""
        if place.height < 2.2 * HEADER:
            return ""
        return self.drawing.fitting(_texts(area, "  "), NORMAL - 1, place.width - 0.1)

    def _write_middle(self, axes: Any, area: Area, place: Rectangle, ground: Colour, ink: Colour) -> None:
        """Write in the middle of an area what it is, if there is room."""
        high = [text for text in [*_texts(area, "\n")[:1], *_texts(area, "  ")] if _height(text) <= place.height]
        text = self.drawing.fitting(high, SMALL, place.width - 0.1)
        # Letters need a plain ground: over hatching, over stripes, and over parts without names.
        is_plain = len(area.parts) == 1 and not area.inner and (FROZEN, "") not in area.parts
        box = None if is_plain else {"facecolor": ground, "edgecolor": "none", "pad": 1.0}
        middle = place.x + place.width / 2, place.y + place.height / 2
        self._write(axes, text, *middle, SMALL, ha="center", color=ink, bbox=box)

    def _write(self, axes: Any, text: str, x: float, y: float, size: float, **options: Any) -> None:
        if text:
            axes.text(x, y, plain(text), va="center", fontsize=size, linespacing=1.25, **options)

    def _entries(self, found: Sequence[Area]) -> list[tuple[Any, str]]:
        """Return the entries of the legend: what is shown, and how many parameters that is."""
        total = max(1, size_of(self.selection.tree.variables))
        parts = sum((area.parts for area in found), Counter())
        groups = [kind for kind in self.colours if kind[0] == "group"]
        listed, rest = legend_groups(groups)
        entries = [(self._patch(kind, (0, 0), 1, 1), f"trains, group {kind[1]}", parts[kind]) for kind in listed]
        if rest:
            last = rest[-1]
            said = f"trains, {len(rest)} more groups, the last {last[1]}"
            entries.append((self._patch(last, (0, 0), 1, 1), said, sum(parts[kind] for kind in rest)))
        for name, said in ((FROZEN, "frozen"), (FIXED, "non-trainable (statistics, seeds, flags)")):
            if parts[name, ""]:
                entries.append((self._patch((name, ""), (0, 0), 1, 1), said, parts[name, ""]))
        resting = size_of({v for s in self.selection.inference for v in self.selection.tree.variables_in[s]})
        if resting:
            outline = self.patches.Patch(fill=False, edgecolor=self.drawing.ink, linewidth=1.2, linestyle=DASHES)
            entries.append((outline, "in inference mode", resting))
        return [
            (handle, f"{shortened_path(said, 44)}: {size:,} ({size / total:.1%})") for handle, said, size in entries
        ]


def _texts(area: Area, between: str) -> list[str]:
    """Return what may be said of an area, the fullest first."""
    # What is shared is counted once, so that submodels which look alike may have different shares of it.
    alike = area.count > 1 and area.size % area.count == 0
    number = f"{area.count} x {area.size // area.count:,}" if alike else f"{area.size:,}"
    last = area.label.rpartition("/")[2]
    names = dict.fromkeys([area.label, last, shortened_path(last, 12), shortened_path(last, 9)])
    return [f"{area.label}{between}{number}", *names]


def _height(text: str) -> float:
    return 0.12 * (text.count("\n") + 1)
