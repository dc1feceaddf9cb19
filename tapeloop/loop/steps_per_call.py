"""How many steps a call of the compiled loop runs."""

from __future__ import annotations

import math

from tapeloop._validation import whole_number

SECONDS = 0.2  # of a call: long enough that the host costs nothing, short enough to show progress and to be interrupted
GROWTH = 8


class Pace:
    """The number of steps in a call: as asked, or so that a call lasts about `SECONDS`.

    Attributes:
        steps: How many steps the next call runs at most.
        seconds: For how long it begins new ones.
    """

    def __init__(self, steps_per_call: int | str) -> None:
        """Check and keep what was asked.

        Args:
            steps_per_call: A number, or `"auto"`.

        Raises:
            ValueError: It is neither a whole number of 1 or more nor `"auto"`.
        """
        self._adapts = isinstance(steps_per_call, str) and steps_per_call == "auto"
        self.steps = 1 if self._adapts else whole_number("steps_per_call", steps_per_call, 1)
        self.seconds = SECONDS if self._adapts else math.inf

    def adapt(self, steps: int, seconds: float) -> None:
        """Take in how long a call of so many steps took.

        A call that something cut short says too little, unless it was long all the same. The first call of a compiled
        loop also optimizes its graph; the number grows in those after it, by `GROWTH` times at most.
        """
        # A call that was cut short by an event says little of how long steps take.
        if not self._adapts or not steps or (steps < self.steps and seconds < SECONDS):
            return
        self.steps = max(1, min(int(SECONDS * steps / max(seconds, 1e-9)), GROWTH * steps))
