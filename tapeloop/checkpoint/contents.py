"""What a run is made of: gathered for a checkpoint, and put back from one."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop.checkpoint.saved import FORMAT, SavedRun
from tapeloop.data.loader import DataPosition
from tapeloop.errors import CheckpointError, listed
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.history import Phase
from tapeloop.loop.state import EpochProgress, Resumption
from tapeloop.model.tree import Model, Tree
from tapeloop.policies.recorded import Recorded, described
from tapeloop.policies.resolve import resolve
from tapeloop.step.user_attributes import UserAttributes

_LOG = logging.getLogger("tapeloop")
COUNTERS = "step", "epoch", "skipped_steps", "consecutive_skipped", "shuffle_seed"


@dataclass(frozen=True)
class RunContents:
    """A trainer's run, as a checkpoint has it.

    Attributes:
        model: The trainer's model.
        loop: Its loop, with the state of the run.
        attributes: What the user keeps among the trainer's own attributes.
    """

    model: Model
    loop: EpochLoop
    attributes: UserAttributes

    def variables(self) -> dict[str, tf.Variable]:
        """Return all variables of the run by the names that they have in checkpoints."""
        state = self.loop.state
        return {
            **_under("model", {variable.path: variable.tf_variable for variable in Tree.of(self.model).variables}),
            **_under("optimizer", state.optimizers.named_variables()),
            **_under("average", state.averages.named_variables()),
            **_under("loss_scale", state.loss_scale.named_variables()),
            **_under("attribute", self.attributes.named_variables()),
        }

    def log_variables(self) -> dict[str, tf.Variable]:
        """Return what the epoch that is under way has logged, which counts while it is under way alone."""
        return _under("log", self.loop.log_variables()) if self.loop.state.under_way is not None else {}

    def record(self, variables: Mapping[str, tf.Variable]) -> dict[str, Any]:
        """Return what a checkpoint says of the run beside its tensors."""
        state, phases = self.loop.state, self.loop.phases
        phase, under_way = phases.record(), state.under_way
        versions = {
            "tapeloop": importlib.metadata.version("tapeloop"),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        }
        return {
            "format": FORMAT,
            "written_by": versions,
            "saved_at": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            **{name: getattr(state, name) for name in COUNTERS},
            "logs": _plain(state.logs),
            "microbatches": state.microbatches.count,
            "policy": {"name": described(phases.policy), "state": phases.policy.get_state()},
            "phase": None if phase is None else asdict(phase),
            "under_way": None if under_way is None else self._under_way(under_way),
            "optimizers": state.optimizers.describe(),
            "averages": state.averages.describe(),
            "loss_scale": state.loss_scale.value is not None,
            **self._fit(),
            "history": self._history(),
            "shapes": {name: variable.shape.as_list() for name, variable in variables.items()},
            "dtypes": {name: variable.dtype.name for name, variable in variables.items()},
        }

    def _fit(self) -> dict[str, Any]:
        """Return what a checkpoint says of the fit that is under way."""
        data, span = self.loop.data, self.loop.span
        if data is None:
            return {}
        said = {"positions": data.positions(), "has_iterator": False, **data.described()}
        return {"fit": {"first_epoch": data.first_epoch, "epochs": span.stop - data.first_epoch}, "data": said}

    def _under_way(self, progress: EpochProgress) -> dict[str, Any]:
        # What was logged so far, since the data may be at its end: then nothing is traced any more that could tell.
        is_trained = progress.logs is not None
        return {**asdict(progress), "is_trained": is_trained, "logs": _plain(self.loop.logs_so_far())}

    def still(self) -> set[str]:
        """Return the names of the model's variables that do not move while what trains now trains."""
        return set(_under("model", {variable.path: None for variable in self.loop.phases.still()}))

    def restore(self, saved: SavedRun, *, strict: bool = True, fresh_optimizer: bool = False) -> None:
        """Bring the run to where a checkpoint has it, having looked at all of it first.

        Args:
            saved: The checkpoint.
            strict: Whether the model must have the variables of the checkpoint, no more and no fewer.
            fresh_optimizer: Whether the optimizers start anew, and what belongs to them: averages and loss scale.

        Raises:
            CheckpointError: It is of another model or another trainer.
        """
        record, state = saved.record, self.loop.state
        self._require_same_model(saved, strict)
        tree = Tree.of(self.model)
        by_path = {path: variable for variable in tree.variables for path in variable.paths}
        if not fresh_optimizer:
            wrong = [*state.optimizers.differences(record["optimizers"]), *self._other_averages(record)]
            if wrong:
                raise CheckpointError(
                    f"{saved.folder} has a state of the optimizer that this trainer cannot take: {'; '.join(wrong)}. "
                    "Make the trainer as it was. Or start the optimizer anew: call `trainer.load(path, "
                    "fresh_optimizer=True)`, and give `fit` a new directory."
                )
            changed = state.optimizers.rebuild(record["optimizers"], by_path)
            changed |= state.averages.rebuild(record["averages"], by_path)
            state.loss_scale.rebuild(record["loss_scale"])
        else:
            changed = state.optimizers.rebuild({"cohorts": [], "templates": {}, "set": {}}, by_path)
            changed |= state.averages.rebuild({"left_at": {}}, by_path)
            state.loss_scale.rebuild(False)
        if changed:
            self.loop.steps.forget()
        left_out = ("log/", "optimizer/", "average/", "loss_scale/") if fresh_optimizer else ("log/",)
        names = {name for name in saved.names if not name.startswith(left_out)}
        for name, variable in self.variables().items():
            if name in names and variable.shape.as_list() == saved.shape(name):
                value = saved.read(name)
                if value is not None:
                    variable.assign(value)
        self._restore_state(saved, tree)

    def require_readable(self, saved: SavedRun) -> None:
        """Check that every tensor of a checkpoint can be read, or is what the model has already.

        Raises:
            DamagedError: One can not, and the model has another.
        """
        variables = self.variables()
        saved.require_readable(lambda name: variables[name].numpy() if name in variables else None)

    def _require_same_model(self, saved: SavedRun, strict: bool) -> None:
        """Check that the run has the variables of the model and of the user that a checkpoint has."""
        kinds = ("model/", "attribute/")
        mine = {name: variable.shape.as_list() for name, variable in self.variables().items() if name.startswith(kinds)}
        theirs = {name: saved.shape(name) for name in saved.names if name.startswith(kinds)}
        problems = []
        for said, names in (
            ("the checkpoint has and this trainer has not", sorted(theirs.keys() - mine.keys())),
            ("this trainer has and the checkpoint has not", sorted(mine.keys() - theirs.keys())),
        ):
            if names:
                problems.append(f"{said}: {listed([_without_kind(name) for name in names])}")
        other = [name for name in sorted(mine.keys() & theirs.keys()) if mine[name] != theirs[name]]
        if other:
            shapes = [f"{_without_kind(name)} {theirs[name]} and not {mine[name]}" for name in other]
            problems.append(f"they have in other shapes: {listed(shapes)}")
        dtypes = {name: variable.dtype.name for name, variable in self.variables().items()}
        cast = [name for name in sorted(mine.keys() & theirs.keys()) if dtypes[name] != saved.record["dtypes"][name]]
        if cast:
            types = [f"{_without_kind(name)} {saved.record['dtypes'][name]} and not {dtypes[name]}" for name in cast]
            problems.append(f"they have in other types: {listed(types)}")
        if problems and (strict or not mine.keys() & theirs.keys()):
            is_built = all(layer.object.built for layer in Tree.of(self.model).layers)
            remedy = "Call the model on a batch first, to build it."
            if is_built:
                remedy = (
                    "If Keras has counted the names of layers up (`dense_1`), give them names of your own. To load "
                    "what fits, call `trainer.load(path, strict=False)`."
                )
            raise CheckpointError(f"{saved.folder} is of another model. What {'; what '.join(problems)}. {remedy}")
        if problems:
            _LOG.warning("%s was loaded in part. What %s.", saved.folder, "; what ".join(problems))

    def _other_averages(self, record: Mapping[str, Any]) -> list[str]:
        there, here = record["averages"]["decay"], self.loop.state.averages.decay
        return [f"its `ema` is {there}, the trainer's is {here}"] if there != here else []

    def _restore_state(self, saved: SavedRun, tree: Tree) -> None:
        record, state, phases = saved.record, self.loop.state, self.loop.phases
        for name in COUNTERS:
            setattr(state, name, record[name])
        state.logs = _arrays(record["logs"])
        if state.microbatches.adapts:  # otherwise the program says it
            state.microbatches.count = record["microbatches"]
        state.under_way = None
        recorded = None if record["phase"] is None else recorded_phase(record["phase"])
        phases.start_over(recorded, record["policy"]["name"], record["policy"]["state"])
        self._restore_history(record["history"], tree)
        state.resumption = resumption_of(saved)

    def _history(self) -> dict[str, Any]:
        history = self.loop.state.history
        # A cycle comes back to the same selections, each of which is written once.
        answers = {phase: Recorded.of(phase.policy, phase.selection, None) for phase in history.phases}
        selections = list(dict.fromkeys(answers.values()))
        places = {answer: number for number, answer in enumerate(selections)}
        return {
            "history": {name: [_plain_value(value) for value in values] for name, values in history.history.items()},
            "epoch": list(history.epoch),
            "phases": [[phase.step, phase.epoch, places[answers[phase]]] for phase in history.phases],
            "selections": [asdict(answer) for answer in selections],
        }

    def _restore_history(self, record: Mapping[str, Any], tree: Tree) -> None:
        history = self.loop.state.history
        history.history = {name: [_array(v) for v in values] for name, values in record["history"].items()}
        history.epoch = list(record["epoch"])
        policies = [recorded_phase(answer) for answer in record["selections"]]
        selections = [resolve(policy, tree, trains=False) for policy in policies]
        history.phases = [
            Phase(step, epoch, policies[number], selections[number]) for step, epoch, number in record["phases"]
        ]


