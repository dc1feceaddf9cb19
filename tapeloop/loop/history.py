"""What training records: logs, phases, how far it has come."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tapeloop._table import html_table, shortened
from tapeloop.model.selection import Selection
from tapeloop.plots.drawing import Figure
from tapeloop.plots.history import plot_history
from tapeloop.policies.base import VariablePolicy
from tapeloop.policies.recorded import Recorded, described

MOST_ROWS = 15  # of epochs and of phases that a notebook shows


@dataclass(frozen=True)
class Phase:
    """A stretch of training during which one selection held.

    Attributes:
        step: The step at which it began, counted over all fits.
        epoch: The epoch in which it began, likewise.
        policy: The policy that held.
        resolved: Returns what trained.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.GradualUnfreeze(["head", "base"], every=1), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=2, verbose=0)
        >>> [(phase.epoch, len(phase.selection.trained)) for phase in history.phases]
        [(0, 2), (1, 4)]
    """

    step: int
    epoch: int
    policy: VariablePolicy
    # Of a run that was saved it is resolved when somebody looks: there may be thousands.
    resolved: Callable[[], Selection] = field(repr=False, compare=False)

    @property
    def selection(self) -> Selection:
        """What trained."""
        return self.resolved()

    @functools.cached_property
    def recorded(self) -> Recorded:
        """What trained, as a checkpoint records it."""
        if isinstance(self.policy, Recorded):
            return self.policy
        return Recorded.of(described(self.policy), self.selection, None)


@dataclass
class History:
    """What a fit recorded.

    Attributes:
        history: For each log, its value at the end of each epoch: a float, or an array for a metric that has several;
            NaN for an epoch without it.
        epoch: The number of each epoch, counted over all fits of the trainer.
        phases: What trained from which step on.
        step: The number of steps trained by the end of each epoch, likewise.

    Example:
        >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
        >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=2, verbose=0)
        >>> history.epoch, list(history.history), len(history.history["loss"])
        ([1, 2], ['loss'], 2)
    """

    history: dict[str, list[Any]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    step: list[int] = field(default_factory=list)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        metrics: str | Sequence[str] | None = None,
        by: Literal["epoch", "step"] = "epoch",
    ) -> Figure:
        """Draw the logs, with the phases behind them, and below them what trained when.

        Each log has a panel, the training solid and the validation dashed; of a log with several values, the mean and
        the range are drawn. What trained in a phase stands above it. In the timeline below, submodels that train alike
        and differ in a number, such as `blocks/0..11`, share a row; colours are groups.

        Args:
            path: Where the picture is written: a file that ends in .png or .svg.
            metrics: The logs to draw, by name and without `val_`; by default all.
            by: What the axis counts: `"epoch"` or `"step"`.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: No epoch was finished, `path` has another suffix or no folder, a log is not known, or `by` is
                no unit.

        Example:
            >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=2, verbose=0)
            >>> figure = history.plot()
            >>> [axes.get_ylabel() for axes in figure.axes]
            ['loss', '']
        """
        return plot_history(self.history, self.epoch, self.step, self.phases, path, metrics, by)

    def _repr_html_(self) -> str:
        rows = shortened(list(enumerate(self.epoch)), MOST_ROWS)
        logs = [
            ["..."] * (1 + len(self.history))
            if row is None
            else [f"{row[1]}", *(_said(values[row[0]]) for values in self.history.values())]
            for row in rows
        ]
        header = ["epoch", *self.history]
        phases = [
            ("...",) * 4
            if phase is None
            else (f"{phase.step:,}", f"{phase.epoch}", repr(phase.policy), phase.selection.describe())
            for phase in shortened(self.phases, MOST_ROWS)
        ]
        return html_table(header, logs, header, "Logs") + html_table(
            ("from step", "in epoch", "policy", "what trains"), phases, ("from step", "in epoch"), "Phases"
        )

    def since(self, epoch: int) -> History:
        """Return what was recorded from an epoch on.

        Args:
            epoch: The first epoch, which counts from 0.

        Example:
            >>> trainer = tl.Trainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), epochs=3, verbose=0)
            >>> history.since(1).epoch
            [2, 3]
        """
        first = next((n for n, number in enumerate(self.epoch) if number > epoch), len(self.epoch))
        logs = {name: values[first:] for name, values in self.history.items() if values[first:]}
        phases = [phase for phase in self.phases if phase.epoch >= epoch]
        before = [phase for phase in self.phases if phase.epoch < epoch]
        # A phase that began earlier may hold in these epochs too, of which it is then the first.
        if before and first < len(self.epoch):
            began = self.step[first - 1] if first else before[-1].step
            if not phases or phases[0].step != began:
                phases.insert(0, dataclasses.replace(before[-1], step=began, epoch=epoch))
        return History(logs, self.epoch[first:], phases, self.step[first:])

    def add_phase(self, phase: Phase) -> None:
        """Take in what trains from now on, unless it trains already."""
        # A phase that goes on into the next fit is no new phase of the whole run.
        if not self.phases or self.phases[-1].selection != phase.selection:
            self.phases.append(phase)

    def add_epoch(self, number: int, step: int, logs: Mapping[str, Any]) -> None:
        """Take in the logs of an epoch; where an epoch logged nothing under a name, its value there is NaN.

        Args:
            number: The number of the epoch.
            step: The number of steps trained by its end.
            logs: What it logged.
        """
        # Names may appear later, such as with the validation of another phase: what came before is NaN, so that all
        # have one length.
        for name in [name for name in logs if name not in self.history]:
            self.history[name] = [math.nan] * len(self.epoch)
        self.epoch.append(number)
        self.step.append(step)
        for name, values in self.history.items():
            values.append(logs.get(name, math.nan))


def _said(value: Any) -> str:
    """Return a value of a log as a table shows it."""
    value = np.asarray(value)
    if value.ndim == 0:
        return f"{float(value):.4g}"
    return np.array2string(value, precision=3, threshold=8, edgeitems=2).replace("\n", "")


class LazyLogs(Mapping[str, Any]):
    """Logs that are fetched when somebody looks."""

    def __init__(self, fetch: Callable[[], Mapping[str, Any]]) -> None:
        self._fetch = functools.cache(fetch)

    def __getitem__(self, name: str) -> Any:
        return self._fetch()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetch())

    def __len__(self) -> int:
        return len(self._fetch())
