"""A fit that moves nothing: each phase of it traced on one batch, with what it would hold in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from tapeloop._backend.traced_graph import peak_bytes
from tapeloop._table import Table, format_bytes, table
from tapeloop.data.batch import sized_spec_of, tensors_in
from tapeloop.errors import DataError, DisconnectedError
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.fit_data import FitData
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree, VariableInfo
from tapeloop.policies.resolve import selections_to_come
from tapeloop.step.plan import Planner

HEADER = ("phase", "groups", "parameters", "traces", "weights", "gradients", "optimizer state", "step", "loss")
RIGHT = {"phase", "parameters", "traces", "weights", "gradients", "optimizer state", "step"}


@dataclass(frozen=True)
class DryPhase:
    """What a phase of a fit would cost.

    Attributes:
        selection: What would train.
        traces: How many traces it takes: 1, or 0 where one before it trains the same.
        weight_bytes: The bytes of all of the model's variables.
        gradient_bytes: The bytes of the gradients.
        state_bytes: The bytes of the optimizer's state for what trains.
        step_bytes: The most bytes that a step on one batch holds at a time beside the weights and the optimizer's
            state: activations and gradients. An estimate: TensorFlow may run ops in another order, and fuse some.
        disconnected: What is wrong with the gradients, or None.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> found = tl.Trainer(model, loss="mse").fit(np.ones((8, 4)), np.ones((8, 2)), dry_run=True)
        >>> phase = found.phases[0]
        >>> phase.weight_bytes, phase.gradient_bytes, phase.state_bytes
        (40, 40, 80)
    """

    selection: Selection
    traces: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    step_bytes: int
    disconnected: str | None


@dataclass(frozen=True)
class DryRun:
    """What `fit(dry_run=True)` has found, phase by phase, of those that the policy is known to come to.

    Attributes:
        phases: The phases.
        examples: The number of examples of the batch.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.GradualUnfreeze(["head", "base"]), loss="mse")
        >>> found = trainer.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=2, dry_run=True)
        >>> [(len(phase.selection.trained), phase.traces, phase.disconnected) for phase in found.phases]
        [(2, 1, None), (4, 1, None)]
        >>> trainer.step, trainer.trace_count
        (0, 0)
    """

    phases: tuple[DryPhase, ...]
    examples: int | None

    def __repr__(self) -> str:
        problems = [f"phase {n}: {phase.disconnected}" for n, phase in enumerate(self.phases) if phase.disconnected]
        return "\n".join([self._table(), *problems])

    def _repr_html_(self) -> str:
        return self._table().html

    def _table(self) -> Table:
        rows = [
            (
                str(number),
                ", ".join(phase.selection.groups),
                f"{sum(variable.size for variable in phase.selection.trained):,}",
                str(phase.traces),
                *map(format_bytes, (phase.weight_bytes, phase.gradient_bytes, phase.state_bytes, phase.step_bytes)),
                "connected" if phase.disconnected is None else "missing",
            )
            for number, phase in enumerate(self.phases)
        ]
        return table(HEADER, rows, RIGHT, [("examples", f"{self.examples} in a batch"), ("moved", "nothing")])


def dry_run(model: Model, loop: EpochLoop, data: FitData) -> DryRun:
    """Trace each phase of a fit by itself, with its updates left out.

    Args:
        model: The trainer's model.
        loop: Its loop.
        data: The data of the fit.

    Raises:
        DataError: The data is an iterator, from which a batch would be taken.
    """
    if data.loader.is_one_shot:
        raise DataError(
            "`dry_run` would take a batch from an iterator, which the fit would then miss. Pass data that can be gone "
            "through again, such as a list of a few batches."
        )
    spec = data.loader.cursor().spec()
    static = next((each.shape[0] for each in tensors_in(spec) if each.shape.rank), None)
    examples = getattr(data.loader.source, "batch_size", static)
    spec = spec if examples is None else sized_spec_of(spec, examples)
    # A policy that draws at random or keeps state goes on as if nobody had asked it.
    with loop.phases.unasked() as now:
        selections = selections_to_come(loop.phases.policy, Tree.of(model)) or [now]
    traced: dict[Selection, DryPhase] = {}
    phases = []
    for selection in selections:
        if selection in traced:
            phases.append(dataclasses.replace(traced[selection], traces=0))
        else:
            traced[selection] = _traced(loop, selection, spec)
            phases.append(traced[selection])
    return DryRun(tuple(phases), examples)


def _traced(loop: EpochLoop, selection: Selection, spec: object) -> DryPhase:
    """Trace the step of a phase, and return what the phase would cost."""
    planner, optimizers = Planner("train", selection, loop.steps.parts), loop.state.optimizers
    disconnected, held = None, 0
    try:
        # Deferred: the gradients are computed, and no update is made of them.
        held = max(map(peak_bytes, planner.plan(spec, deferred=True).functions))
    except DisconnectedError as error:
        disconnected = str(error)
    return DryPhase(
        selection,
        traces=1,
        weight_bytes=_bytes(selection.tree.variables),
        gradient_bytes=_bytes(selection.trained),
        state_bytes=sum(optimizers.slot_bytes(variable, group) for variable, group in selection.group_of.items()),
        step_bytes=held,
        disconnected=disconnected,
    )


def _bytes(variables: Iterable[VariableInfo]) -> int:
    return sum(variable.bytes for variable in variables)
