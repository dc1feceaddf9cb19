"""What a run is made of: gathered for a checkpoint, and put back from one."""

from __future__ import annotations

import copy
import datetime
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop._version import __version__
from tapeloop.checkpoint.records import FORMAT
from tapeloop.checkpoint.saved import SavedRun
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
OF_OPTIMIZERS = "optimizer/", "average/", "loss_scale/"
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
        """Return what a checkpoint says of the run beside its tensors: nothing in it changes while the run goes on."""
        state, phases = self.loop.state, self.loop.phases
        phase, under_way = phases.record(), state.under_way
        versions = {
            "tapeloop": __version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        }
        return {
            "format": FORMAT,
            "written_by": versions,
            "saved_at": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            **{name: getattr(state, name) for name in COUNTERS},
            "fit_starts": list(state.fit_starts),
            "logs": _plain(state.logs),
            "microbatches": state.microbatches.count,
            "policy": {"name": described(phases.policy), "state": copy.deepcopy(phases.policy.get_state())},
            "phase": phase,
            "epoch_under_way": None if under_way is None else self._under_way(under_way),
            "optimizers": state.optimizers.describe(),
            "averages": state.averages.describe(),
            "loss_scale": state.loss_scale.value is not None,
            **self._fit(),
            "history": self._history(),
            "shapes": {name: shape_of(variable) for name, variable in variables.items()},
            "dtypes": {name: variable.dtype.name for name, variable in variables.items()},
        }

    def _fit(self) -> dict[str, Any]:
        """Return what a checkpoint says of the fit that is under way."""
        data, span = self.loop.data, self.loop.span
        if data is None:
            return {}
        said = {"positions": data.positions(), "has_iterator": False, **data.described()}
        epochs = span.stop - data.first_epoch
        is_stopped = self.loop.stop_training and self.loop.state.under_way is None
        return {"fit": {"first_epoch": data.first_epoch, "epochs": epochs, "is_stopped": is_stopped}, "data": said}

    def _under_way(self, progress: EpochProgress) -> dict[str, Any]:
        # What was logged so far, since the data may be at its end: then nothing is traced any more that could tell.
        is_trained = progress.logs is not None
        return {**asdict(progress), "is_trained": is_trained, "logs": _plain(self.loop.logs_so_far())}

    def still(self) -> set[str]:
        """Return the names of the model's variables that do not move while what trains now trains."""
        return set(_under("model", {variable.path: None for variable in self.loop.phases.still()}))

    def restore(self, saved: SavedRun, *, strict: bool = True, fresh_optimizer: bool = False) -> None:
        """Restore the run from a checkpoint, having looked at all of it first.

        Args:
            saved: The checkpoint.
            strict: Whether the model must have the variables of the checkpoint, no more and no fewer.
            fresh_optimizer: Whether the optimizers start anew, and what belongs to them: averages and loss scale.

        Raises:
            CheckpointError: It is of another model or another trainer.
        """
        tree, state = Tree.of(self.model), self.loop.state
        self._require_same_model(saved, strict)
        if not fresh_optimizer:
            self._require_same_optimizers(saved)
            by_path = {path: variable for variable in tree.variables for path in variable.paths}
            is_gone = state.optimizers.rebuild(saved.record["optimizers"], by_path)
            is_gone |= state.averages.rebuild(saved.record["averages"], by_path)
            state.loss_scale.rebuild(saved.record["loss_scale"])
        else:
            is_gone = bool(state.optimizers.variables or state.averages.variables)
            state.optimizers.start_over()
            state.averages.start_over()
            state.loss_scale.start_over()
        if is_gone:
            self.loop.steps.forget()
        left_out = ("log/", *OF_OPTIMIZERS) if fresh_optimizer else ("log/",)
        for name, variable in self.variables().items():
            fits = name in saved.names and shape_of(variable) == saved.shape(name)
            value = saved.read(name) if fits and not name.startswith(left_out) else None
            if value is not None:
                variable.assign(value)
        self._restore_state(saved, tree)

    def require_readable(self, saved: SavedRun) -> None:
        """Check that every tensor of a checkpoint can be read, or is what the model has already.

        Raises:
            DamagedError: A tensor cannot be read, and the model has another value.
        """
        variables = self.variables()
        saved.require_readable(lambda name: variables[name].numpy() if name in variables else None)

    def _require_same_model(self, saved: SavedRun, strict: bool) -> None:
        """Check that the model and the user's attributes have the variables of a checkpoint, with shapes and types.

        Raises:
            CheckpointError: They have not.
        """
        kinds = ("model/", "attribute/")
        here = {n: f"{v.dtype.name} {shape_of(v)}" for n, v in self.variables().items() if n.startswith(kinds)}
        there = {n: f"{saved.record['dtypes'][n]} {saved.shape(n)}" for n in saved.names if n.startswith(kinds)}
        both = sorted(here.keys() & there.keys())
        differ = [f"{_without_kind(n)} {there[n]}, here {here[n]}" for n in both if here[n] != there[n]]
        found = {
            "The checkpoint alone has": [_without_kind(name) for name in sorted(there.keys() - here.keys())],
            "The trainer alone has": [_without_kind(name) for name in sorted(here.keys() - there.keys())],
            "Other shapes or types have": differ,
        }
        problems = " ".join(f"{who} {listed(names)}." for who, names in found.items() if names)
        if problems and (strict or not both):
            remedy = (
                "If Keras has counted the names of layers up (`dense_1`), give them names of your own. To load "
                "what fits, call `trainer.load(path, strict=False)`."
            )
            unbuilt = [f"`self.{name}`" for name in self.attributes.unbuilt()]
            if not all(layer.object.built for layer in Tree.of(self.model).layers):
                unbuilt = ["the model", *unbuilt]
            if unbuilt:
                remedy = f"Call {' and '.join(unbuilt)} on a batch first, to make the variables."
            raise CheckpointError(f"{saved.folder} is of another model. {problems} {remedy}")
        if problems:
            _LOG.warning("%s was loaded in part. %s", saved.folder, problems)

    def _require_same_optimizers(self, saved: SavedRun) -> None:
        """Check that the trainer's optimizers and averages can hold the state in a checkpoint.

        Raises:
            CheckpointError: They cannot.
        """
        record, state = saved.record, self.loop.state
        wrong = state.optimizers.differences(record["optimizers"])
        if record["averages"]["decay"] != state.averages.decay:
            wrong.append(f"its `ema` is {record['averages']['decay']}, the trainer's is {state.averages.decay}")
        if wrong:
            raise CheckpointError(
                f"{saved.folder} has a state of the optimizer that this trainer cannot take: {'; '.join(wrong)}. Make "
                "the trainer as it was. Or start the optimizer anew: call `trainer.load(path, fresh_optimizer=True)`, "
                "and give `fit` a new directory."
            )

    def _restore_state(self, saved: SavedRun, tree: Tree) -> None:
        record, state, phases = saved.record, self.loop.state, self.loop.phases
        for name in COUNTERS:
            setattr(state, name, record[name])
        state.fit_starts = list(record["fit_starts"])
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
        places: dict[Recorded, int] = {}
        of_phase = [places.setdefault(phase.recorded, len(places)) for phase in history.phases]
        return {
            "history": {name: [_plain_value(value) for value in values] for name, values in history.history.items()},
            "epoch": list(history.epoch),
            "step": list(history.step),
            "phases": [[phase.step, phase.epoch, number] for phase, number in zip(history.phases, of_phase)],
            "selections": list(places),
        }

    def _restore_history(self, record: Mapping[str, Any], tree: Tree) -> None:
        history = self.loop.state.history
        history.history = {name: [_array(v) for v in values] for name, values in record["history"].items()}
        history.epoch = list(record["epoch"])
        # Runs that were saved before steps were recorded have none.
        history.step = list(record.get("step", ()))
        policies = [recorded_phase(answer) for answer in record["selections"]]
        resolved = [functools.cache(functools.partial(resolve, policy, tree, trains=False)) for policy in policies]
        history.phases = [
            Phase(step, epoch, policies[number], resolved[number]) for step, epoch, number in record["phases"]
        ]


