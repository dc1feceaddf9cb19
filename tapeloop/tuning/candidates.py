"""Which options are tried on a trainer, in which order, and which are picked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tapeloop.loop.epochs import EpochLoop
from tapeloop.model.selection import Selection
from tapeloop.model.tree import SubmodelInfo, Tree
from tapeloop.step.remat import Remat
from tapeloop.tuning.report import LEAST_GAIN, TuningRow

OPTIONS = "jit_compile", "fold_frozen", "steps_per_call", "frozen_dtype", "remat"
FEWEST_BLOCKS = 3  # of one class, to be blocks of a network and not parts that happen to be alike
# Losses of candidates that compute the same differ by rounding, which grows with each update. In bfloat16 there is more
# of it, and where the model draws at random, XLA draws other numbers.
TOLERANCES, HALF_TOLERANCE, DRAWN_TOLERANCE = (1e-3, 1e-2), 0.1, 0.2

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known of a trainer that was made again, before its first step.

    Attributes:
        on_gpu: Whether it trains on a GPU.
        uses_xla: Whether XLA compiles its steps.
        folds: Whether the frozen part of a long fit is folded.
        steps_per_call: The option.
        frozen_dtype: The option.
        remats: Whether anything is computed twice.
        is_frozen: Whether anything is frozen.
        can_lower: Whether a submodel that computes in float32 is frozen as a whole.
        blocks: What names the blocks that may be computed twice; empty if there are none.
        draws: Whether it draws at random.
    """

    on_gpu: bool
    uses_xla: bool
    folds: bool
    steps_per_call: int | str
    frozen_dtype: str | None
    remats: bool
    is_frozen: bool
    can_lower: bool
    blocks: str | tuple[str, ...]
    draws: bool


def facts_of(loop: EpochLoop, selection: Selection) -> Facts:
    """Return the facts of a trainer.

    Args:
        loop: Its loop.
        selection: What trains.
    """
    parts, tree = loop.steps.parts, selection.tree
    whole = [submodel.object for submodel in selection.idle if tree.variables_in[submodel]]
    return Facts(
        on_gpu=bool(tf.config.list_logical_devices("GPU")),
        uses_xla=parts.compilation.uses_xla,
        folds=bool(loop.steps.folding.mode) and bool(selection.still),
        steps_per_call=parts.compilation.steps_per_call,
        frozen_dtype=parts.frozen_dtype.name,
        remats=bool(parts.remat.chosen(tree)),
        is_frozen=bool(selection.still),
        can_lower=any(getattr(getattr(one, "dtype_policy", None), "name", "") == "float32" for one in whole),
        blocks=_blocks(tree),
        draws=any(variable.seed for variable in tree.variables),
    )


def candidates(facts: Facts, asked: Collection[str], lower_precision: bool) -> tuple[list[Options], list[Options]]:
    """Return the options that are tried for speed, those of the likeliest gain first, and those that are only shown.

    Args:
        facts: What is known of the trainer.
        asked: The names of the options to try.
        lower_precision: Whether those that lower the precision are tried for speed.
    """
    other: dict[str, Options | None] = {
        "jit_compile": {"jit_compile": not facts.uses_xla},
        "fold_frozen": {"fold_frozen": not facts.folds} if facts.is_frozen else None,
        "steps_per_call": {"steps_per_call": 1 if facts.steps_per_call == "auto" else "auto"},
        "frozen_dtype": {"frozen_dtype": "bfloat16"} if facts.can_lower else None,
        "remat": {"remat": facts.blocks} if facts.blocks else None,
    }
    if facts.frozen_dtype is not None:
        other["frozen_dtype"] = {"frozen_dtype": None}
    if facts.remats:
        other["remat"] = {"remat": None}
    for_speed = ["jit_compile", "fold_frozen"]
    # One step a call gains nothing over as many as a fifth of a second holds: it shows what these gain.
    if facts.steps_per_call != "auto":
        for_speed.append("steps_per_call")
    # A step in full precision is always a fair candidate.
    if lower_precision or facts.frozen_dtype is not None:
        for_speed.append("frozen_dtype")
    tried = [name for name in (*for_speed, *OPTIONS) if name in asked]
    ordered = {name: options for name in tried if (options := other[name]) is not None}
    return [ordered[name] for name in ordered if name in for_speed], [
        ordered[name] for name in ordered if name not in for_speed
    ]


