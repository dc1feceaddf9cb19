"""Everything that a run needs to continue, beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tapeloop.loop.history import History
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.policies.base import Progress, VariablePolicy
from tapeloop.step.accumulation import Microbatches


@dataclass
class TrainerState:
    """How far a run has come: with the model's variables, all that a fit changes.

    Attributes:
        optimizers: The optimizers, their cohorts and the learning rates that were set.
        averages: The exponential moving averages.
        loss_scale: The scale of float16 losses.
        microbatches: The number of pieces that a batch is cut in, which `"auto"` raises.
        step: The number of steps trained, over all fits.
        epoch: The number of epochs trained, over all fits.
        logs: The logs of the last epoch, which policies may look at.
        skipped_steps: The number of steps skipped in this epoch.
        consecutive_skipped: The number of steps skipped in a row by now.
        shuffle_seed: The seed by which the last fit shuffled arrays.
        policy: The policy that was asked last, and the policy that it answered with, which holds.
        history: The logs of all epochs, and the phases.
    """

    optimizers: Optimizers
    averages: MovingAverages
    loss_scale: LossScale
    microbatches: Microbatches
    step: int = 0
    epoch: int = 0
    logs: Mapping[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    consecutive_skipped: int = 0
    shuffle_seed: int | None = None
    policy: tuple[VariablePolicy, VariablePolicy] | None = None
    history: History = field(default_factory=History)

    def progress(self, logs: Mapping[str, Any] | None = None) -> Progress:
        """Return how far the run has come, as policies are told it; by default with the logs of the last epoch."""
        return Progress(self.step, self.epoch, self.logs if logs is None else logs)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the optimizers, the averages and the loss scale."""
        return [*self.optimizers.variables, *self.averages.variables, *self.loss_scale.variables]
