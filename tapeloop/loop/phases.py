"""What trains now: the policy's answer of the moment, and the step made for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapeloop.loop.step_cache import CompiledTrainStep, StepCache
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree
from tapeloop.optimization.updates import Updates
from tapeloop.policies.base import Progress, VariablePolicy, is_value
from tapeloop.policies.resolve import chain, resolve, selections_to_come


@dataclass(frozen=True)
class ActivePhase:
    """What trains next.

    Attributes:
        step: The compiled step.
        policy: The policy that it is for.
        every_steps: At which multiples of steps it is to be asked anew within an epoch, or None.
    """

    step: CompiledTrainStep
    policy: VariablePolicy
    every_steps: int | None


class PhaseTracker:
    """The selections of a model, as policies ask for them."""

    def __init__(self, model: Model, steps: StepCache, updates: Updates) -> None:
        """Keep what is needed.

        Args:
            model: The model.
            steps: Makes the steps.
            updates: What is to be prepared for each selection.
        """
        self._model = model
        self._steps = steps
        self._updates = updates
        self._known: dict[VariablePolicy, Selection] = {}
        self._prepared: Selection | None = None
        self._fresh: Tree | None = None  # as the check has just read it; reading a large model takes a while
        self._asked: tuple[VariablePolicy, int, int] | None = None  # which policy, and at which step of which epoch
        self._answer: list[VariablePolicy] = []
        self._held: tuple[VariablePolicy, VariablePolicy] | None = None  # the policy, and what it said last trains

    def now(self, policy: VariablePolicy, progress: Progress) -> Selection:
        """Return what a policy selects of the model as it is now."""
        return resolve(self._chain(policy, progress)[-1], Tree.of(self._model))

    def held(self, policy: VariablePolicy, progress: Progress, *, trains: bool = False) -> Selection:
        """Return what trained last under a policy, of the model as it is now; it need not leave anything to train."""
        if self._held is not None and self._held[0] is policy:
            return resolve(self._held[1], Tree.of(self._model), trains)
        return resolve(self._chain(policy, progress)[-1], Tree.of(self._model), trains)

    def check(self, policy: VariablePolicy) -> None:
        """Resolve what is known to come due.

        Raises:
            PolicyError: It cannot be resolved for the model, or there is no optimizer for a group.
        """
        self._fresh = Tree.of(self._model)
        to_come = selections_to_come(policy, self._fresh)
        self._updates.optimizers.check(to_come, changing=True)

    def due(self, policy: VariablePolicy, progress: Progress, *, starting: bool) -> ActivePhase:
        """Return what trains next, everything that it needs being made.

        The model's flags are read at the start of an epoch; within one, a policy that held before gets its selection of
        then.
        """
        if starting:
            self._known.clear()
        policies = self._chain(policy, progress)
        holding = policies[-1]
        self._held = policy, holding
        kept = is_value(holding)
        selection = self._known.get(holding) if kept else None
        if selection is None:
            selection = resolve(holding, self._fresh or Tree.of(self._model))
            if kept:
                self._known[holding] = selection
        if selection is not self._prepared:
            changing = type(policy).at is not VariablePolicy.at
            self._updates.prepare(selection, progress.step, changing=changing)
            self._prepared = selection
        self._fresh = None
        every_steps = math.gcd(*(each.every for each in policies if each.every is not None))
        return ActivePhase(self._steps.train(selection), holding, every_steps or None)

    def _chain(self, policy: VariablePolicy, progress: Progress) -> list[VariablePolicy]:
        """Return the policies that lie within one another now. None is asked twice about the same moment.

        One that draws at random or keeps state would answer differently.
        """
        asked = self._asked
        if asked is None or asked[0] is not policy or asked[1:] != (progress.step, progress.epoch):
            self._answer = chain(policy, progress)
            self._asked = policy, progress.step, progress.epoch
        return self._answer
