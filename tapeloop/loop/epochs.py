"""The loop: epochs of training and evaluation, phase after phase, and the logs gathered."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tapeloop._backend.assertions import refusal
from tapeloop.data.cursor import BatchCursor
from tapeloop.data.loader import DataLoader
from tapeloop.errors import DataError, TapeloopError
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.fit_data import FitData
from tapeloop.loop.history import History, LazyLogs, Phase
from tapeloop.loop.interrupts import deferred_interrupt
from tapeloop.loop.nonfinite import NonFiniteHandler
from tapeloop.loop.phases import ActivePhase, PhaseTracker
from tapeloop.loop.progress import ProgressDisplay
from tapeloop.loop.state import TrainerState
from tapeloop.loop.step_cache import StepCache, on_the_host
from tapeloop.loop.step_counts import StepCounts, counts_before
from tapeloop.policies.base import VariablePolicy


class EpochLoop:
    """Runs a trainer's steps over data.

    Attributes:
        steps: Makes the steps.
        phases: Tells what trains now.
        state: How far the run has come.
        handler: Decides what bad steps mean.
        runs: Whether an epoch is under way.
    """

    def __init__(self, steps: StepCache, phases: PhaseTracker, state: TrainerState, handler: NonFiniteHandler) -> None:
        self.steps = steps
        self.phases = phases
        self.state = state
        self.handler = handler
        self.runs = False
        # The trainer's policy, the epoch and the step when `train_on_batch` last asked it, and the answer.
        self._on_batch: tuple[VariablePolicy, int, int, ActivePhase] | None = None
        self._is_reset: CompiledStep | None = None  # the step whose logs the last step on one batch has reset

    def fit(self, data: FitData, epochs: int, display: ProgressDisplay) -> History:
        """Train for some epochs, validating after each.

        Args:
            data: The data.
            epochs: The number of epochs.
            display: Where progress is shown.
        """
        history, state, validates = History(), self.state, data.validation_spec is not None
        self.steps.start_fit()
        for number in range(1, epochs + 1):
            # The model may have changed since the last epoch, and the policy may go by its logs.
            phase = self.phases.due(starting=True)
            self._record(phase, history)
            loader = data.training(phase, state.epoch)
            if validates and number == 1:  # what is wrong with either shows before anything has moved
                phase.step.trace(loader.cursor())
                evaluation = self.evaluation()
                evaluation.trace(data.validation(evaluation).cursor())
            logs = self._train(phase, loader, display, f"epoch {number}/{epochs}", history)
            if validates:
                evaluation = self.evaluation()
                loader = data.validation(evaluation)
                evaluated = self.evaluate(evaluation, loader, display, "  validation")
                loader.rewind()  # so that each epoch is validated on the same batches
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            state.epoch += 1
            state.logs = logs
            history.add_epoch(state.epoch, logs)
            state.history.add_epoch(state.epoch, logs)
        return history

    def evaluation(self) -> CompiledStep:
        """Return the step that evaluates under what trained last."""
        return self.steps.get("eval", self.phases.held())

    def evaluate(self, step: CompiledStep, loader: DataLoader, display: ProgressDisplay, title: str) -> dict[str, Any]:
        """Run a step over one epoch of batches, and return its logs."""
        read_logs = functools.partial(self.steps.logs, "eval", [step.planner.metrics])
        self._start(step)
        with self._shown(loader, display, title):
            for cursor in loader.epoch():
                while cursor.remaining != 0:
                    display.advance(self._call(step, cursor, loader), read_logs)
            logs, examples = read_logs()
            display.end(logs, examples)
        return logs

    def train_on_batch(self, batch: Any) -> dict[str, Any]:
        """Train one step on one batch in tensors, and return what it logged.

        The policy is asked if it was replaced since the last batch, if an epoch has ended since, and when it says so by
        `every`.
        """
        step = self._phase_on_batch().step
        # A step on one batch resets what it logs itself, in the graph, unless another step has logged since.
        if self._is_reset is not step:
            self.steps.reset(step.kind, step.selection.tree)
        self._is_reset = None
        step.planner.warn_stale()
        with self._running(), deferred_interrupt():
            counts, logs, failure = step.run_on_batch(batch, self._before())
            self._take_in(step, counts)
        if failure is not None:
            raise refusal(failure) or failure
        self._is_reset = step
        return {name: on_the_host(value) for name, value in logs.items()}

    def predict(self, loader: DataLoader) -> Iterator[Any]:
        """Yield the outputs for each batch of one epoch."""
        step = self.steps.get("predict", self.phases.held())
        step.planner.warn_stale()
        for batch in loader:
            yield step.predict(batch, self._before())

    def check_idle(self) -> None:
        """Check that no epoch is under way.

        Raises:
            RuntimeError: An epoch is under way.
        """
        if self.runs:
            raise RuntimeError(
                "`fit` or `evaluate` was called within an epoch of the same trainer, whose metrics it would start "
                "anew. Make another trainer of the same model for it."
            )

    def _train(
        self, phase: ActivePhase, loader: DataLoader, display: ProgressDisplay, title: str, history: History
    ) -> dict[str, Any]:
        """Train for one epoch, asking the policy again when it says so, and return the logs."""
        step, every_steps, state = phase.step, phase.every_steps, self.state
        used = {step.selection: step.planner.metrics}
        began = asked = state.step
        drawn, state.skipped_steps = 0, 0

        def read_logs() -> tuple[dict[str, Any], int]:
            return self.steps.logs("train", used.values())

        self._start(step)
        with self._shown(loader, display, title):
            for cursor in loader.epoch():
                while cursor.remaining != 0:
                    # Not at the end of an epoch: the same moment would be asked about twice.
                    ends = drawn == loader.batches_per_epoch
                    if every_steps and state.step != asked and state.step % every_steps == 0 and not ends:
                        asked = state.step
                        phase = self.phases.due(LazyLogs(lambda: read_logs()[0]))
                        self._record(phase, history)
                        step, every_steps = phase.step, phase.every_steps
                        used[step.selection] = step.planner.metrics
                        step.planner.warn_stale()
                    most = every_steps - state.step % every_steps if every_steps else None
                    ran = self._call(step, cursor, loader, most)
                    drawn += ran
                    display.advance(ran, read_logs)
            logs, examples = read_logs()
            # Every step was skipped: there is nothing to average.
            if state.step == began:
                logs = dict.fromkeys(logs, math.nan)
            logs |= self.handler.logs(state)
            display.end(logs, examples)
        return logs

    def _call(self, step: CompiledStep, cursor: BatchCursor, loader: DataLoader, most: int | None = None) -> int:
        """Call the loop in the graph once, and return the number of batches that it ran on."""
        # A call ends at what comes first: its time, the end of the data, or the policy's next turn.
        most = min(limit for limit in (step.pace.steps, cursor.remaining, most) if limit is not None)
        # Between the call and the bookkeeping of it, Ctrl-C would leave the two apart.
        with deferred_interrupt():
            began = time.perf_counter()
            counts, failure = step.run_steps(cursor, most, self._before(), self.handler.max_consecutive)
            step.pace.adapt(counts.batches, time.perf_counter() - began)
            if step.kind == "train":
                self._take_in(step, counts)
        if failure is not None:
            failure = refusal(failure) or failure
            _locate(failure, f"batch {cursor.number} of `{loader.name}` (the first is 0)", cursor.number)
            raise failure
        return counts.batches

    def _phase_on_batch(self) -> ActivePhase:
        """Return what trains on single batches now."""
        known, state = self._on_batch, self.state
        starting = known is None or known[0] is not self.phases.policy or known[1] != state.epoch
        if known is not None and not starting:
            every_steps = known[3].every_steps
            if not every_steps or state.step - known[2] < every_steps:
                return known[3]
        phase = self.phases.due(starting=starting)
        # Counted from a multiple of the period, as within `fit`, so that both ask at the same steps.
        every = phase.every_steps or 1
        self._on_batch = self.phases.policy, state.epoch, state.step // every * every, phase
        self._record(phase)
        return phase

    def _record(self, phase: ActivePhase, *histories: History) -> None:
        """Take down that a phase begins."""
        began = Phase(self.state.step, self.state.epoch, phase.policy, phase.step.selection)
        for history in (self.state.history, *histories):
            history.add_phase(began)

    def _start(self, step: CompiledStep) -> None:
        """Reset what a step logs, before an epoch."""
        self._is_reset = None
        self.steps.reset(step.kind, step.selection.tree)
        step.planner.warn_stale()

    def _before(self) -> tf.Tensor:
        return counts_before(self.state.consecutive_skipped, self.state.step, self.state.epoch)

    def _take_in(self, step: CompiledStep, counts: StepCounts) -> None:
        """Take in how training steps ended."""
        # Skipped steps have moved nothing, and count for no schedule.
        self.state.step += counts.applied
        self.handler.observe(counts, step.planner.check, self.state)

    @contextlib.contextmanager
    def _shown(self, loader: DataLoader, display: ProgressDisplay, title: str) -> Iterator[None]:
        """Show an epoch, and leave the data if it fails."""
        display.start(title, loader.batches_per_epoch)
        # The bar is closed in any case; the data only if the epoch fails, for otherwise the next one goes on in it.
        try:
            with self._running():
                yield
        except BaseException:
            loader.close()
            raise
        finally:
            display.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.runs = True
        try:
            yield
        finally:
            self.runs = False


def _locate(error: BaseException, place: str, number: int) -> None:
    """Have an error say at which batch it came up."""
    if isinstance(error, DataError):
        if number and place.split(" (")[0] not in error.args[0]:  # the data may have said so itself
            error.args = (f"At {place}: {error}",)
    elif isinstance(error, Exception) and not isinstance(error, TapeloopError) and hasattr(error, "add_note"):
        error.add_note(f"This came up at {place}.")
