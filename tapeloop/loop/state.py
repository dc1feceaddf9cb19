"""Everything that a run needs to continue, beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tapeloop.data.loader import DataPosition
from tapeloop.loop.history import History
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.loss_scale import LossScale
from tapeloop.optimization.optimizers import Optimizers
from tapeloop.policies.base import Progress, VariablePolicy
from tapeloop.step.accumulation import Microbatches


@dataclass
class EpochProgress:
    """How far an epoch has come.

    Attributes:
        began: The step at which it began.
        asked: The step at which the policy was last asked.
        drawn: How many batches it has drawn.
        logs: What its training logged, once that is over and only the validation is left.
    """

    began: int
    asked: int
    drawn: int = 0
    logs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Resumption:
    """Where the next fit goes on, after a checkpoint was loaded.

    Attributes:
        epoch: The epoch to which the run had come.
        first_epoch: The epoch at which the fit began that was saved.
        shuffle_seed: The seed by which that fit shuffled arrays.
        is_over: Whether that fit had trained all of its epochs.
        stopped_after: The number of epochs of that fit, if it was stopped before it had trained them all; or None.
        fit_starts: The epochs at which the fits of the run began.
        positions: How far each data set of it was read.
        data: What the checkpoint says of the data.
        progress: How far the epoch had come that was under way, if one was.
        logs: What that epoch had logged by then.
        log_scalars: The names of the scalars of each kind of step that it had run.
        restore_logs: Brings the variables of its logs to where they were.
        restore_iterator: Brings an iterator of `tf.data` to where it was, if that was saved.
    """

    epoch: int
    first_epoch: int
    shuffle_seed: int | None
    is_over: bool
    stopped_after: int | None
    fit_starts: tuple[int, ...]
    positions: Mapping[str, DataPosition]
    data: Mapping[str, Any]
    progress: EpochProgress | None
    logs: Mapping[str, Any]
    log_scalars: tuple[tuple[str, ...], ...]
    restore_logs: Callable[[Mapping[str, tf.Variable]], None]
    restore_iterator: Callable[[Any], None] | None


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
        under_way: How far the epoch has come that is under way, or None between epochs.
        resumption: Where the next fit goes on, after a checkpoint was loaded.
        was_loaded: Whether the user has loaded a checkpoint since the last fit.
        fit_starts: The epochs at which the fits of the run began: one that was stopped early ends before its last.
        ahead: By how many epochs a loaded checkpoint is ahead of what the fits so far have asked for.
        is_of_later_fit: Whether the state is that of a checkpoint which a fit to come has saved.
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
    under_way: EpochProgress | None = None
    resumption: Resumption | None = None
    was_loaded: bool = False
    fit_starts: list[int] = field(default_factory=list)
    ahead: int = 0
    is_of_later_fit: bool = False

    def plan_fit(self, epochs: int, found: Resumption | None) -> tuple[range, Resumption | None]:
        """Return the epochs of a fit that is about to begin, and where its data goes on if it was saved before.

        Args:
            epochs: How many epochs the fit shall have.
            found: What a checkpoint says that the fit has found.
        """
        # A program that is run again makes the same fits. One that was over when the run was saved trains nothing, and
        # the fits after it count from where it would have ended, and not from where the checkpoint is.
        first = self.epoch - self.ahead
        resumption = found or self.resumption
        later = [] if resumption is None else [start for start in resumption.fit_starts if start > first]
        # One that was stopped early ended where the next began; with none after it, it was to have as many epochs.
        stop = min([first + epochs, *later])
        if resumption is not None and resumption.first_epoch == first and resumption.stopped_after == epochs:
            stop = resumption.epoch
        span = range(first, stop)
        if (
            resumption is None
            or resumption.epoch >= span.stop
            or (resumption.is_over and resumption.first_epoch != first)
        ):
            return span, None
        return span, resumption

    def begin_fit(self, span: range, resumption: Resumption | None, shuffle_seed: int | None) -> None:
        """Take in that a fit begins, after the run was brought to where a checkpoint has it, if one was found.

        Args:
            span: The epochs of the fit.
            resumption: Where its data goes on.
            shuffle_seed: The seed by which it shuffles arrays: the state tells in which order it trained.
        """
        self.ahead, self.was_loaded = max(0, self.epoch - span.stop), False
        if span.start not in self.fit_starts:
            self.fit_starts.append(span.start)
        # What the program does between this fit and the one that was saved acts on a state that has it already: that
        # fit loads the checkpoint again.
        later = self.resumption is not None and self.resumption.first_epoch >= span.stop
        self.is_of_later_fit = later and self.epoch >= span.stop
        if self.epoch < span.stop:
            self.resumption, self.shuffle_seed = resumption, shuffle_seed

    def progress(self, logs: Mapping[str, Any] | None = None) -> Progress:
        """Return how far the run has come, as policies are told it; by default with the logs of the last epoch."""
        return Progress(self.step, self.epoch, self.logs if logs is None else logs)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the optimizers, the averages and the loss scale."""
        return [*self.optimizers.variables, *self.averages.variables, *self.loss_scale.variables]
