"""Measuring what a trainer gains from its options, one candidate after another, within a limit of time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np

from tapeloop._table import format_bytes
from tapeloop._validation import is_number
from tapeloop.data.arguments import joined as joined_data
from tapeloop.data.batch import shapes, tensors_in
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.errors import DataError
from tapeloop.loop.epochs import EpochLoop
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree
from tapeloop.policies.base import VariablePolicy
from tapeloop.step.plan import StepParts
from tapeloop.tuning.candidates import OPTIONS, Facts, Options, candidates, differs, joined, may_be_picked, picked
from tapeloop.tuning.environment import check_gpu_memory
from tapeloop.tuning.importable import Main, Unsendable
from tapeloop.tuning.parcel import Made, packed
from tapeloop.tuning.report import Tuning, TuningRow
from tapeloop.tuning.server import Server

MOST_BATCHES, MOST_BYTES = 4, 2**28  # of the data that is measured on, unless one batch is larger
FOR_NOW, FOR_FIRST, FOR_ONE = 0.7, 1 / 3, 1 / 2  # of the time left: for the trainer as it is, a first step, a candidate
FOR_ALL = 0.95  # of the limit: processes also take time to end
FOR_TURNS = 0.8  # of the time left, at most
CLOSE = 0.5, 1.5  # of a step's time: within that one candidate is compared with the other in turns
LEAST_S = 1.0  # with less time left, a candidate is not begun
T = TypeVar("T", bound="TunesItself")


class TunesItself:
    """The method of a trainer that measures what its options gain."""

    model: Model
    _loop: EpochLoop
    _parts: StepParts
    _made: Made

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Take down how the trainer is made, so that another process can make it again."""
        made = super().__new__(cls)
        vars(made)["_made"] = Made(args, kwargs)
        return made

    def tune(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        options: Collection[str] = OPTIONS,
        lower_precision: bool = False,
        time_limit: float = 60.0,
        verbose: int = 1,
    ) -> Tuning:
        """Measure, on this device and data, which options make a step of this trainer faster.

        XLA, folding, `steps_per_call`, bfloat16 for the frozen part and rematerialization are tried, each in a process
        of its own in which the trainer is made again, so that running out of memory is a row of the table and not the
        end. What gains is tried together at last. Nothing of this trainer changes: make another with the options that
        are returned.

        A process makes the trainer by its class and the arguments that it was made with, which must therefore be found
        by their names there: no `lambda`, no class made in a function or a notebook. What holds now of the policy is
        measured. Data is read beforehand, so that its pipeline does not count.

        Args:
            x: The inputs, or any data that `fit` accepts and that can be gone through again; a few batches are read.
            y: The targets, as for `fit`.
            sample_weight: The weights of the examples, likewise.
            batch_size: Examples per batch, for arrays; by default 32.
            options: The names of the options to try, of `"jit_compile"`, `"fold_frozen"`, `"steps_per_call"`,
                `"frozen_dtype"` and `"remat"`.
            lower_precision: Whether `frozen_dtype="bfloat16"` may be picked, and not only shown.
            time_limit: The seconds for all; what takes too large a part of them is stopped, and what is left out is
                said.
            verbose: 1: a line for each candidate, and the table; 0: silent.

        Returns:
            The options to pass to `Trainer`, and what was measured. It prints as a table.

        Raises:
            TypeError: Something cannot be sent to another process; the text names it, and says what to do.
            DataError: The data is empty, or an iterator, of which batches would be lost.
            PolicyError: The policy cannot be resolved for the model.
            RuntimeError: Called within a fit of this trainer, or TensorFlow has taken all memory of a GPU.
            ValueError: The trainer runs eagerly, or an argument has a value that it cannot have.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
            >>> x, y = np.ones((64, 4)), np.ones((64, 2))
            >>> tuning = trainer.tune(x, y, options=["jit_compile"], verbose=0)
            >>> [row.label for row in tuning.rows]
            ['as it is', 'jit_compile=True']
            >>> faster = tl.Trainer(model, tl.Freeze("base"), loss="mse", **tuning.options)
        """
        began = time.monotonic()
        self._check_may_tune(options, time_limit)
        spec = DataSpec("x", joined_data(x, y, sample_weight), batch_size)
        # With a seed of its own, for one that was drawn would move NumPy's.
        batches = _first_batches(spec.loader(spec.sampler(0)))
        try:
            parcel = packed(self, self._made, self._held(), batches)
        except Unsendable as error:
            raise _refusal(error) from error.__cause__
        search = _Search(options, lower_precision, began + FOR_ALL * time_limit, bool(verbose))
        tuning = search.run(parcel, began)
        if verbose:
            print(tuning)
        return tuning

    def _check_may_tune(self, options: Collection[str], time_limit: float) -> None:
        """Check that there is nothing in the way.

        Raises:
            RuntimeError, ValueError: There is.
        """
        if Main.is_running:
            raise RuntimeError(
                "`tune` measures in processes of their own, which run the program's script to find what is defined in "
                "it, and this call of `tune` stands in it unguarded: put it under `if __name__ == '__main__':`."
            )
        if self._loop.runs or self._loop.data is not None:
            raise RuntimeError("`tune` was called within a fit of the same trainer. Call it before or after.")
        if self._parts.compilation.run_eagerly:
            raise ValueError("The trainer has `run_eagerly=True`, whose steps no option makes faster: leave it out.")
        if isinstance(options, str) or not options or not set(options) <= set(OPTIONS):
            raise ValueError(f"`options` must be some of {', '.join(map(repr, OPTIONS))}. Received: {options!r}.")
        if not is_number(time_limit) or not 0 < time_limit < math.inf:
            raise ValueError(f"`time_limit` must be a number of seconds above 0. Received: {time_limit!r}.")
        check_gpu_memory()

    def _held(self) -> Selection | VariablePolicy:
        """Return what trains now or, if that is not known before the model is built, the policy."""
        layers = [layer.object for layer in Tree.of(self.model).layers]
        if not all(layer.built for layer in layers if isinstance(layer, keras.Layer)):
            return self._loop.phases.policy
        with self._loop.phases.unasked() as selection:
            return selection


