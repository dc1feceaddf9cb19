"""The loop: epochs of training and evaluation, phase after phase, and the logs gathered."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tapeloop._backend.assertions import refusal
from tapeloop.data.batch import examples_of
from tapeloop.data.cursor import BatchCursor
from tapeloop.data.loader import DataLoader
from tapeloop.distribution.agreement import end_epoch
from tapeloop.errors import DataError, TapeloopError
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.fit_data import FitData, Validation
from tapeloop.loop.history import History, LazyLogs, Phase
from tapeloop.loop.interrupts import CommonEnd, StopRequested, deferred_interrupt
from tapeloop.loop.listener import FitListener
from tapeloop.loop.nonfinite import NonFiniteHandler
from tapeloop.loop.phases import ActivePhase, PhaseTracker
from tapeloop.loop.progress import ProgressDisplay
from tapeloop.loop.state import EpochProgress, Resumption, TrainerState
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
        data: The data of the fit that is under way, or None.
        span: The epochs of that fit.
        is_resuming: Whether it is not yet where a checkpoint has it that was loaded.
        is_starting: Whether an epoch is about to begin, of which the policy has not been asked yet.
        stop_training: Whether the fit shall end: after the steps that run, and the validation of the epoch.
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
        self.data: FitData | None = None
        self.span = range(0)
        self.is_resuming = False
        self.is_starting = False
        self.stop_training = False
        self._listeners: Sequence[FitListener] = ()
        self._validation = Validation()
        self._data_is_new = True
        self._read_logs: Callable[[], tuple[dict[str, Any], int]] = lambda: ({}, 0)
        self._end = CommonEnd(steps.parts.replicas.workers)

    def fit(
        self,
        data: FitData,
        epochs: range,
        display: ProgressDisplay,
        listeners: Sequence[FitListener] = (),
        validation: Validation | None = None,
    ) -> History:
        """Train for some epochs, validating after each.

        Args:
            data: The data.
            epochs: The epochs of the fit, of which those before `state.epoch` are trained already.
            display: Where progress is shown.
            listeners: Who looks on, in this order.
            validation: When epochs are validated; by default each is.
        """
        history, state = self.state.history.since(epochs.start), self.state
        self.steps.start_fit()
        self.steps.parts.interventions.note()
        self.data, self.span, self._listeners, state.under_way = data, epochs, listeners, None
        self._validation = validation or Validation()
        self.is_resuming, self.stop_training, logs = state.resumption is not None, False, dict[str, Any]()
        self.is_starting = state.epoch < epochs.stop
        try:
            for listener in listeners:
                listener.before_fit()
            for number in range(state.epoch, epochs.stop):
                # First of all: what is done here, such as to a `trainable` flag, is for this epoch.
                self.is_starting = True
                for listener in () if self.stop_training else listeners:
                    listener.before_epoch(number - epochs.start)
                if self.stop_training:
                    break
                with self._end.held(), self.steps.parts.replicas.on_first():
                    logs = self._run_epoch(data, display, f"epoch {number + 1 - epochs.start}/{len(epochs)}", history)
                    # A callback that goes by more than the logs may have ended it on one worker alone.
                    variables = (v.tf_variable for v in self.phases.current().tree.variables)
                    replicas = self.steps.parts.replicas
                    self.stop_training = end_epoch(replicas, stops=self.stop_training, variables=variables)
                # An interrupt comes before all of this, or after it.
                with deferred_interrupt():
                    state.epoch, state.logs, state.under_way = number + 1, logs, None
                    history.add_epoch(state.epoch, state.step, logs)
                    state.history.add_epoch(state.epoch, state.step, logs)
                for listener in listeners:
                    listener.after_epoch(logs)
            for listener in listeners:
                listener.after_fit(logs)
            # What the chief has written by now, the next fit of each worker finds.
            self.steps.parts.replicas.any_of_workers(False)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, StopRequested)):
                for listener in listeners:
                    listener.on_stop(error)
            # What is left of the epoch is not trained: the next fit begins it anew.
            state.under_way = None
            data.close()
            raise
        finally:
            self.data, self._listeners, self._data_is_new, self.is_starting = None, (), True, False
        return history

    def _run_epoch(self, data: FitData, display: ProgressDisplay, title: str, history: History) -> dict[str, Any]:
        """Train for one epoch, or for the rest of one, validate, and return the logs of both."""
        state, number = self.state, self.state.epoch - self.span.start
        resumption, state.resumption = state.resumption, None
        if data.runs_python:
            self.steps.parts.interventions.note()
        progress = None if resumption is None else resumption.progress
        with deferred_interrupt():
            # The model may have changed since the last epoch, and the policy may go by its logs.
            phase = self.phases.due(starting=True) if progress is None else self.phases.again()
            self.is_starting, state.under_way = False, progress or EpochProgress(state.step, state.step)
            # Where a run resumes in the first epoch of its fit, the phase began with that, unless another is recorded.
            self._record(phase, history, step=progress.began if progress and not history.phases else state.step)
        loader = data.training(phase, state.epoch)
        self._expect("train", loader, phase.every_steps)
        validates = data.validation_spec is not None
        if validates and self._data_is_new:  # what is wrong with either shows before anything has moved
            if progress is None:
                phase.step.trace(loader.cursor())
            evaluation = self.evaluation()
            to_validate = data.validation(evaluation)
            self._expect("eval", to_validate)
            evaluation.trace(to_validate.cursor())
        self._data_is_new = False
        if state.under_way.logs is None:
            state.under_way.logs = self._train(phase, loader, display, title, history, resumption)
        self.is_resuming = False
        logs = dict(state.under_way.logs)
        if validates and self._validation.is_due(number):
            logs |= self._validate(data, display)
        for listener in self._listeners:
            listener.end_epoch(number, logs)
        return logs

    def _validate(self, data: FitData, display: ProgressDisplay) -> dict[str, Any]:
        """Return what the model, or its averages, log on the validation data."""
        evaluation = self.evaluation()
        loader = data.validation(evaluation)
        averages = self._validation.values == "ema"
        if averages or self.steps.parts.runs_user_code:
            self.steps.parts.interventions.note()
        with self.state.averages.swap(self.state.step) if averages else contextlib.nullcontext():
            logs = self.evaluate(evaluation, loader, display, "  validation", self._listeners)
        if averages:
            self.steps.parts.interventions.note()
        loader.rewind()  # so that each epoch is validated on the same batches
        return {f"val_{name}": value for name, value in logs.items()}

    def log_variables(self) -> dict[str, tf.Variable]:
        """Return the variables of what the epoch that is under way has logged, by name."""
        return self.steps.log_variables("train", self.phases.held())

    def logs_so_far(self) -> Mapping[str, Any]:
        """Return what the epoch that is under way has logged."""
        progress = self.state.under_way
        if progress is not None and progress.logs is not None:
            return progress.logs
        return self._read_logs()[0]

    def evaluation(self) -> CompiledStep:
        """Return the step that evaluates under what trained last."""
        return self.steps.get("eval", self.phases.held())

    def evaluate(
        self,
        step: CompiledStep,
        loader: DataLoader,
        display: ProgressDisplay,
        title: str,
        listeners: Sequence[FitListener] = (),
    ) -> dict[str, Any]:
        """Run a step over one epoch of batches, and return its logs."""
        read_logs = functools.partial(self.steps.logs, "eval", [step.planner.metrics])
        if self.data is None:
            self._expect("eval", loader)
        self._start(step)
        for listener in listeners:
            listener.before_evaluation(loader)
        number = 0
        with self._shown(loader, display, title):
            for cursor in loader.epoch():
                while cursor.remaining != 0:
                    for listener in listeners:
                        listener.before_evaluating(number)
                    ran = self._call(step, cursor, loader, _fewest(listeners))
                    display.advance(ran, read_logs)
                    number += ran
                    for listener in listeners if ran else ():
                        listener.after_evaluating(number - 1, read_logs)
            logs, examples = read_logs()
            display.end(logs, examples)
        for listener in listeners:
            listener.after_evaluation(logs)
        return logs

    def train_on_batch(self, batch: Any) -> dict[str, Any]:
        """Train one step on one batch in tensors, and return what it logged.

        The policy is asked if it was replaced since the last batch, if an epoch has ended since, and when it says so by
        `every`.
        """
        self.steps.parts.interventions.note()
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
            raise refusal(failure) or self.steps.parts.replicas.lost(failure) or failure
        self._is_reset = step
        return {name: on_the_host(value) for name, value in logs.items()}

    def predict(self, loader: DataLoader, display: ProgressDisplay) -> Iterator[Any]:
        """Yield the outputs for each batch of one epoch."""
        step = self.steps.get("predict", self.phases.held())
        self._expect("predict", loader)
        self.steps.parts.interventions.note()
        step.planner.warn_stale()
        examples = 0
        display.start("prediction", loader.batches_per_epoch)
        try:
            for batch in loader:
                step.refresh()
                try:
                    with self.steps.parts.replicas.on_first():
                        outputs = step.predict(batch, self._before())
                except tf.errors.OpError as error:
                    if (refused := refusal(error)) is None:
                        raise
                    raise refused from error
                examples += int(examples_of(batch))
                yield outputs
                display.advance(1, functools.partial(_without_logs, examples))
            display.end({}, examples)
        finally:
            display.close()

    def check_may_fit(self) -> None:
        """Check that no fit is under way, also between two of its epochs.

        Raises:
            RuntimeError: One is.
        """
        self.check_idle()
        if self.data is not None:
            raise RuntimeError(
                "`fit` was called within a fit of the same trainer, such as by a callback. Call it after that has "
                "ended: `trainer.stop_training = True` ends it."
            )

    def check_idle(self) -> None:
        """Check that no epoch is under way, and no scope of a strategy is open.

        Raises:
            RuntimeError: An epoch is under way, or a scope is open.
        """
        self.steps.parts.replicas.check_outside()
        if self.runs:
            raise RuntimeError(
                "`fit` or `evaluate` was called within an epoch of the same trainer, whose metrics it would start "
                "anew. Make another trainer of the same model for it."
            )

    def _train(
        self,
        phase: ActivePhase,
        loader: DataLoader,
        display: ProgressDisplay,
        title: str,
        history: History,
        resumption: Resumption | None,
    ) -> dict[str, Any]:
        """Train for one epoch, asking the policy again when it says so, and return the logs."""
        state, progress, listeners = self.state, self.state.under_way, self._listeners
        assert progress is not None
        used = {phase.step.selection: phase.step.planner.metrics}

        def read_logs() -> tuple[dict[str, Any], int]:
            return self.steps.logs("train", used.values())

        # Where the data was read to its end, nothing is traced any more that could tell what was logged.
        has_more = loader.has_more(progress.drawn)
        if resumption is not None and progress.drawn:
            self._resume(phase.step, loader, resumption, has_more=has_more)
        else:
            state.skipped_steps = 0
            self._start(phase.step)
        self._read_logs = read_logs if has_more or resumption is None else lambda: (dict(resumption.logs), 0)
        self.is_resuming = False
        with self._shown(loader, display, title, progress.drawn):
            for cursor in loader.epoch(progress.drawn) if has_more else ():
                while cursor.remaining != 0 and not self.stop_training:
                    phase = self._phase_within_epoch(phase, loader, history)
                    used[phase.step.selection] = phase.step.planner.metrics
                    most = _fewest(listeners)
                    if phase.every_steps:
                        most = min(most, phase.every_steps - state.step % phase.every_steps)
                    for listener in listeners:
                        listener.before_steps(progress.drawn)
                    ran = self._call(phase.step, cursor, loader, most)
                    display.advance(ran, self._read_logs)
                    for listener in listeners if ran else ():
                        listener.after_steps(progress.drawn - 1, self._read_logs)
                if self.stop_training:
                    loader.close()
                    break
            logs, examples = self._read_logs()
            # Every step was skipped: there is nothing to average.
            if state.step == progress.began:
                logs = dict.fromkeys(logs, math.nan)
            logs |= self.handler.logs(state)
            display.end(logs, examples)
        return logs

    def _phase_within_epoch(self, phase: ActivePhase, loader: DataLoader, history: History) -> ActivePhase:
        """Return what trains next: what the policy answers, where it is due to be asked, and else the same."""
        state, progress, every_steps = self.state, self.state.under_way, phase.every_steps
        assert progress is not None
        # Not at the end of an epoch: the same moment would be asked about twice.
        ends = progress.drawn == loader.batches_per_epoch
        if not every_steps or state.step == progress.asked or state.step % every_steps or ends:
            return phase
        with deferred_interrupt():
            phase = self.phases.due(LazyLogs(lambda: self._read_logs()[0]))
            # After the answer: a policy that saves the run while it is asked is asked again when the run goes on.
            progress.asked = state.step
            self._record(phase, history)
        phase.step.planner.warn_stale()
        return phase

    def _resume(self, step: CompiledStep, loader: DataLoader, resumption: Resumption, *, has_more: bool) -> None:
        """Go on logging where an epoch was left."""
        self._start(step)
        if has_more:
            step.find_logs(loader.cursor())
            # Those of a phase before in this epoch, and of steps that run eagerly.
            for names in resumption.log_scalars:
                self.steps.parts.means["train"].prepare(names)
            resumption.restore_logs(self.log_variables())

    def _call(self, step: CompiledStep, cursor: BatchCursor, loader: DataLoader, most: int | None = None) -> int:
        """Call the loop in the graph once, and return the number of batches that it ran on."""
        # A call ends at what comes first: its time, the end of the data, or the policy's next turn.
        most = min(limit for limit in (step.pace.steps, cursor.remaining, most) if limit is not None)
        # Between the call and the bookkeeping of it, Ctrl-C would leave the two apart.
        with deferred_interrupt():
            step.refresh()
            counts, failure, stops = step.run_steps(cursor, most, self._before(), self._end.is_asked)
            if step.kind == "train":
                assert self.state.under_way is not None
                self.state.under_way.drawn += counts.batches
                self._take_in(step, counts)
        if failure is not None:
            failure = refusal(failure) or self.steps.parts.replicas.lost(failure) or failure
            _locate(failure, f"batch {cursor.number} of `{loader.name}` (the first is 0)", cursor.number)
            raise failure
        if stops:
            self._end.come()
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

    def _record(self, phase: ActivePhase, *histories: History, step: int | None = None) -> None:
        """Take down that a phase begins, by default with the next step."""
        selection = phase.step.selection
        step = self.state.step if step is None else step
        began = Phase(step, self.state.epoch, phase.policy, lambda: selection)
        for history in (self.state.history, *histories):
            history.add_phase(began)

    def _expect(self, kind: str, loader: DataLoader, every_steps: int | None = None) -> None:
        """Take down how many steps of a kind are to come in a row, which tells whether folding them is worth it."""
        batches, epochs = loader.batches_per_epoch, self.span.stop - self.state.epoch if self.data is not None else 1
        # After each look of a callback or a policy, folded values would have to be computed anew.
        limits = [limit for limit in (every_steps, _fewest(self._listeners)) if limit is not None]
        if min(limits) < sys.maxsize:
            batches, epochs = min(limits), 1
        self.steps.folding.expect(kind, batches, epochs)

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
    def _shown(self, loader: DataLoader, display: ProgressDisplay, title: str, drawn: int = 0) -> Iterator[None]:
        """Show an epoch, of which some batches may have been drawn already."""
        display.start(title, loader.batches_per_epoch, drawn)
        try:
            with self._running():
                yield
        finally:
            display.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.runs = True
        try:
            with self.steps.parts.replicas.on_first():
                yield
        finally:
            self.runs = False


def _without_logs(examples: int) -> tuple[Mapping[str, Any], int]:
    return {}, examples


def _fewest(listeners: Sequence[FitListener]) -> int:
    """Return after how many steps the first of them must be told."""
    return min((listener.steps_left() for listener in listeners), default=sys.maxsize)


def _locate(error: BaseException, place: str, number: int) -> None:
    """Have an error say at which batch it came up."""
    if isinstance(error, DataError):
        if number and place.split(" (")[0] not in error.args[0]:  # the data may have said so itself
            error.args = (f"At {place}: {error}",)
    elif isinstance(error, Exception) and not isinstance(error, TapeloopError):
        # What `add_note` does, which Python 3.10 does not have: there, pytest and IPython show notes, if not Python.
        vars(error)["__notes__"] = [*vars(error).get("__notes__", ()), f"This came up at {place}."]