def joined(rows: Sequence[TuningRow], lower_precision: bool) -> Options | None:
    """Return the options of all candidates that are faster, to be tried together; None if there are fewer than two."""
    faster = [row for row in rows[1:] if may_be_picked(row, lower_precision) and _gains(row, rows[0])]
    return {name: value for row in faster for name, value in row.options.items()} if len(faster) > 1 else None


def picked(rows: Sequence[TuningRow], lower_precision: bool) -> dict[str, Any]:
    """Return the options of the fastest candidate; none, if it is not faster than the trainer as it is.

    What saves memory for time is picked only where nothing else could be measured.

    Args:
        rows: The candidates, the trainer as it is first.
        lower_precision: Whether it may lower the precision.
    """
    able = [row for row in rows if may_be_picked(row, lower_precision)]
    able = able or [row for row in rows if row.step_ms is not None and not row.differs and not row.lowers_precision]
    if not able:
        return {}
    best = min(able, key=lambda row: row.step_ms or 0.0)
    return dict(best.options) if rows[0].step_ms is None or _gains(best, rows[0]) else {}


def may_be_picked(row: TuningRow, lower_precision: bool) -> bool:
    """Tell whether a candidate was measured, computes the same, and saves no memory for time.

    Args:
        row: The candidate.
        lower_precision: Whether it may lower the precision.
    """
    is_fair = row.step_ms is not None and not row.differs
    return (
        is_fair
        and "remat" not in row.options
        and row.options.get("steps_per_call") != 1
        and (lower_precision or not row.lowers_precision)
    )


def differs(losses: Sequence[float], of_now: Sequence[float], options: Options, draws: bool) -> bool:
    """Tell whether losses are other than those of the trainer as it is, by more than rounding.

    Args:
        losses: The losses.
        of_now: Those of the trainer as it is.
        options: The options of the candidate.
        draws: Whether the model draws at random.
    """
    tolerances = [DRAWN_TOLERANCE] * 2 if draws else [HALF_TOLERANCE] * 2 if "frozen_dtype" in options else TOLERANCES
    return any(not abs(a - b) <= t * max(abs(b), 1e-3) for a, b, t in zip(losses, of_now, tolerances))


def _gains(row: TuningRow, now: TuningRow) -> bool:
    return now.step_ms is None or (row.step_ms or 0.0) <= (1 - LEAST_GAIN) * now.step_ms


def _blocks(tree: Tree) -> str | tuple[str, ...]:
    """Return what names the blocks of a model: the layers of one class that hold layers, and most of the weights."""
    by_class: dict[type, list[SubmodelInfo]] = defaultdict(list)
    for layer in tree.layers:
        if layer.path and any(isinstance(child.object, keras.Layer) for child in tree.children[layer]):
            by_class[type(layer.object)].append(layer)
    blocks = [some for some in by_class.values() if len(some) >= FEWEST_BLOCKS]
    if not blocks:
        return ()
    largest = max(blocks, key=lambda some: sum(v.size for v in {v for one in some for v in tree.variables_in[one]}))
    found = Remat([one.object for one in largest]).chosen(tree)
    pattern = re.sub(r"\d+", "*", found[0].path)
    names_all = all(re.sub(r"\d+", "*", one.path) == pattern for one in found)
    if names_all and set(Remat(pattern).chosen(tree)) == set(found):
        return pattern
    return tuple(one.path for one in found)
