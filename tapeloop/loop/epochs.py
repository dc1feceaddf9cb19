"""The loop: epochs of training and evaluation, phase after phase, and the logs gathered."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from tapeloop._backend.assertions import refusal
from tapeloop.data.cursor import BatchCursor
from tapeloop.data.loader import DataLoader
from tapeloop.errors import DataError, TapeloopError
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.history import History, LazyLogs, Phase
from tapeloop.loop.interrupts import deferred_interrupt
from tapeloop.loop.nonfinite import NonFiniteHandler
from tapeloop.loop.phases import ActivePhase
from tapeloop.loop.progress import ProgressDisplay
from tapeloop.loop.step_cache import CompiledTrainStep, StepCache, on_the_host
from tapeloop.loop.step_counts import StepCounts
from tapeloop.policies.base import VariablePolicy


class EpochLoop:
    """Runs a trainer's steps over data.

    Attributes:
        steps_done: How many steps were trained.
        epochs_done: How many epochs were trained.
        last_logs: The logs of the last epoch.
        runs: Whether an epoch is under way.
        history: What all fits recorded.
    """

    def __init__(self, steps: StepCache, judge: NonFiniteHandler) -> None:
        self.steps_done = 0
        self.epochs_done = 0
        self.last_logs: Mapping[str, Any] = {}
        self.history = History()
        self._on_batch: tuple[VariablePolicy, int, int, ActivePhase] | None = None
        self._clean: CompiledStep | None = None  # what the last step on one batch has left nothing behind in
        self._steps = steps
        self._judge = judge
        self.runs = False

    def fit(
        self,
        phases: Callable[[Mapping[str, Any], bool], ActivePhase],
        evaluation: Callable[[], CompiledStep],
        batches: Callable[[ActivePhase], DataLoader],
        validation: Callable[[CompiledStep], DataLoader] | None,
        epochs: int,
        shown: ProgressDisplay,
    ) -> History:
        """Train for some epochs, evaluating after each.

        Args:
            phases: Gives what trains now, by the last logs; its second argument tells whether an epoch starts, for then
                the model is read anew.
            evaluation: Gives the step that evaluates.
            batches: Gives what to train on, by what trains.
            validation: Gives what to evaluate on, by the step that evaluates.
            epochs: How many epochs.
            shown: Where progress is shown.
        """
        history = History()

        def choose(logs: Mapping[str, Any], starting: bool = False) -> ActivePhase:
            due = phases(logs, starting)
            phase = Phase(self.steps_done, self.epochs_done, due.policy, due.step.selection)
            history.add_phase(phase)
            self.history.add_phase(phase)
            return due

        for number in range(1, epochs + 1):
            due = choose(self.last_logs, starting=True)
            if validation is not None and number == 1:
                due.step.trace(batches(due).cursor())
                evaluation().trace(validation(evaluation()).cursor())
            logs = self.run(due.step, batches(due), shown, f"epoch {number}/{epochs}", due.every_steps, choose)
            if validation is not None:
                step = evaluation()
                judged = validation(step)
                evaluated = self.run(step, judged, shown, "  validation")
                judged.rewind()  # so that each epoch is judged by the same batches
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            self.epochs_done += 1
            self.last_logs = logs
            history.add_epoch(self.epochs_done, logs)
            self.history.add_epoch(self.epochs_done, logs)
        return history

    def train_on_batch(
        self, batch: Any, policy: VariablePolicy, phases: Callable[[Mapping[str, Any], bool], ActivePhase]
    ) -> dict[str, Any]:
        """Train one step on one batch, and return what it logged.

        Args:
            batch: The batch, in tensors.
            policy: The policy. It is asked when it is another than for the last batch, when an epoch has ended since,
                and where it says so by `every`.
            phases: As for `fit`.
        """
        known = self._on_batch
        starts = known is None or known[0] is not policy or known[1] != self.epochs_done
        every = None if starts or known is None else known[3].every_steps
        if starts or (every is not None and known is not None and (self.steps_done - known[2]) >= every):
            due = phases(self.last_logs, starts)
            begun = self.steps_done if due.every_steps is None else self.steps_done // due.every_steps * due.every_steps
            self._on_batch = policy, self.epochs_done, begun, due
            self.history.add_phase(Phase(self.steps_done, self.epochs_done, due.policy, due.step.selection))
        assert self._on_batch is not None
        step = self._on_batch[3].step
        if self._clean is not step:  # after a step on one batch, what it logs is reset already
            self._steps.reset(step.kind, step.selection.tree)
        self._clean = None
        self._steps.warn_stale(step)
        self.runs = True
        try:
            with deferred_interrupt():
                before, so_far = self._judge.last, (self.steps_done, self.epochs_done)
                take_logs = functools.partial(self._steps.take_logs, step.kind, step.selection)
                tally, logs, failure = step.run_on(batch, before, so_far, take_logs)
                self._take(step, tally)
        finally:
            self.runs = False
        if failure is not None:
            raise refusal(failure) or failure
        self._clean = step
        return {name: on_the_host(value) for name, value in logs.items()}

    def check_idle(self) -> None:
        """Check that no epoch is under way.

        Raises:
            RuntimeError: One is.
        """
        if self.runs:
            raise RuntimeError(
                "`fit` or `evaluate` was called within an epoch of the same trainer, whose metrics it would start "
                "anew. Make another trainer of the same model for it."
            )

    def run(
        self,
        step: CompiledStep,
        batches: DataLoader,
        shown: ProgressDisplay,
        title: str,
        every_steps: int | None = None,
        choose: Callable[[Mapping[str, Any]], ActivePhase] | None = None,
    ) -> dict[str, Any]:
        """Run a step over one epoch of batches and return its logs; every so many steps, `choose` the step anew."""
        kind, selections, self._clean = step.kind, {step.selection: None}, None
        self._steps.reset(kind, step.selection.tree)
        self._steps.warn_stale(step)
        self._judge.skipped_steps = 0
        look = functools.partial(self._steps.logs, kind, selections)
        before = asked = self.steps_done
        drawn = 0
        shown.start(title, batches.batches_per_epoch)
        self.runs = True
        try:
            for feed in batches.epoch():
                while feed.remaining != 0:
                    most = step.pace.steps if feed.remaining is None else min(step.pace.steps, feed.remaining)
                    if every_steps is not None and choose is not None:
                        ends = drawn == batches.batches_per_epoch  # the next epoch asks at its start
                        if self.steps_done != asked and self.steps_done % every_steps == 0 and not ends:
                            asked = self.steps_done
                            due = choose(LazyLogs(lambda: look()[0]))
                            step, every_steps = due.step, due.every_steps
                            selections[step.selection] = None
                            self._steps.warn_stale(step)
                        if every_steps is not None:
                            most = min(most, every_steps - self.steps_done % every_steps)
                    ran = self._call(step, feed, most, batches)
                    drawn += ran
                    shown.advance(ran, look)
            final, examples = look()
            if isinstance(step, CompiledTrainStep):
                if self.steps_done == before:
                    final = dict.fromkeys(final, math.nan)
                final |= self._judge.logs()
            shown.end(final, examples)
        except BaseException:
            batches.close()
            raise
        finally:
            self.runs = False
            shown.close()
        return final

    def _take(self, step: CompiledTrainStep, tally: StepCounts) -> None:
        """Take in what steps came to."""
        self.steps_done += tally.moved
        self._judge.take(tally, step.transaction.guard, self.steps_done, self.epochs_done)

    def _call(self, step: CompiledStep, feed: BatchCursor, most: int, batches: DataLoader) -> int:
        """Call the compiled loop once, and return on how many batches it ran a step."""
        with deferred_interrupt():
            began = time.perf_counter()
            trains = isinstance(step, CompiledTrainStep)
            before, so_far = self._judge.last if trains else StepCounts(), (self.steps_done, self.epochs_done)
            tally, failure = step.run(feed, most, before, self._judge.patience, so_far)
            step.pace.took(tally.batches, time.perf_counter() - began)
            if isinstance(step, CompiledTrainStep):
                self._take(step, tally)
        if failure is not None:
            failure = refusal(failure) or failure
            _locate(failure, f"batch {feed.number} of `{batches.name}` (the first is 0)", feed.number)
            raise failure
        return tally.batches


def _locate(error: BaseException, place: str, number: int) -> None:
    """Have an error say at which batch it came up."""
    if isinstance(error, DataError):
        if number and place.split(" (")[0] not in str(error):
            error.args = (f"At {place}: {error}",)
    elif isinstance(error, Exception) and not isinstance(error, TapeloopError) and hasattr(error, "add_note"):
        error.add_note(f"This came up at {place}.")
