"""The loop: epochs of training and evaluation, phase after phase, and the logs gathered."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tapeloop.batch import examples_of
from tapeloop.data import Batches
from tapeloop.guard import Judge
from tapeloop.history import History, LazyLogs, Phase
from tapeloop.objective import Means, Objective
from tapeloop.policy import VariablePolicy
from tapeloop.progress import Display
from tapeloop.step import Step
from tapeloop.steps import Steps, TrainStep


@dataclass(frozen=True)
class Due:
    """What trains next.

    Attributes:
        step: The compiled step.
        policy: The policy that it is for.
        every_steps: At which multiples of steps it is to be asked anew within an epoch, or None.
    """

    step: TrainStep
    policy: VariablePolicy
    every_steps: int | None


class Loop:
    """Runs a trainer's steps over data.

    Attributes:
        steps_done: How many steps were trained.
        epochs_done: How many epochs were trained.
        last_logs: The logs of the last epoch.
    """

    def __init__(self, steps: Steps, objective: Objective, judge: Judge) -> None:
        self.steps_done = 0
        self.epochs_done = 0
        self.last_logs: Mapping[str, Any] = {}
        self._steps = steps
        self._objective = objective
        self._judge = judge

    def fit(
        self,
        phases: Callable[[Mapping[str, Any], bool], Due],
        evaluation: Callable[[], Step],
        batches: Batches,
        validation: Batches | None,
        epochs: int,
        shown: Display,
    ) -> History:
        """Train for some epochs on `batches`, evaluating after each on `validation`.

        Args:
            phases: Gives what trains now, by the last logs; its second argument tells whether an epoch starts, for then
                the model is read anew.
            evaluation: Gives the step that evaluates.
            batches: What to train on.
            validation: What to evaluate on.
            epochs: How many epochs.
            shown: Where progress is shown.
        """
        history = History()

        def choose(logs: Mapping[str, Any], starting: bool = False) -> Due:
            due = phases(logs, starting)
            if not history.phases or history.phases[-1].selection != due.step.selection:
                history.phases.append(Phase(self.steps_done, self.epochs_done, due.policy, due.step.selection))
            return due

        for number in range(1, epochs + 1):
            due = choose(self.last_logs, starting=True)
            if validation is not None and number == 1:
                due.step.trace(batches.peek())
                evaluation().trace(validation.peek())
            logs = self.run(due.step, batches, shown, f"epoch {number}/{epochs}", due.every_steps, choose)
            if validation is not None:
                evaluated = self.run(evaluation(), validation, shown, "  validation")
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            self.epochs_done += 1
            self.last_logs = logs
            history.epoch.append(self.epochs_done)
            for name, value in logs.items():
                history.history.setdefault(name, []).append(value)
        return history

    def run(
        self,
        step: Step,
        batches: Batches,
        shown: Display,
        title: str,
        every_steps: int | None = None,
        choose: Callable[[Mapping[str, Any]], Due] | None = None,
    ) -> dict[str, Any]:
        """Run a step over one epoch of batches and return its logs; every so many steps, `choose` the step anew."""
        means = self._steps.means[step.kind]
        means.reset()
        self._objective.reset()
        self._judge.skipped_steps = 0
        logs = functools.partial(self._logs, means)
        before = self.steps_done
        shown.start(title, batches.per_epoch)
        try:
            for number, batch in enumerate(batches.epoch()):
                if every_steps is not None and choose is not None and number and self.steps_done % every_steps == 0:
                    due = choose(LazyLogs(logs))
                    step, every_steps = due.step, due.every_steps
                ended = step(batch)
                if isinstance(step, TrainStep):
                    self.steps_done += self._judge.counts(
                        ended, step.transaction.guard, self.steps_done, self.epochs_done
                    )
                shown.advance(int(examples_of(batch)), logs)
            final = logs()
            if isinstance(step, TrainStep):
                if self.steps_done == before:
                    final = dict.fromkeys(final, math.nan)
                final |= self._judge.logs()
            shown.end(final)
        finally:
            shown.close()
        return final

    def _logs(self, means: Means) -> dict[str, Any]:
        values = {**means.results(), **self._objective.results()}
        return {name: value.numpy() if value.shape.rank else float(value) for name, value in values.items()}
