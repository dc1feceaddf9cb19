"""What tuning has found: a row for each candidate, and the options to paste."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tapeloop._table import Table, format_bytes, table

LEAST_GAIN = 0.03  # of a step's time: less may be noise, and is not worth an option
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class TuningRow:
    """What one candidate came to.

    Attributes:
        options: The options in which it differs from the trainer; none for the trainer as it is.
        step_ms: Milliseconds of a step, beside what the start of a fit takes; None if that could not be measured.
        first_step_s: Seconds from making the trainer to the end of its first step, which is traced and compiled.
        peak_bytes: The most memory: on a GPU, that of its allocator; on a CPU, by how much the process grew from
            before the first step on, compilation included. None if nobody counts it.
        losses: The loss of the first step, and the mean loss of the two after it.
        failure: Why it was not measured, such as `"out of memory"`; empty if it was.
        differs: Whether its losses are other than those of the trainer as it is, by more than rounding.

    Example:
        >>> row = tl.TuningRow({"jit_compile": True}, step_ms=8.0, first_step_s=2.0)
        >>> row.label, row.note
        ('jit_compile=True', '')
        >>> tl.TuningRow({}, failure="out of memory").note
        'out of memory'
    """

    options: Mapping[str, Any]
    step_ms: float | None = None
    first_step_s: float | None = None
    peak_bytes: int | None = None
    losses: tuple[float, ...] = ()
    failure: str = ""
    differs: bool = False

    @property
    def label(self) -> str:
        """The options as they are written in Python."""
        return written(self.options) or AS_IT_IS

    @property
    def note(self) -> str:
        """Why it was not measured, or that it computes something else."""
        if self.failure or self.differs:
            return self.failure or "other losses"
        return "lower precision" if self.lowers_precision else ""

    @property
    def lowers_precision(self) -> bool:
        """Whether it computes in fewer digits than the trainer does."""
        return self.options.get("frozen_dtype") is not None


@dataclass(frozen=True, repr=False)
class Tuning:
    """What `tune` has found. It prints as a table, with the options to paste below it.

    Attributes:
        options: The options to make the trainer with, in which the fastest candidate differs from the trainer as it is;
            none if no other is faster by 3 %.
        rows: The candidates, the trainer as it is first.
        left_out: The candidates for which no time was left.
        seconds: How long it took.
        on_gpu: Whether it was measured on a GPU.
        lower_precision: Whether `options` may lower the precision.

    Example:
        >>> rows = (tl.TuningRow({}, 10.0, 1.5, 2**20), tl.TuningRow({"jit_compile": True}, 7.0, 2.5, 2**21))
        >>> tl.Tuning({"jit_compile": True}, rows)
        options           step ms  / now  first step s  peak above model
        ----------------------------------------------------------------
        as it is             10.0   1.00           1.5           1.0 MiB
        jit_compile=True      7.0   0.70           2.5           2.0 MiB
        ----------------------------------------------------------------
        fastest          Trainer(..., jit_compile=True)
    """

    options: dict[str, Any]
    rows: tuple[TuningRow, ...]
    left_out: tuple[Mapping[str, Any], ...] = ()
    seconds: float = field(default=0.0, compare=False)
    on_gpu: bool = False
    lower_precision: bool = False

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html

    def _table(self) -> Table:
        notes = any(row.note for row in self.rows)
        header = ("options", "step ms", "/ now", "first step s", "peak memory" if self.on_gpu else "peak above model")
        cells = [(*self._cells(row), *([row.note] if notes else [])) for row in self.rows]
        return table((*header, *(["note"] if notes else [])), cells, header[1:], self._said())

    def _cells(self, row: TuningRow) -> tuple[str, ...]:
        now = self.rows[0].step_ms
        return (
            row.label,
            _number(row.step_ms, ".1f" if (row.step_ms or 0) < 100 else ".0f"),
            _number(row.step_ms and now and row.step_ms / now, ".2f"),
            _number(row.first_step_s, ".1f"),
            "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        )

    def _said(self) -> list[tuple[str, str]]:
        """Return what stands below the table."""
        said = [("fastest", self._fastest())]
        now = next((row for row in self.rows if row.options == self.options), self.rows[0])
        if not self.lower_precision and now.step_ms is not None:
            lower = [row for row in self.rows if row.note == "lower precision"]
            for row in lower:
                if (row.step_ms or 0) < (1 - LEAST_GAIN) * now.step_ms:
                    said.append(("faster still", f"{row.label}, in lower precision: `lower_precision=True` counts it"))
        if self.left_out:
            said.append(("no time left for", "; ".join(map(written, self.left_out))))
        return said

    def _fastest(self) -> str:
        measured = [row for row in self.rows if row.step_ms is not None]
        if not measured:
            return "not known: no candidate could be measured"
        if self.options:
            return f"Trainer(..., {written(self.options)})"
        if len(measured) == 1:
            return "the trainer as it is, the only one that could be measured"
        return "the trainer as it is"


def written(options: Mapping[str, Any]) -> str:
    """Return options as they are written in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
