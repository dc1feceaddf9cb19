"""Measuring one arm: what is timed, what is counted, in which order. Nothing here imports TensorFlow."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

MEMORY_STEPS = 2  # steps in a round of the memory pass


class Allocator(Protocol):
    """What tells how much memory is in use."""

    def reset(self) -> None:
        """Let the peak be what is in use now."""

    def read(self) -> tuple[int, int] | None:
        """Return the bytes in use and the most that were since the last reset, or None where nobody counts."""


class Measured:
    """One arm under measurement, in a process of its own."""

    def __init__(self, arm: Callable[[int], float], clock: Callable[[], float], allocator: Allocator) -> None:
        """Keep the parts.

        Args:
            arm: Runs so many steps, always on the same data in the same order, and returns their mean loss.
            clock: Gives seconds.
            allocator: Tells of memory.
        """
        self._arm = arm
        self._clock = clock
        self._allocator = allocator

    def round(self, steps: int) -> dict[str, float]:
        """Run some steps and return how long they took together, in seconds, and their mean loss."""
        began = self._clock()
        loss = self._arm(steps)
        return {"seconds": self._clock() - began, "loss": loss}

    def memory(self, rounds: int = 5) -> dict[str, int | float | None]:
        """Return the bytes that persist between rounds, the peak, and by how much a step makes them grow.

        The first two rounds are warm-up: they trace, and allocate what stays. Garbage is collected before anything is
        read.
        """
        for steps in (1, MEMORY_STEPS):
            self._arm(steps)
        gc.collect()
        before = self._allocator.read()
        if before is None:
            return {"persistent": None, "peak": None, "growth": None}
        self._allocator.reset()
        for _ in range(rounds):
            self._arm(MEMORY_STEPS)
        _, peak = self._allocator.read() or (0, 0)
        gc.collect()
        persistent, _ = self._allocator.read() or (0, 0)
        growth = (persistent - before[0]) / (rounds * MEMORY_STEPS)
        return {"persistent": persistent, "peak": peak, "growth": growth}


def summary(seconds: Sequence[float], steps: int, batch: int, first: float) -> dict[str, Any]:
    """Return the figures of an arm's times.

    Args:
        seconds: How long each round took.
        steps: How many steps each had.
        batch: Examples in a step.
        first: Seconds of the first step, from a model and a trainer that are made to its end.

    Returns:
        `step_ms`, the median of a step, with its quartiles and the number of steps; `examples_per_s`; `first_step_s`,
        and what of it was not the step itself as `trace_compile_s`; `rounds_ms`, a step of each round.
    """
    each = [1e3 * second / steps for second in seconds]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {
        "step_ms": middle,
        "step_ms_quartiles": [low, high],
        "steps_timed": steps * len(each),
        "examples_per_s": 1e3 * batch / middle,
        "first_step_s": first,
        "trace_compile_s": max(0.0, first - middle / 1e3),
        "rounds_ms": each,
    }
