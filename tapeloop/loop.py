"""The loop: epochs of training and evaluation, phase after phase, and the logs gathered."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from tapeloop.batch import refusal
from tapeloop.data import Batches
from tapeloop.errors import DataError, TapeloopError
from tapeloop.feed import Feed
from tapeloop.guard import Judge
from tapeloop.history import History, LazyLogs, Phase
from tapeloop.objective import Means, Objective
from tapeloop.progress import Display
from tapeloop.selections import Due
from tapeloop.step import Step
from tapeloop.steps import Steps, TrainStep
from tapeloop.tally import Tally


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
        self._runs = False

    def fit(
        self,
        phases: Callable[[Mapping[str, Any], bool], Due],
        evaluation: Callable[[], Step],
        batches: Callable[[Due], Batches],
        validation: Callable[[Step], Batches] | None,
        epochs: int,
        shown: Display,
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

        def choose(logs: Mapping[str, Any], starting: bool = False) -> Due:
            due = phases(logs, starting)
            if not history.phases or history.phases[-1].selection != due.step.selection:
                history.phases.append(Phase(self.steps_done, self.epochs_done, due.policy, due.step.selection))
            return due

        for number in range(1, epochs + 1):
            due = choose(self.last_logs, starting=True)
            if validation is not None and number == 1:
                due.step.trace(batches(due).feed())
                evaluation().trace(validation(evaluation()).feed())
            logs = self.run(due.step, batches(due), shown, f"epoch {number}/{epochs}", due.every_steps, choose)
            if validation is not None:
                step = evaluation()
                judged = validation(step)
                evaluated = self.run(step, judged, shown, "  validation")
                judged.rewind()  # so that each epoch is judged by the same batches
                logs |= {f"val_{name}": value for name, value in evaluated.items()}
            self.epochs_done += 1
            self.last_logs = logs
            history.epoch.append(self.epochs_done)
            for name, value in logs.items():
                history.history.setdefault(name, []).append(value)
        return history

    def check_idle(self) -> None:
        """Check that no epoch is under way.

        Raises:
            RuntimeError: One is.
        """
        if self._runs:
            raise RuntimeError(
                "`fit` or `evaluate` was called within an epoch of the same trainer, whose metrics it would start "
                "anew. Make another trainer of the same model for it."
            )

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
        look = functools.partial(self._look, means)
        before = asked = self.steps_done
        shown.start(title, batches.per_epoch)
        self._runs = True
        try:
            for feed in batches.epoch():
                while feed.left != 0:
                    most = step.pace.steps if feed.left is None else min(step.pace.steps, feed.left)
                    if every_steps is not None and choose is not None:
                        if self.steps_done != asked and self.steps_done % every_steps == 0:
                            asked = self.steps_done
                            due = choose(LazyLogs(lambda: look()[0]))
                            step, every_steps = due.step, due.every_steps
                        if every_steps is not None:
                            most = min(most, every_steps - self.steps_done % every_steps)
                    shown.advance(self._call(step, feed, most, batches), look)
            final, examples = look()
            if isinstance(step, TrainStep):
                if self.steps_done == before:
                    final = dict.fromkeys(final, math.nan)
                final |= self._judge.logs()
            shown.end(final, examples)
        except BaseException:
            batches.stop()
            raise
        finally:
            self._runs = False
            shown.close()
        return final

    def _call(self, step: Step, feed: Feed, most: int, batches: Batches) -> int:
        """Call the compiled loop once, and return on how many batches it ran a step."""
        began = time.perf_counter()
        trains = isinstance(step, TrainStep)
        tally, failure = step.run(feed, most, self._judge.last if trains else Tally(), self._judge.patience)
        step.pace.took(tally.batches, time.perf_counter() - began)
        if isinstance(step, TrainStep):
            self.steps_done += tally.moved
            self._judge.take(tally, step.transaction.guard, self.steps_done, self.epochs_done)
        if failure is not None:
            failure = refusal(failure) or failure
            _locate(failure, f"batch {feed.number} of `{batches.name}` (the first is 0)", feed.number)
            raise failure
        return tally.batches

    def _look(self, means: Means) -> tuple[dict[str, Any], int]:
        """Return the logs so far, and over how many examples they are."""
        logs, examples = means.results()
        results = self._objective.results()
        return logs | {n: v.numpy() if v.shape.rank else float(v) for n, v in results.items()}, examples


def _locate(error: BaseException, where: str, number: int) -> None:
    """Have an error say at which batch it came up."""
    if isinstance(error, DataError):
        if number and where.split(" (")[0] not in str(error):
            error.args = (f"At {where}: {error}",)
    elif isinstance(error, Exception) and not isinstance(error, TapeloopError) and hasattr(error, "add_note"):
        error.add_note(f"This came up at {where}.")
