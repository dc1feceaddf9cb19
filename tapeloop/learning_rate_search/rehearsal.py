"""Training steps on trial: they run as those of a fit do, and then all that they have moved is put back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tapeloop._backend.assertions import refusal
from tapeloop._backend.patching import noting_all_assignments
from tapeloop.folding.option import Folding
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.interrupts import deferred_interrupt
from tapeloop.loop.step_cache import on_the_host
from tapeloop.loop.step_counts import counts_before
from tapeloop.model.selection import Selection
from tapeloop.optimization.ema import MovingAverages
from tapeloop.optimization.updates import UpdateStatistics
from tapeloop.policies.base import VariablePolicy
from tapeloop.step import atomic
from tapeloop.step.plan import Planner


class Rehearsal:
    """Runs training steps of what trains now, each with learning rates of its own.

    Attributes:
        selection: What trains.
    """

    def __init__(self, loop: EpochLoop, selection: Selection, step: CompiledStep) -> None:
        self.selection = selection
        self._step = step
        self._state = loop.state
        self._applied = 0

    def run(self, batch: Any, rates: Mapping[str, float]) -> dict[str, Any] | None:
        """Run a step on a batch in tensors.

        Args:
            batch: The batch.
            rates: The learning rates of some groups; others keep theirs.

        Returns:
            What it logged; None if it was not finite.

        Raises:
            TypeError: The learning rate of one of these groups follows a schedule.
        """
        optimizers = self._step.planner.parts.updates.optimizers
        for group, rate in rates.items():
            optimizers.set_learning_rate(self.selection, group, rate)
        while True:
            before = counts_before(0, self._state.step + self._applied, self._state.epoch)
            with deferred_interrupt():
                counts, logs, failure = self._step.run_on_batch(batch, before)
            if failure is not None:
                raise refusal(failure) or failure
            if counts.applied:
                self._applied += 1
                return {name: on_the_host(value) for name, value in logs.items()}
            if counts.skipped:
                return None
            # The loss was scaled too far for float16: again with the scale halved.


class _Values:
    """The values of variables before steps on trial, kept by the host: a device may have no memory to spare."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def add(self, variable: tf.Variable) -> None:
        """Take in the value of a variable, unless it is there."""
        if variable.ref() not in self._values:
            self._values[variable.ref()] = variable.numpy()

    def add_all(self, variables: Iterable[tf.Variable]) -> None:
        for variable in variables:
            self.add(variable)

    def put_back(self) -> None:
        for reference, value in self._values.items():
            reference.deref().assign(value)


@contextlib.contextmanager
def rehearsed(loop: EpochLoop, batch: Any) -> Iterator[Rehearsal]:
    """Run training steps on trial inside this context, and then put everything back, whatever has ended them.

    The steps have compiled steps, optimizers and a loss scale of their own, which go on from the state of the
    trainer's in the same variables. Their values are put back; nothing else of the trainer knows of the steps.

    Args:
        loop: The trainer's loop.
        batch: A batch like those of the steps.

    Raises:
        PolicyError: The policy cannot be resolved for the model.
    """
    parts, state, before = loop.steps.parts, loop.state, _Values()
    own = parts.updates
    with loop.phases.unasked() as selection:
        # The averages follow what trains, and nothing follows them; nor is it asked how large updates are.
        trial = dataclasses.replace(
            own,
            optimizers=own.optimizers.on_trial(),
            averages=MovingAverages(None),
            loss_scale=copy.copy(own.loss_scale),
            statistics=UpdateStatistics(),
        )
        before.add_all(own.optimizers.named_variables().values())
        try:
            parts.updates, loop.runs = trial, True
            trial.prepare(selection, state.step, changing=type(loop.phases.policy).at is not VariablePolicy.at)
            step = CompiledStep(Planner("train", selection, parts), copy.copy(state.microbatches), Folding(False))
            # Once it is traced, it is known what it moves.
            step.trace_on_batch(batch)
            before.add_all(atomic.movable_variables(step.planner))
            runs_eagerly = parts.compilation.run_eagerly
            with noting_all_assignments(before.add) if runs_eagerly else contextlib.nullcontext():
                yield Rehearsal(loop, selection, step)
        finally:
            with deferred_interrupt():
                parts.updates, loop.runs = own, False
                before.put_back()