def recorded_phase(record: Mapping[str, Any]) -> Recorded:
    """Return what `dataclasses.asdict` made of a recorded policy, and JSON made lists of."""
    pairs = {name: tuple(map(tuple, record[name])) for name in ("groups", "multipliers")}
    return Recorded(record["name"], pairs["groups"], tuple(record["modes"]), pairs["multipliers"], record["every"])


def resumption_of(saved: SavedRun) -> Resumption | None:
    """Return where the fit goes on of which a checkpoint was saved, if it was saved of a fit."""
    if "data" not in saved.record:
        return None
    fit, data, under_way = saved.record["fit"], saved.record["data"], saved.record["epoch_under_way"]
    logs = {} if under_way is None else _arrays(under_way["logs"])
    progress = None
    if under_way is not None:
        trained = logs if under_way["is_trained"] else None
        progress = EpochProgress(under_way["began"], under_way["asked"], under_way["drawn"], trained)
    epoch, ends = saved.record["epoch"], fit["first_epoch"] + fit["epochs"]
    return Resumption(
        epoch,
        fit["first_epoch"],
        saved.record["shuffle_seed"],
        under_way is None and (epoch >= ends or fit["is_stopped"]),
        fit["epochs"] if fit["is_stopped"] else None,
        tuple(saved.record["fit_starts"]),
        {name: DataPosition(*position) for name, position in data["positions"].items()},
        data,
        progress,
        logs,
        tuple(tuple(name.split("/")[2].split(",")) for name in sorted(saved.names) if name.startswith("log/means/")),
        lambda variables: _assign_logs(saved, variables),
        saved.restore_iterator if data["has_iterator"] else None,
    )


def _assign_logs(saved: SavedRun, variables: Mapping[str, tf.Variable]) -> None:
    """Restore the variables of what an epoch logs."""
    for name, variable in _under("log", variables).items():
        if name in saved.names and shape_of(variable) == saved.shape(name):
            variable.assign(saved.read(name))


def shape_of(variable: tf.Variable) -> list[int | None] | None:
    """Return the shape of a variable as JSON has it; None where it is unknown."""
    return None if variable.shape.rank is None else variable.shape.as_list()


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
