"""What trains now: the policy's answer of the moment, and the step made for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapeloop.policy import Progress, VariablePolicy, is_value
from tapeloop.select import chain, select, selections_to_come
from tapeloop.selection import Selection
from tapeloop.steps import Steps, TrainStep
from tapeloop.tree import Model, Tree
from tapeloop.updates import Updates


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


class Selections:
    """The selections of a model, as policies ask for them."""

    def __init__(self, model: Model, steps: Steps, updates: Updates) -> None:
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

    def now(self, policy: VariablePolicy, progress: Progress, *, trains: bool = True) -> Selection:
        """Return what a policy selects of the model as it is now; nothing will do where it does not train."""
        return select(chain(policy, progress)[-1], Tree.of(self._model), trains)

    def check(self, policy: VariablePolicy) -> None:
        """Resolve what is known to come due.

        Raises:
            PolicyError: It cannot be resolved for the model, or there is no optimizer for a group.
        """
        self._fresh = Tree.of(self._model)
        for selection in selections_to_come(policy, self._fresh):
            self._updates.optimizers.check(selection, changing=True)

    def due(self, policy: VariablePolicy, progress: Progress, *, starting: bool) -> Due:
        """Return what trains next, everything that it needs being made.

        The model's flags are read at the start of an epoch; within one, a policy that held before gets its selection of
        then.
        """
        if starting:
            self._known.clear()
        policies = chain(policy, progress)
        holding = policies[-1]
        kept = is_value(holding)
        selection = self._known.get(holding) if kept else None
        if selection is None:
            selection = select(holding, self._fresh or Tree.of(self._model))
            if kept:
                self._known[holding] = selection
        if selection is not self._prepared:
            changing = type(policy).at is not VariablePolicy.at
            self._updates.prepare(selection, progress.step, changing=changing)
            self._prepared = selection
        self._fresh = None
        every_steps = math.gcd(*(each.every for each in policies if each.every is not None))
        return Due(self._steps.train(selection), holding, every_steps or None)
