"""Finding a learning rate: steps on trial at rates that rise from one to the next, and the loss at each."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tapeloop._validation import is_number, whole_number
from tapeloop.data.arguments import joined
from tapeloop.data.loader import DataSpec
from tapeloop.learning_rate_search.rehearsal import Rehearsal, rehearsed
from tapeloop.optimization.optimizers import LearningRates
from tapeloop.plots.drawing import Drawing, Figure, plain
from tapeloop.trainer import Trainer

# The part of the running mean of the loss that a step keeps. With 0.98, as in fastai and Lightning, the mean of 100
# steps lags so far behind that the suggestion may lie where the loss has long been rising.
SMOOTHING = 0.9
DIVERGED = 4.0  # times the best smoothed loss: there the search ends
FEWEST = 10  # steps of a search


@dataclass(frozen=True, eq=False, repr=False)
class LearningRateSearch:
    """What a search for a learning rate found.

    Attributes:
        rates: The learning rates that were tried, of shape `(n,)`: those of `group` or, where all groups rose
            together, of the group with the highest.
        losses: The loss of the step at each rate, before its update.
        smoothed: The running mean of the loss, corrected for its start.
        suggestion: The rate at which the smoothed loss fell most steeply, or None.
        reason: Why there is no suggestion; empty if there is one.
        group: The group whose rate was searched; None: all of them together.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> trainer = tl.Trainer(model, loss="mse", optimizer="sgd", seed=0)
        >>> x = np.random.default_rng(0).normal(size=(64, 4))
        >>> search = tl.find_learning_rate(trainer, x, x[:, :2], highest=10.0, steps=60)
        >>> bool(search.rates[0] < search.suggestion < search.rates[-1])
        True
        >>> trainer.learning_rates["default"] = search.suggestion
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    reason: str
    group: str | None

    def __repr__(self) -> str:
        of = "" if self.group is None else f" of {self.group!r}"
        said = f"no suggestion, {self.reason}" if self.suggestion is None else f"{self.suggestion:.2e} suggested"
        return f"<LearningRateSearch{of}: {said}; {len(self.rates)} rates>"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the loss over the learning rate, and the suggestion.

        Args:
            path: The file in which the picture is written, which ends in .png or .svg; None: it is not written.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `path` has another suffix, or its folder is not there.

        Example:
            >>> losses = np.array([0.7, 0.5])
            >>> search = tl.LearningRateSearch(np.array([1e-3, 1e-2]), losses, losses, 1e-2, "", None)
            >>> [axes.get_xlabel() for axes in search.plot().axes]
            ['learning rate']
        """
        drawing = Drawing("search.plot", path, (6.4, 4.0))
        drawing.figure.set_layout_engine("constrained")
        axes, (colour, _) = drawing.figure.add_subplot(), drawing.colours(2)
        axes.plot(self.rates, self.losses, color=drawing.mixed(colour, 0.4), linewidth=1, label="loss")
        axes.plot(self.rates, self.smoothed, color=colour, label="smoothed")
        if self.suggestion is not None:
            label = f"suggestion: {self.suggestion:.2e}"
            axes.axvline(self.suggestion, color=drawing.ink, linestyle="--", linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate" if self.group is None else plain(f"learning rate of {self.group}"))
        axes.set_ylabel("loss")
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return drawing.finish()


def find_learning_rate(
    trainer: Trainer,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    group: str | None = None,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
    batch_size: int | None = None,
) -> LearningRateSearch:
    """Try learning rates from a low one to a high one, and suggest the one at which the loss falls most steeply.

    Each step trains at a rate that is higher than the last by the same factor, until the loss diverges. Then all that
    the steps have moved is put back bit for bit, also if an error or Ctrl-C ends them: weights, statistics, seeds,
    optimizer state, metrics. The trainer goes on as if there had been no search.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3 (arXiv:1506.01186); the
    suggestion at the steepest descent, and the end at 4 times the best loss, are those of fastai and Lightning.

    Args:
        trainer: The trainer, with the policy, optimizer and weights that the rate is for.
        x: The inputs, or any data that `fit` accepts. Data that is too short for so many steps begins anew.
        y: The targets, as for `fit`.
        sample_weight: The weights of the examples, likewise.
        group: The group whose rate rises, while others keep theirs; None: all of them, each in its ratio to the others.
            Then the rates and the suggestion are those of the group with the highest rate.
        lowest: The rate of the first step.
        highest: The rate of the last step.
        steps: The number of steps, 10 or more.
        batch_size: Examples per batch, for arrays; by default 32.

    Returns:
        The rates, their losses and the suggestion.

    Raises:
        PolicyError: The policy has no such group, or cannot be resolved for the model.
        DataError: The data is empty or does not fit the model.
        RuntimeError: Called inside `ema_weights()`, or within an epoch of the trainer.
        TypeError: The rate that is to rise follows a schedule, or `trainer` is none.
        ValueError: The rates or `steps` are out of range, all rates are 0, or the training step logs no `loss`.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.Groups({"base": "base", "head": "head"}), loss="mse", seed=0)
        >>> x = np.random.default_rng(0).normal(size=(64, 4))
        >>> search = tl.find_learning_rate(trainer, x, x[:, :2], group="head", steps=40)
        >>> len(search.rates), trainer.step
        (40, 0)
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"`trainer` must be a `tl.Trainer`. Received: {trainer!r} of type {type(trainer).__name__}.")
    loop, tried = trainer._contents.loop, _rates(lowest, highest, steps)
    loop.check_idle()
    loop.state.averages.check_own_values(
        "`find_learning_rate` was called inside `ema_weights()`, and searches with the trainer's own weights."
    )
    # By a seed of its own, for one that was drawn would move NumPy's.
    spec = DataSpec("x", joined(x, y, sample_weight), batch_size, ("steps", steps), shuffle=True, seed=0)
    loader = spec.loader(spec.sampler(0))
    loader.require_epochs(1)
    loop.state.microbatches.require_examples(loader.smallest_batch)
    loop.steps.build(trainer.model, loader.specs)
    batches = iter(loader)
    try:
        first = next(batches)
        with rehearsed(loop, first) as rehearsal:
            ratios = _ratios(LearningRates(loop.state.optimizers, rehearsal.selection), group)
            losses, end = _losses(rehearsal, itertools.chain([first], batches), tried, ratios)
    finally:
        loader.close()
    return _result(tried, losses, end, group)