class _Search:
    """One search for faster options."""

    def __init__(self, asked: Collection[str], lower_precision: bool, deadline: float, shows: bool) -> None:
        self._asked = asked
        self._lower_precision = lower_precision
        self._deadline = deadline
        self._shows = shows
        self._rows: list[TuningRow] = []
        self._left_out: list[Options] = []
        self._facts: Facts | None = None

    def run(self, parcel: bytes, began: float) -> Tuning:
        """Measure what there is time for."""
        server = Server(parcel)
        try:
            # The time that the server takes to import TensorFlow counts as the first candidate's.
            self._try(server, {}, FOR_NOW, FOR_NOW)
            facts = self._facts
            if facts is not None:
                for_speed, shown = candidates(facts, self._asked, self._lower_precision)
                for options in for_speed:
                    self._try(server, options)
                self._compare(server, range(1, len(self._rows)))
                together = joined(self._rows, self._lower_precision)
                if together is not None:
                    self._try(server, together)
                    self._compare(server, [len(self._rows) - 1])
                for number, options in enumerate(shown):
                    # The last has all that is left.
                    part = 1 / (len(shown) - number)
                    self._try(server, options, max(FOR_FIRST, part), max(FOR_ONE, part))
        finally:
            server.close()
        options = picked(self._rows, self._lower_precision)
        on_gpu = facts is not None and facts.on_gpu
        seconds = time.monotonic() - began
        return Tuning(options, tuple(self._rows), tuple(self._left_out), seconds, on_gpu, self._lower_precision)

    def _compare(self, server: Server, numbers: Sequence[int]) -> None:
        """Have the trainer as it is and candidates that are about as fast take turns: the machine may be busy at times.

        Args:
            server: Starts them.
            numbers: The rows of the candidates.
        """
        now, left = self._rows[0].step_ms, self._deadline - time.monotonic()
        able = [n for n in numbers if may_be_picked(self._rows[n], self._lower_precision)]
        close = [n for n in able if now and CLOSE[0] < (self._rows[n].step_ms or 0.0) / now < CLOSE[1]]
        if now is None or not close or left < LEAST_S:
            return
        ratios = server.compare([self._rows[n].options for n in (0, *close)], left * FOR_TURNS)
        for number, ratio in zip(close, (ratios or [])[1:]):
            self._rows[number] = dataclasses.replace(self._rows[number], step_ms=now * ratio)

    def _try(self, server: Server, options: Options, first: float = FOR_FIRST, whole: float = FOR_ONE) -> None:
        """Measure a candidate, in these parts of the time left.

        Raises:
            TypeError: The trainer cannot be made again.
        """
        left = self._deadline - time.monotonic()
        if self._rows and left < LEAST_S:
            self._left_out.append(options)
            return
        steps = [row.step_ms for row in self._rows if row.step_ms is not None]
        found = server.ask(options, first * left, whole * left, min(steps, default=None))
        if "unsendable" in found:
            raise _refusal(found["unsendable"])
        self._facts = self._facts or found.get("facts")
        self._rows.append(_row(options, found, self._rows[0] if self._rows else None, self._facts))
        if self._shows:
            print(_line(self._rows[-1]), flush=True)


