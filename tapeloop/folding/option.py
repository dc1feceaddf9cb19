"""Whether steps are folded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tapeloop.folding.store import FoldedValues

# So many steps in a row pay for folding, which took 0.5 to 1.0 s of a first step, and saved 10 to 20 ms of each.
LEAST_STEPS = 50


@dataclass
class Folding:
    """The option `fold_frozen`, and the folded values of a trainer.

    Attributes:
        mode: Whether steps are folded; `"auto"`: those that run often enough.
        store: The folded values.
        to_come: How many steps of each kind are known to come, without code of the user's in between.
    """

    mode: bool | str
    store: FoldedValues = field(default_factory=FoldedValues)
    to_come: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in (True, False, "auto"):
            raise ValueError(f"`fold_frozen` must be True, False or 'auto'. Received: {self.mode!r}.")

    def expect(self, kind: str, batches: int | None, epochs: int = 1) -> None:
        """Take down how many steps of a kind are to come: epochs of so many batches, without end if that is None."""
        self.to_come[kind] = math.inf if batches is None else batches * epochs

    def folds(self, kind: str) -> bool:
        """Tell whether a step of a kind is worth folding."""
        return bool(self.mode) and (self.mode is True or self.to_come.get(kind, 0) >= LEAST_STEPS)