def _rates(lowest: float, highest: float, steps: int) -> np.ndarray:
    """Return the rates to try, each higher than the last by the same factor.

    Raises:
        ValueError: They are out of range.
    """
    steps = whole_number("steps", steps, FEWEST)
    for name, rate in (("lowest", lowest), ("highest", highest)):
        if not is_number(rate) or not 0 < rate < math.inf:
            raise ValueError(f"`{name}` must be a learning rate above 0. Received: {rate!r}.")
    if not lowest < highest:
        raise ValueError(f"`highest` must be above `lowest`. Received: {highest!r}, and `lowest` is {lowest!r}.")
    return np.geomspace(lowest, highest, steps)


def _ratios(rates: LearningRates, group: str | None) -> dict[str, float]:
    """Return the groups whose rates rise, each with its ratio to the rate that is tried.

    Raises:
        PolicyError: There is no such group.
        ValueError: All rates are 0.
    """
    now = dict(rates) if group is None else {group: rates[group]}
    if len(now) == 1:
        return dict.fromkeys(now, 1.0)
    fastest = max(now.values())
    if fastest == 0:
        raise ValueError(f"All learning rates are 0, and have no ratio: {now!r}. Set them, or name a `group`.")
    return {name: rate / fastest for name, rate in now.items()}


def _losses(
    rehearsal: Rehearsal, batches: Iterable[Any], tried: np.ndarray, ratios: dict[str, float]
) -> tuple[list[float], str]:
    """Return the losses of steps at these rates, until they diverge, and how they ended."""
    losses: list[float] = []
    for rate, batch in zip(tried, batches):
        logs = rehearsal.run(batch, {group: float(rate * ratio) for group, ratio in ratios.items()})
        if logs is not None and not isinstance(logs.get("loss"), float):
            raise ValueError(
                f"The training step logs {sorted(logs)}, and a search looks at 'loss'. Return the loss that is to fall "
                "under this name."
            )
        # Where the step is not finite it has moved nothing, and logs no loss; unless nobody looks.
        if logs is None or not math.isfinite(logs["loss"]):
            return losses, "was not finite"
        losses.append(logs["loss"])
        if _has_diverged(_smoothed(losses)):
            return losses, "diverged"
    return losses, ""


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Return the running means of losses, corrected for their start at 0."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**number))
    return np.asarray(means)


def _has_diverged(smoothed: np.ndarray) -> bool:
    """Tell whether the last of the smoothed losses is too far above the best."""
    best = smoothed.min()
    # Where losses may be below 0, a multiple of the best would be lower still: then by how far they have fallen.
    scale = best if best > 0 else max(-best, smoothed[0] - best)
    return bool(smoothed[-1] > best + (DIVERGED - 1) * scale)


def _result(tried: np.ndarray, losses: list[float], end: str, group: str | None) -> LearningRateSearch:
    """Return what a search found, with the rate at which the smoothed loss falls most steeply."""
    rates, smoothed = tried[: len(losses)], _smoothed(losses)
    # The first losses are hardly smoothed, and the last may be on its way up.
    inner = slice(len(tried) // 10, -1)
    suggestion, reason = None, ""
    if len(rates[inner]) < 3:
        at = tried[min(len(losses), len(tried) - 1)]
        # The first loss is computed before anything moves.
        remedy = "begin at a lower rate" if losses else "no rate is to blame, look at the data and the weights"
        reason = f"the loss {end} at a rate of {at:.2e}, after {len(losses)} steps: {remedy}"
    else:
        slopes = np.gradient(smoothed[inner], np.log(rates[inner]))
        steepest = int(slopes.argmin())
        suggestion = float(rates[inner][steepest]) if slopes[steepest] < 0 else None
        reason = "" if suggestion is not None else "the loss falls at none of the rates"
    return LearningRateSearch(rates, np.asarray(losses), smoothed, suggestion, reason, group)
