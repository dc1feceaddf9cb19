"""How a step ended, and a step in two parts."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from tapeloop.data.batch import Features


class StepOutcome(NamedTuple):
    """How a step ended that somebody watched.

    Attributes:
        finite: Whether all in it was finite, so that it moved what trains.
        overflowed: Whether it was not because its loss was scaled too far; None where no loss is.
    """

    finite: tf.Tensor
    overflowed: tf.Tensor | None


class Split(Protocol):
    """A step in two: what is computed of a batch once and for all, and the rest, which trains on these features.

    Attributes:
        function: The whole step, as it was traced.
    """

    @property
    def function(self) -> Any:
        """The whole step, as it was traced."""

    def rest_for(self, features: Features) -> Any:
        """Return a function of features like these that runs the rest of the step."""
