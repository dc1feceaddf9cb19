"""Timing rounds, and what they tell: what a step more takes, what a fit costs beside, and how sure that is."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from benchmarks import devices
from benchmarks.cases import Case

DRAWS = 2000  # of a bootstrap


def short_of(steps: int) -> int:
    """Return how many steps a short round has beside a long one."""
    return max(1, steps // 5)


def summary(short: Sequence[float], long: Sequence[float], steps: int, batch: int, first: float) -> dict[str, Any]:
    """Return the figures of pairs of rounds and of the first step, which took so many seconds.

    A step is the time by which a long round, of so many steps, exceeds the short one before it, by the number of steps:
    what a fit costs at its ends, `fixed_ms`, is in neither. What of the first step is no step is `compile_s`.
    """
    few = short_of(steps)
    pairs = np.array([1e3 * (more - less) / (steps - few) for less, more in zip(short, long)])
    step = float(np.median(pairs))
    fixed = float(np.median([1e3 * less - few * step for less in short]))
    return {
        "step_ms": step,
        "step_ms_interval": interval([pairs], np.random.default_rng(0)),
        "fixed_ms": fixed,
        "examples_per_s": 1e3 * batch / step if step > 0 else None,
        "first_step_s": first,
        "compile_s": max(0.0, first - max(step, 0.0) / 1e3),
        "rounds_ms": pairs.tolist(),
    }


def draws(processes: Sequence[Sequence[float]], generator: np.random.Generator, count: int = DRAWS) -> np.ndarray:
    """Return medians over processes of the medians of their rounds, drawn again at both levels.

    Processes are the unit: rounds of one process are more alike than those of two (Kalibera and Jones, 2013).
    """
    drawn = np.empty((count, len(processes)))
    each = [np.asarray(rounds) for rounds in processes]
    medians = [np.median(generator.choice(rounds, (count, len(rounds))), axis=1) for rounds in each]
    which = generator.integers(0, len(each), (count, len(each)))
    for place in range(len(each)):
        for number, values in enumerate(medians):
            taken = which[:, place] == number
            drawn[taken, place] = generator.permutation(values)[taken]
    return np.median(drawn, axis=1)


def interval(processes: Sequence[Sequence[float]], generator: np.random.Generator, share: float = 0.95) -> list[float]:
    """Return the bounds between which a share of the drawn medians lie."""
    low, high = np.quantile(draws(processes, generator), [(1 - share) / 2, (1 + share) / 2])
    return [float(low), float(high)]


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that something takes, and let nobody see the progress that it shows."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


def rounds(case: Case, make: Callable[[], Callable[[int], Any]]) -> Generator[None, None, tuple[Any, dict[str, Any]]]:
    """Time an arm that `make` builds: its first step, then pairs of a short and a long round, the first as warm-up.

    Each `yield` ends a turn: other arms may have theirs before it goes on. Returns the arm, and its figures.
    """
    energy, before = devices.Energy(), devices.state()
    arm = make()
    yield
    first = timed(lambda: arm(1))
    yield
    few, short, long, joules = short_of(case.steps), [], [], []
    for _ in range(case.rounds + 1):
        started = energy.joules()
        short.append(timed(lambda: arm(few)))
        long.append(timed(lambda: arm(case.steps)))
        if started is not None:
            joules.append(((energy.joules() or 0) - started) / (few + case.steps))
        yield
    figures = summary(short[1:], long[1:], case.steps, case.batch, first)
    if joules:
        figures["joules_a_step"] = float(np.median(joules[1:]))
    if before:
        figures["gpu"] = {"before": before, "after": devices.state()}
    return arm, figures