def _row(options: Options, found: Mapping[str, Any], now: TuningRow | None, facts: Facts | None) -> TuningRow:
    """Return the row of a candidate, from what was found of it and of the trainer as it is."""
    losses = found.get("losses", ())
    is_other = now is not None and facts is not None and differs(losses, now.losses, options, facts.draws)
    return TuningRow(
        options,
        step_ms=found.get("step_ms"),
        first_step_s=found.get("first_step_s"),
        peak_bytes=found.get("peak_bytes"),
        losses=losses,
        failure=_failure(found),
        differs=is_other,
    )


def _failure(found: Mapping[str, Any]) -> str:
    """Return why there is no step time, or an empty text if there is one."""
    if "step_ms" in found:
        return ""
    if "stopped_s" in found:
        where = "" if "first_step_s" in found else ", in its first step"
        return f"stopped after {found['stopped_s']:.0f} s{where}"
    # Of itself no candidate sends SIGKILL: the system does, where memory runs out.
    if found.get("out_of_memory") or found["exitcode"] == -9:
        return "out of memory"
    if "error" in found:
        return str(found["error"])
    ending = found["exitcode"]
    return f"ended by {signal.Signals(-ending).name}" if ending < 0 else f"ended with exit code {ending}"


def _line(row: TuningRow) -> str:
    """Return what is said of a candidate as soon as it is measured."""
    said = [] if row.step_ms is None else [f"{row.step_ms:.1f} ms a step", f"first step {row.first_step_s:.1f} s"]
    said += [] if row.peak_bytes is None or row.failure else [format_bytes(row.peak_bytes)]
    return f"{row.label:<28} {', '.join([*said, row.note] if row.note else said)}"


def _first_batches(loader: DataLoader) -> Sequence[Any]:
    """Return a few batches of one size.

    Raises:
        DataError: They would be lost to the user.
    """
    if loader.is_one_shot:
        raise DataError(
            "`tune` would take batches from an iterator, which a fit would then miss. Pass data that can be gone "
            "through again, such as a list of a few batches."
        )
    batches: list[Any] = []
    try:
        for batch in itertools.islice(loader, MOST_BATCHES):
            # The last batch of the data may be smaller, and would count as a step like the others.
            if batches and shapes(batch) != shapes(batches[0]):
                continue
            size = sum(np.asarray(one).nbytes for one in tensors_in(batch, apart=True))
            if batches and size * (len(batches) + 1) > MOST_BYTES:
                break
            batches.append(batch)
    finally:
        loader.close()
    return batches


def _refusal(error: object) -> TypeError:
    return TypeError(f"`tune` measures in processes of their own, and cannot send this one: {error}.")
