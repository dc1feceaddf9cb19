"""The course of a training as pictures need it: when phases began and ended, and what trained in them."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tapeloop.model.rows import Info, Row, folded, unfolded
from tapeloop.model.selection import Selection
from tapeloop.model.summary import size_of
from tapeloop.model.tree import SubmodelInfo, VariableInfo

MOST_ROWS = 24  # beyond that, neighbours that train alike are in one row, and fewer levels are shown


class Phase(Protocol):
    """What is drawn of a phase of the history."""

    @property
    def step(self) -> int:
        """The step at which it began."""

    @property
    def epoch(self) -> int:
        """The epoch in which it began."""

    @property
    def selection(self) -> Selection:
        """What trained."""


@dataclass(frozen=True)
class Axis:
    """How far training has come, in epochs or in steps.

    Attributes:
        unit: `"epoch"` or `"step"`.
        start: Where it begins.
        ends: Where each epoch ends.
    """

    unit: str
    start: float
    ends: Sequence[float]

    def bands(self, phases: Sequence[Phase], epochs: Sequence[int], steps: Sequence[int]) -> list[tuple[float, float]]:
        """Return where each phase begins and ends; one that has trained in no epoch that was finished ends there."""
        begins = [phases[0].step, *steps]  # the step at which each epoch began
        starts = [self._place(phase, epochs, begins) for phase in phases]
        last = self.ends[-1]
        return [(min(a, last), min(b, last)) for a, b in zip(starts, [*starts[1:], last])]

    def _place(self, phase: Phase, epochs: Sequence[int], begins: Sequence[int]) -> float:
        if self.unit == "step":
            return max(self.start, phase.step)
        place, within = bisect.bisect_left(epochs, phase.epoch + 1), 0.0
        if place < len(epochs) and len(begins) > len(epochs):
            # Within an epoch by its steps: a policy may be asked many times in one.
            within = (phase.step - begins[place]) / max(1, begins[place + 1] - begins[place])
        return max(self.start, phase.epoch + min(max(within, 0.0), 1.0))


@dataclass(frozen=True)
class Line:
    """A row of the timeline.

    Attributes:
        label: What it is of.
        groups: The groups in which any of it trained, in the order in which they came.
        trained: For each selection of the course, the groups in which some of it trains.
        share: For each selection, the share of it that trains, from 0 to 1.
    """

    label: str
    groups: tuple[str, ...]
    trained: tuple[frozenset[str], ...]
    share: tuple[float, ...]


class Course:
    """What trained in some phases.

    Attributes:
        selections: The different selections.
        groups: All groups, in the order in which they came.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        numbers: dict[Selection, int] = {}
        self.numbers = [numbers.setdefault(phase.selection, len(numbers)) for phase in phases]
        self.selections = list(numbers)
        self.groups = tuple(dict.fromkeys(group for selection in self.selections for group in selection.groups))
        self._tree = phases[-1].selection.tree
        # A variable that was never trainable is left out: statistics would make a part of everything stand still.
        could = {v for s in self.selections for v in (*s.trained, *s.frozen)}
        self._treatment = {
            variable: tuple(selection.group_of.get(variable) for selection in self.selections)
            for variable in self._tree.variables
            if variable in could
        }

    def lines(self) -> list[Line]:
        """Return the rows of the timeline: submodels as deep as they fit, and repeated ones in one."""
        for depth in (3, 2, 1):
            lines = [self._line(row) for row in self._rows(depth)]
            if len(lines) > MOST_ROWS:
                lines = _merged(lines)
            if len(lines) <= MOST_ROWS:
                break
        return lines

    def names(self, number: int) -> list[str]:
        """Return what a selection trains: the names of the outermost submodels that train wholly, and of parts."""
        if all(treatment[number] is not None for treatment in self._treatment.values()):
            return ["all"]
        wholly = [line.label for line in self._outermost if line.share[number] == 1]
        return wholly + [f"part of {line.label}" for line in self._outermost if 0 < line.share[number] < 1]

    @functools.cached_property
    def _outermost(self) -> list[Line]:
        return _merged([self._line(row) for row in self._rows(1)])

    def _rows(self, depth: int) -> list[Row]:
        root = self._tree.submodels[0]
        rows = folded(unfolded(self._tree, root, lambda inner: len(set(self._look(inner))) > 1, depth), self._look)
        return [row for outer in rows for row in outer.flat() if self._look(row.infos[0])]

    def _look(self, info: Info) -> tuple[tuple[str | None, ...], ...]:
        return tuple(self._treatment[variable] for variable in self._variables(info))

    def _variables(self, info: Info) -> list[VariableInfo]:
        held = self._tree.variables_in[info] if isinstance(info, SubmodelInfo) else (info,)
        return [variable for variable in held if variable in self._treatment]

    def _line(self, row: Row) -> Line:
        variables = list(dict.fromkeys(variable for info in row.infos for variable in self._variables(info)))
        total, trained, share = max(1, size_of(variables)), [], []
        for number in range(len(self.selections)):
            trains = [variable for variable in variables if self._treatment[variable][number] is not None]
            trained.append(frozenset(self._treatment[variable][number] or "" for variable in trains))
            share.append(size_of(trains) / total)
        groups = tuple(group for group in self.groups if any(group in each for each in trained))
        return Line(row.label, groups, tuple(trained), tuple(share))


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Return rows with neighbours that train alike and stand in one submodel as one."""
    runs: list[list[Line]] = []
    for line in lines:
        if runs and _is_alike(runs[-1][-1], line):
            runs[-1].append(line)
        else:
            runs.append([line])
    labels = [line.label for line in lines]
    return [replace(run[0], label=_joint_label([line.label for line in run], labels)) for run in runs]


def _is_alike(one: Line, other: Line) -> bool:
    parents = [line.label.rpartition("/")[0] for line in (one, other)]
    return parents[0] == parents[1] and (one.trained, one.share) == (other.trained, other.share)


def _joint_label(labels: Sequence[str], known: Sequence[str]) -> str:
    """Return a name for several rows: `block_16_*`, if nothing else is called so, or the first and the last."""
    if len(labels) == 1:
        return labels[0]
    pairs = zip(min(labels), max(labels))
    prefix = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if prefix and not prefix.endswith("/") and sum(label.startswith(prefix) for label in known) == len(labels):
        return f"{prefix}*"
    parent = labels[0].rpartition("/")[0]
    return f"{labels[0]} to {labels[-1].removeprefix(f'{parent}/')}"
