"""What steps that were not finite mean for a run."""

from __future__ import annotations

from tapeloop._validation import whole_number
from tapeloop.loop.step_counts import ANY, StepCounts
from tapeloop.optimization.finite_check import FiniteCheck

MODES = ("raise", "skip", "ignore")


class NonFiniteHandler:
    """Decides what steps that were not finite mean for the run.

    Attributes:
        patience: How many of them in a row are gone on after.
        skipped_steps: How many there were since the last epoch began.
        last: What the last steps came to.
    """

    def __init__(self, mode: str, max_skipped: int) -> None:
        """Check and keep what was asked.

        Args:
            mode: `"raise"`, `"skip"` or `"ignore"`.
            max_skipped: How many steps in a row may be skipped.

        Raises:
            ValueError: `mode` is none of these, or `max_skipped` no whole number of 1 or more.
        """
        if mode not in MODES:
            raise ValueError(f"`nonfinite` must be one of {', '.join(map(repr, MODES))}. Received: {mode!r}.")
        self.skipped_steps = 0
        self.last = StepCounts()
        self.patience = {"raise": 0, "skip": whole_number("max_skipped", max_skipped, 1), "ignore": ANY}[mode]
        self._mode = mode

    @property
    def looks(self) -> bool:
        """Whether what is not finite is looked for."""
        return self._mode != "ignore"

    def take(self, tally: StepCounts, guard: FiniteCheck | None, step: int, epoch: int) -> None:
        """Take in what steps came to.

        Args:
            tally: What they came to.
            guard: What watched them.
            step: How many steps were trained before the next one.
            epoch: How many epochs were trained before.

        Raises:
            NonFiniteError: The last was not finite, and the run is to stop at that.
        """
        self.last = tally
        self.skipped_steps += tally.bad
        if guard is not None and tally.bad_in_a_row > self.patience:
            self.last = StepCounts()
            also = f"{self.patience} steps in a row were skipped before it, as many as may be. "
            raise guard.error(step, epoch, also if self._mode == "skip" else "")

    def logs(self) -> dict[str, float]:
        """Return what is to be logged of it."""
        return {"skipped_steps": float(self.skipped_steps)} if self._mode == "skip" else {}
