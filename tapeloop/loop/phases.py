"""What trains now: the policy's answer of the moment, and the step for it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.state import TrainerState
from tapeloop.loop.step_cache import StepCache
from tapeloop.model.reader import TreeReader
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree, VariableInfo
from tapeloop.optimization.diagnosis import warn_zero_terms
from tapeloop.policies.base import VariablePolicy, is_declarative, is_value
from tapeloop.policies.recorded import Recorded, described
from tapeloop.policies.resolve import chain, resolve, selections_to_come

_LOG = logging.getLogger("tapeloop")


@dataclass(frozen=True)
class ActivePhase:
    """What trains next.

    Attributes:
        step: The compiled step.
        policy: The policy that it is for.
        every_steps: At which multiples of steps the policy is asked again within an epoch, or None.
    """

    step: CompiledStep
    policy: VariablePolicy
    every_steps: int | None


class PhaseTracker:
    """Resolves a trainer's policy as training goes."""

    def __init__(self, model: Model, steps: StepCache, state: TrainerState) -> None:
        """Keep what selections are resolved for.

        Args:
            model: The model.
            steps: Makes the steps.
            state: How far the run has come.
        """
        self._model = model
        self._steps = steps
        self._state = state
        self._reader = TreeReader(model)
        self._tree: Tree | None = None  # as it was read last
        self._read_at = -1  # how often code of the user's had run by then
        # The selections of that tree, of declarative policies; and those of this epoch, of policies that are values.
        self._resolved: dict[tuple[VariablePolicy, bool], Selection] = {}
        self._of_epoch: dict[VariablePolicy, Selection] = {}
        self._prepared: tuple[Selection, int] | None = None  # and what else had run by then
        self._asked: tuple[VariablePolicy, int, int] | None = None  # the policy, and the step and epoch of the answer
        self._answer: list[VariablePolicy] = []
        self._active: ActivePhase | None = None
        self._recorded: Recorded | None = None  # by the checkpoint that was loaded last
        self._saved: tuple[str, Mapping[str, Any]] | None = None  # the policy of that, and its state, until it is set

    @property
    def policy(self) -> VariablePolicy:
        """The trainer's policy."""
        policy: VariablePolicy = self._steps.parts.policy
        return policy

    def now(self) -> Selection:
        """Return what the policy selects of the model as it is now."""
        return self._resolve(self._chain()[-1])

    def held(self, *, trains: bool = False) -> Selection:
        """Return what trained last, of the model as it is now; unless `trains`, it may leave nothing to train."""
        # To evaluate is to ask nothing: a policy that keeps state would move on.
        held = self._state.policy
        policy = held[1] if held is not None and held[0] is self.policy else self._chain()[-1]
        return self._resolve(policy, trains=trains)

    def _resolve(self, policy: VariablePolicy, *, trains: bool = True, within_fit: bool = False) -> Selection:
        """Return what a policy selects of the model as it is now: the same object, if nothing has changed.

        Args:
            policy: The policy.
            trains: Whether it must leave something to train.
            within_fit: Whether a fit is under way: nobody looks at the model then unless code of the user's has run.
        """
        interventions = self._steps.parts.interventions.count
        if not within_fit or self._read_at != interventions:
            tree, self._read_at = self._reader.read(), interventions
            if tree is not self._tree:
                self._resolved.clear()
            self._tree = tree
        assert self._tree is not None
        # A filter of the user's may look at anything, and is asked each time.
        if not is_declarative(policy):
            return resolve(policy, self._tree, trains)
        if (policy, trains) not in self._resolved:
            self._resolved[policy, trains] = resolve(policy, self._tree, trains)
        return self._resolved[policy, trains]

    def current(self) -> Selection:
        """Return what trains, or trained last, as it was resolved then."""
        return self.held() if self._active is None else self._active.step.selection

    def known(self, *, is_under_way: bool) -> Selection | None:
        """Return what trains now, or None if a policy would have to be asked that may answer otherwise each time.

        Args:
            is_under_way: Whether a step or an epoch is under way.

        Raises:
            PolicyError: The policy cannot be resolved for the model.
        """
        held = self._state.policy
        if is_under_way and self._active is not None and held is not None and held[0] is self.policy:
            return self._active.step.selection
        policy = self._settled()
        if policy is None:
            return None
        return self._resolve(policy)

    def _settled(self) -> VariablePolicy | None:
        """Return the policy that holds now, if that is known without asking one that is not a value."""
        state = self._state
        if self._asked is not None and self._asked[0] is self.policy and self._asked[1:] == (state.step, state.epoch):
            return self._answer[-1]
        policy, following = None, self.policy
        while following is not policy and is_value(following):
            policy, following = following, following.at(state.progress())
        if following is policy or type(following).at is VariablePolicy.at:
            return following
        return state.policy[1] if state.policy is not None and state.policy[0] is self.policy else None

    @contextlib.contextmanager
    def unasked(self) -> Iterator[Selection]:
        """Give what trains now inside this context; after it, the policy is as if it had not been asked."""
        policy, asked, answer = self.policy, self._asked, self._answer
        try:
            state = policy.get_state()
        except TypeError:  # it may keep anything
            state = None
        try:
            yield self.now()
        finally:
            # One that cannot be brought back is not asked twice about the moment, and keeps its answer.
            if state is not None:
                if policy.get_state() != state:
                    policy.set_state(state)
                self._asked, self._answer = asked, answer

    def resolve_to_come(self) -> None:
        """Resolve every selection that is known to come.

        Raises:
            PolicyError: A policy cannot be resolved for the model, or there is no optimizer for a group.
        """
        # A typo in the phase of epoch 7 is found in epoch 0.
        to_come = selections_to_come(self.policy, self._reader.read())
        self._state.optimizers.require_groups(to_come, changing=True)

    def groups_to_come(self) -> set[str] | None:
        """Return the names of the groups that may train, or None if a policy does not say what it will answer."""
        tree, is_static = self._reader.read(), type(self.policy).at is VariablePolicy.at
        to_come = [resolve(self.policy, tree)] if is_static else selections_to_come(self.policy, tree)
        return {group for selection in to_come for group in selection.groups} or None

    def due(self, logs: Mapping[str, Any] | None = None, *, starting: bool = False) -> ActivePhase:
        """Return what trains next, and make everything that it needs.

        The model's flags are read at the start of an epoch. Within an epoch, a policy that held before gets its
        selection of then.

        Args:
            logs: What the policy may look at; by default the logs of the last epoch.
            starting: Whether an epoch starts.
        """
        self._take_up()
        if self._saved is not None:
            _LOG.warning("The policy is %s, and was %s in the checkpoint.", described(self.policy), self._saved[0])
            self._saved = None
        return self._activate(self._chain(logs), starting=starting)

    def again(self) -> ActivePhase:
        """Return what trained when the run was saved that is loaded, without asking the policy anew."""
        self._take_up()
        if self._recorded is None or self._saved is not None:
            return self.due(starting=True)
        return self._activate([self._recorded], starting=True)

    def start_over(self, recorded: Recorded | None, policy: str, policy_state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            recorded: What trained when the run was saved.
            policy: The trainer's policy then, as it is written.
            policy_state: What it had come to.
        """
        self._recorded, self._active, self._asked, self._prepared = recorded, None, None, None
        self._resolved.clear()
        self._state.policy, self._saved = None, (policy, policy_state)
        self._take_up()

    def _take_up(self) -> None:
        """Give the policy the state that was saved, if it is the one that was saved."""
        # A program may set that policy only later, before its second fit.
        if self._saved is not None and self._saved[0] == described(self.policy):
            self.policy.set_state(self._saved[1])
            self._saved = None
            self._state.policy = None if self._recorded is None else (self.policy, self._recorded)

    def record(self) -> Recorded | None:
        """Return what trained last, as a checkpoint records it."""
        active = self._active
        if active is None:
            return self._recorded
        return Recorded.of(described(active.policy), active.step.selection, active.every_steps)

    def still(self) -> tuple[VariableInfo, ...]:
        """Return the variables that do not move while what trained last trains."""
        return () if self._active is None else self._active.step.selection.still

    def _activate(self, policies: Sequence[VariablePolicy], *, starting: bool) -> ActivePhase:
        """Return what trains under the last of the policies that lie within one another, made ready for training."""
        holding = policies[-1]
        self._state.policy = self.policy, holding
        # Users lift and set `trainable` flags between epochs; what they do within one counts from the next.
        if starting:
            self._of_epoch.clear()
        selection = self._of_epoch.get(holding) if is_value(holding) else None
        if selection is None:
            selection = self._resolve(holding, within_fit=True)
            if is_value(holding):
                self._of_epoch[holding] = selection
        # A user may have set the rate of the optimizer itself.
        interventions = self._steps.parts.interventions.count
        if self._prepared is None or self._prepared[0] is not selection or self._prepared[1] != interventions:
            changing = type(self.policy).at is not VariablePolicy.at
            self._steps.parts.updates.prepare(selection, self._state.step, changing=changing)
            warn_zero_terms(selection)
            if self._steps.parts.replicas.are_several:
                self._steps.parts.interventions.note()  # rates were set, on one device alone
                interventions += 1
            self._prepared = selection, interventions
        # Asked no more often than needed: at the largest common divisor of all that the policies say.
        every_steps = math.gcd(*(each.every for each in policies if each.every is not None))
        step, before = self._steps.get("train", selection), self._active
        if before is not None and step is not before.step:
            self._steps.parts.interventions.note()  # by the steps of the phase before
        self._active = ActivePhase(step, holding, every_steps or None)
        return self._active

    def _chain(self, logs: Mapping[str, Any] | None = None) -> list[VariablePolicy]:
        """Return the policies that lie within one another now.

        No policy is asked twice about the same moment: one that draws at random or keeps state would answer otherwise.
        """
        state = self._state
        asked = self.policy, state.step, state.epoch
        if self._asked is None or self._asked[0] is not asked[0] or self._asked[1:] != asked[1:]:
            self._answer = chain(self.policy, state.progress(logs))
            self._asked = asked
            if not all(type(policy).__module__.startswith("tapeloop.") for policy in self._answer):
                self._steps.parts.interventions.note()  # a policy of the user's may do so
        return self._answer
