"""Planning a step: the user's part is traced by itself, outside of any other trace, and tells all that it touches.

What the step needs is made outside of traces: optimizer slots and checksums before the plan, the sums of its logs and
the list of what it is rolled back in after it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tapeloop._backend import keras_internals
from tapeloop._backend.assertions import can_stop
from tapeloop._backend.autograph import converted
from tapeloop._backend.patching import inlined_functions
from tapeloop._backend.traced_graph import moves_more_than_variables
from tapeloop.data.batch import examples_of
from tapeloop.distribution.adoption import Copies
from tapeloop.distribution.replicas import Replicas
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, raw
from tapeloop.optimization import untracked_variables
from tapeloop.optimization.finite_check import FiniteCheck, Guard, guard_for
from tapeloop.optimization.updates import Updates
from tapeloop.step.context import Building, StepContext, Training, new_counts
from tapeloop.step.freezing import frozen
from tapeloop.step.frozen_dtype import FrozenDtype
from tapeloop.step.log_means import RunningMeans
from tapeloop.step.metrics import StepMetrics, layer_metrics, renamed, reset
from tapeloop.step.objective import Objective
from tapeloop.step.remat import Remat
from tapeloop.step.user_attributes import UserAttributes

_LOG = logging.getLogger("tapeloop")


@dataclass(frozen=True)
class Compilation:
    """How steps are compiled.

    Attributes:
        autograph: Whether AutoGraph converts the user's part.
        jit_compile: Whether XLA compiles steps; with `"auto"`, on a GPU if XLA can.
        run_eagerly: Whether steps are not compiled, but run op by op.
        steps_per_call: How many steps a call of the loop in the graph runs, or `"auto"`.
    """

    autograph: bool
    jit_compile: bool | str = False
    run_eagerly: bool = False
    steps_per_call: int | str = "auto"

    def __post_init__(self) -> None:
        if self.jit_compile not in (True, False, "auto"):
            raise ValueError(f"`jit_compile` must be True, False or 'auto'. Received: {self.jit_compile!r}.")
        if not isinstance(self.run_eagerly, bool):
            raise ValueError(f"`run_eagerly` must be True or False. Received: {self.run_eagerly!r}.")
        if self.run_eagerly and self.jit_compile is True:
            raise ValueError(
                "`run_eagerly=True` runs op by op, and `jit_compile=True` compiles. Received both: leave one out."
            )

    @property
    def uses_xla(self) -> bool:
        """Whether XLA is to be tried."""
        return bool(self.jit_compile) and (self.jit_compile is True or bool(tf.config.list_physical_devices("GPU")))


@dataclass
class Interventions:
    """Counts how often code other than that of steps ran, which may have set weights.

    What was computed of weights that no step moves is right for as long as the number stays the same.
    """

    count: int = 0

    def note(self) -> None:
        """Count once more."""
        self.count += 1


@dataclass
class StepParts:
    """What all steps of a trainer share.

    Attributes:
        bodies: The user's part of each kind of step: `"train"`, `"eval"` and `"predict"`.
        objective: The loss and the metrics that the trainer was made with.
        updates: What becomes of gradients.
        attributes: What the user keeps among the trainer's own attributes.
        compilation: How steps are compiled.
        remat: What is computed twice to save memory.
        frozen_dtype: In which dtype the frozen part computes.
        is_plain: Tells whether a training step is tapeloop's own from end to end, so that its one update comes last.
        nonfinite: What an Inf or a NaN does: `"raise"`, `"skip"` or `"ignore"`.
        max_consecutive: The number of bad steps in a row after which training goes on.
        masks: Whether bad steps are masked if they can be; see `Masking`.
        replicas: The devices that train together.
        policy: What trains; the loop resolves it for each phase.
        copies: The copies of variables on the other devices of this process.
        interventions: Counts when code other than that of steps ran.
        counts: Where the loop in the graph keeps how far the run has come; see `new_counts`.
        means: The running means of what the steps of each kind return.
        context: The step that is being traced, or run eagerly, while one is.
        has_warned: Whether it was said that a step updates nothing.
    """

    bodies: Mapping[str, Callable[[Any], Any]]
    objective: Objective
    updates: Updates
    attributes: UserAttributes
    compilation: Compilation
    remat: Remat
    frozen_dtype: FrozenDtype
    is_plain: Callable[[], bool]
    nonfinite: str
    max_consecutive: int
    masks: bool
    replicas: Replicas
    policy: Any = None
    copies: Copies = field(init=False)
    interventions: Interventions = field(default_factory=Interventions)
    counts: tf.Variable = field(init=False)
    means: dict[str, RunningMeans] = field(default_factory=lambda: {"train": RunningMeans(), "eval": RunningMeans()})
    context: StepContext | None = None
    has_warned: bool = False

    def __post_init__(self) -> None:
        self.counts = new_counts(self.masks)
        self.copies = Copies(self.replicas, self.counts)

    @property
    def runs_user_code(self) -> bool:
        """Whether some step runs code of the user's own, which may move what no step of the trainer's would."""
        # AutoGraph is on if the user's class overrides a method of some step; `is_plain` speaks of training alone.
        return self.compilation.autograph or not self.is_plain()

    @contextlib.contextmanager
    def acting(self, context: StepContext) -> Iterator[None]:
        """Have the trainer's verbs act on a step inside this context."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def build_model(self, model: Model, spec: Any, kind: str) -> None:
        """Have a model make its variables in a trace of the user's part for batches of a signature; nothing trains."""

        def call(batch: Any) -> None:
            with inlined_functions(), self.acting(Building(model, self.counts)):
                converted(self.bodies[kind])(batch)

        # The signature is open in its first dimension: Keras' Sequential keeps the size of its first batch for good.
        tf.function(call, autograph=self.compilation.autograph).get_concrete_function(spec)


