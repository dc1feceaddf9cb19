"""What steps that were not finite mean for a run."""

from __future__ import annotations

from tapeloop._validation import whole_number
from tapeloop.loop.state import TrainerState
from tapeloop.loop.step_counts import UNLIMITED, StepCounts
from tapeloop.optimization.finite_check import FiniteCheck

MODES = ("raise", "skip", "ignore")


class NonFiniteHandler:
    """Decides what steps that were not finite mean for the run.

    Attributes:
        mode: `"raise"`, `"skip"` or `"ignore"`.
        max_consecutive: The number of such steps in a row after which training goes on.
    """

    def __init__(self, mode: str, max_skipped: int) -> None:
        """Check and keep the options of the trainer.

        Raises:
            ValueError: `mode` is none of the three, or `max_skipped` is no whole number of 1 or more.
        """
        if mode not in MODES:
            raise ValueError(f"`nonfinite` must be one of {', '.join(map(repr, MODES))}. Received: {mode!r}.")
        self.mode = mode
        skipped = whole_number("max_skipped", max_skipped, 1)
        self.max_consecutive = {"raise": 0, "skip": skipped, "ignore": UNLIMITED}[mode]

    def observe(self, counts: StepCounts, check: FiniteCheck | None, state: TrainerState) -> None:
        """Take in how the steps of a call ended.

        Args:
            counts: How they ended.
            check: What kept the checksums of the last bad step.
            state: How far the run has come with these steps.

        Raises:
            NonFiniteError: The last step was not finite, and the run is to stop at that.
        """
        state.skipped_steps += counts.skipped
        state.consecutive_skipped = counts.consecutive_skipped
        if check is not None and counts.consecutive_skipped > self.max_consecutive:
            # So that training can go on, if the user catches the error.
            state.consecutive_skipped = 0
            also = f"{self.max_consecutive} steps in a row were skipped before it, as many as may be. "
            raise check.error(state.step, state.epoch, also if self.mode == "skip" else "")

    def logs(self, state: TrainerState) -> dict[str, float]:
        """Return what an epoch logs of skipped steps."""
        return {"skipped_steps": float(state.skipped_steps)} if self.mode == "skip" else {}