def recorded_phase(record: Mapping[str, Any]) -> Recorded:
    """Return what `dataclasses.asdict` made of a recorded policy, and JSON made lists of."""
    pairs = {name: tuple(map(tuple, record[name])) for name in ("groups", "multipliers")}
    return Recorded(record["name"], pairs["groups"], tuple(record["modes"]), pairs["multipliers"], record["every"])


def resumption_of(saved: SavedRun) -> Resumption | None:
    """Return where the fit goes on of which a checkpoint was saved, if it was saved of a fit."""
    if "data" not in saved.record:
        return None
    fit, data, under_way = saved.record["fit"], saved.record["data"], saved.record["under_way"]
    logs = {} if under_way is None else _arrays(under_way["logs"])
    progress = None
    if under_way is not None:
        trained = logs if under_way["is_trained"] else None
        progress = EpochProgress(under_way["began"], under_way["asked"], under_way["drawn"], trained)
    return Resumption(
        saved.record["epoch"],
        fit["first_epoch"],
        saved.record["shuffle_seed"],
        under_way is None and saved.record["epoch"] >= fit["first_epoch"] + fit["epochs"],
        {name: DataPosition(*position) for name, position in data["positions"].items()},
        data,
        progress,
        logs,
        tuple(tuple(name.split("/")[2].split(",")) for name in sorted(saved.names) if name.startswith("log/means/")),
        lambda variables: _assign_logs(saved, variables),
        saved.restore_iterator if data["has_iterator"] else None,
    )


def _assign_logs(saved: SavedRun, variables: Mapping[str, tf.Variable]) -> None:
    """Bring what an epoch logs to where it was."""
    for name, variable in _under("log", variables).items():
        if name in saved.names and variable.shape.as_list() == saved.shape(name):
            variable.assign(saved.read(name))


def _under(kind: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{kind}/{name}": value for name, value in named.items()}


def _without_kind(name: str) -> str:
    return name.partition("/")[2]


def _plain(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in logs.items()}


def _plain_value(value: Any) -> Any:
    """Return a log as JSON has it: a number, or a list for one that has several."""
    return np.asarray(value).tolist()


def _arrays(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _array(value) for name, value in logs.items()}


def _array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else math.nan if value is None else value