@dataclass(frozen=True)
class StepPlan:
    """The user's part of a step, traced by itself for one selection and one signature of batches.

    Attributes:
        compute: Runs it on a batch of that signature.
        functions: The traced functions that `compute` calls.
        context: What it was asked: its updates in their order, what follows them, what it assigns to.
    """

    compute: Callable[[Any], Any]
    functions: tuple[Any, ...]
    context: StepContext

    @property
    def touched(self) -> list[tf.Variable]:
        """The variables that it reads or assigns to."""
        return [variable for function in self.functions for variable in function.variables]


class Planner:
    """Plans the steps of one kind for one selection.

    Attributes:
        kind: `"train"`, `"eval"` or `"predict"`.
        selection: What trains.
        parts: What all steps of the trainer share.
        metrics: What the user's part logs.
        check: The checksums of training steps; None if nobody looks at them.
        touched: The variables that the user's part was seen to read or assign to.
        masks: Whether bad steps are masked.
    """

    def __init__(self, kind: str, selection: Selection, parts: StepParts) -> None:
        self.kind = kind
        self.selection = selection
        self.parts = parts
        self.metrics = StepMetrics()
        looks = kind == "train" and (parts.nonfinite != "ignore" or parts.updates.loss_scale.value is not None)
        self.check = FiniteCheck(selection) if looks else None
        self.masks = self.check is not None and parts.masks and not parts.compilation.run_eagerly
        if self.masks and not parts.updates.optimizers.are_keras:
            self._give_up_mask("an optimizer that is not Keras' own may move more than variables")
        self.touched: set[Any] = set()  # references: TensorFlow's variables have no hash
        self._context: StepContext | None = None

    def may_fail(self) -> bool:
        """Tell whether a bad step may fail before its one update: the run ends there, and assertions are enabled.

        XLA drops what makes a step fail. An optimizer that is not Keras' own may look at tensors of the user's part.
        """
        parts = self.parts
        # To defer is safe only if nothing follows on the update, which the trainer's own step alone guarantees.
        ends = (
            self.check is not None
            and not self.masks
            and not parts.replicas.are_several
            and parts.nonfinite == "raise"
            and parts.updates.loss_scale.value is None
        )
        return ends and parts.is_plain() and not parts.compilation.uses_xla and (
            parts.updates.optimizers.are_keras and can_stop()
        )  # fmt: skip

    def plan(self, spec: Any, *, deferred: bool = False) -> StepPlan:
        """Trace the user's part for batches of a signature.

        Args:
            spec: The signature.
            deferred: Whether updates wait until the user's part has been computed.
        """
        # The context records what the user's part asks for while it is traced; it belongs to this plan from then on.
        context = self.new_context(deferred)

        def compute(batch: Any) -> Any:
            return self.compute(context, batch)

        with self.frozen(context):
            traced = tf.function(compute, autograph=self.parts.compilation.autograph)
            function = traced.get_concrete_function(spec)
        left = moves_more_than_variables(function) if self.masks else None
        if left is not None:
            self._give_up_mask(f"nobody can mask what the op `{left}` leaves behind")
            return self.plan(spec, deferred=deferred)
        self.touched |= {variable.ref() for variable in function.variables}
        self._warn_untracked(function, context.used)
        self.warn_if_nothing_updates(context)
        self.prepare_logs()
        return StepPlan(function, (function,), context)

    @contextlib.contextmanager
    def frozen(self, context: StepContext) -> Iterator[None]:
        """Trace or run the user's part inside this context, and what is frozen does not move."""
        # Only a gradient computes a layer again. What `frozen` wraps comes around that: both runs are in the same mode.
        remat = self.parts.remat.applied(self.selection) if self.kind == "train" else contextlib.nullcontext()
        in_dtype = self.parts.frozen_dtype.applied(self.selection)
        with remat, in_dtype, frozen(self.selection, context.assigned, context.used):
            yield

    def new_context(self, deferred: bool) -> StepContext:
        """Return a context for a step that is about to be traced, or run eagerly."""
        if self.kind == "train":
            counts, updates = self.parts.counts, self.parts.updates
            self._context = Training(self.selection, counts, self.guard(), updates, deferred)
        else:
            self._context = StepContext(self.kind, self.selection, self.parts.counts)
        return self._context

    def guard(self, *, fails: bool = False) -> Guard:
        """Return what happens to a step that is not finite; see `guard_for`."""
        masking = (self.parts.counts, self.parts.max_consecutive) if self.masks else None
        return guard_for(self.check, self.parts.updates.loss_scale, masking, fails=fails)

    def _give_up_mask(self, reason: str) -> None:
        self.masks = False
        _LOG.info("Steps that are not finite are branched around, for which the host waits in each step: %s.", reason)

    def compute(self, context: StepContext, batch: Any) -> Any:
        """Run the user's part on a batch, and return what it computes: for `"predict"`, what it returns."""
        parts, tree = self.parts, self.selection.tree
        self.note_examples(context, batch)
        # Losses that a call outside of the step has left on a layer are none of this step's.
        for submodel in tree.layers:
            keras_internals.forget_added_losses(submodel.object)
        if isinstance(context, Training):
            context.begin()
        parts.objective.was_updated = False
        # A metric that the trainer or a layer holds is logged if the step updates it, whether or not it is returned.
        held = list(dict.fromkeys([*parts.attributes.metrics(), *layer_metrics(tree)]))
        with parts.acting(context), self.metrics.watching(held) as watch:
            result = converted(parts.bodies[self.kind])(batch)
        if self.kind == "predict":
            return result
        self.metrics.uses_compiled = parts.objective.was_updated
        compiled = parts.objective.results() if self.metrics.uses_compiled else ()
        logs = self.metrics.scalars(self.kind, result, watch, compiled)
        return context.computed(logs) if isinstance(context, Training) else logs

    def note_examples(self, context: StepContext, batch: Any) -> None:
        """Note how many examples gradients are about to be computed of, if they are averaged over devices by that."""
        if self.parts.updates.reduction is not None:
            context.examples = examples_of(batch)

    def logged_variables(self) -> list[tf.Variable]:
        """Return the variables that its steps add their logs up in: those of the logs, and of the metrics."""
        parts, tree = self.parts, self.selection.tree
        metrics = [*parts.attributes.metrics(), *layer_metrics(tree), *self.metrics.by_name.values()]
        found = [raw(variable) for metric in dict.fromkeys(metrics) for variable in metric.variables]
        return [*parts.means[self.kind].variables, *parts.objective.variables, *found]

    def warn_if_nothing_updates(self, context: StepContext) -> None:
        """Say once that a training step updates nothing: a call of `update` is likely missing."""
        trained = self.selection.trained
        if not isinstance(context, Training) or context.updates or not context.assigned.isdisjoint(trained):
            return
        if not self.parts.has_warned:
            self.parts.has_warned = True
            warnings.warn(
                "`train_step` calls neither `self.update(tape, loss)` nor `self.apply(gradients)`, so that nothing "
                f"trains of the {len(trained)} variables that the policy selects.",
                stacklevel=2,
            )

    def prepare_logs(self) -> None:
        """Make the variables for what the user's part was found to log."""
        # Only the trace tells the names, and a variable made within it would cost a second trace.
        if self.kind != "predict":
            self.parts.means[self.kind].prepare(self.metrics.scalar_names)

    def build_evaluation(self, plan: StepPlan) -> Callable[[Any], Any]:
        """Turn the plan of a step that evaluates or predicts into the step."""
        return lambda batch: self._logged(plan.compute(batch), batch)

    def evaluate_eagerly(self, batch: Any) -> Any:
        """Run a step that evaluates or predicts op by op."""
        context = self.new_context(deferred=False)
        with self.frozen(context):
            result = self.compute(context, batch)
        self.prepare_logs()
        return self._logged(result, batch)

    def _logged(self, result: Any, batch: Any) -> Any:
        """Return what a step predicts; of one that evaluates, take in the logs."""
        if self.kind == "predict":
            return result
        self.parts.means[self.kind].update(result, examples_of(batch))
        return None

    def pop_logs(self) -> dict[str, Any]:
        """Return what a step logged on one batch, and reset all that it logs: inside the step."""
        # In the graph: read and reset by the host, op by op, the logs took 1.2 ms of a step of 2.7 (`docs/notes.md`).
        logged, objective = self.metrics, self.parts.objective
        logs: dict[str, Any] = dict(self.parts.means[self.kind].pop_results(logged.scalar_names))
        if logged.uses_compiled:
            logs |= renamed(objective.results(), logged.returned)
            objective.reset()
        logs |= logged.results() | self.parts.updates.statistics.pop_results(self.selection)
        for metric in logged.by_name.values():
            reset(metric)
        return logs

    def warn_stale(self) -> None:
        """Warn of numbers that the user's part has read, and that have changed since."""
        # Run eagerly, a step reads each number anew.
        if self._context is not None and not self.parts.compilation.run_eagerly:
            self.parts.attributes.warn_stale(self._context)

    def _warn_untracked(self, function: Any, used: set[int]) -> None:
        """Name the variables that the user's part uses as if they trained, though the model does not track them."""
        own = self.parts.attributes.variables()
        # What the trainer keeps among its own attributes is the user's business, counters and target networks alike.
        known = {id(v.tf_variable) for v in self.selection.tree.variables} | set(map(id, own))
        unknown = [variable for variable in function.trainable_variables if id(variable) not in known]
        untracked_variables.warn(unknown, used, function)
