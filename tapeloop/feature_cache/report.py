"""What a feature cache would save: the report of a frontier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop.data.batch import Features, examples_of
from tapeloop.data.loader import DataLoader
from tapeloop.errors import listed
from tapeloop.feature_cache.batch_independence import flat
from tapeloop.feature_cache.fill import open_spec
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.splitting import split
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.step.snapshot import Snapshot

ROUNDS = 5


@dataclass(frozen=True)
class Frontier:
    """Where in a training step what is frozen comes to its end.

    Attributes:
        submodels: The paths of the submodels that lie wholly before it, of nested ones the outermost.
        bytes_per_example: The bytes of the features of an example; None where there is no frontier.
        examples: How many examples the data has, at most; None where nobody can say.
        share: The share of a step's work that lies before it, measured: of the forward and the backward pass, without
            the optimizer. None where there is no frontier.
        obstacles: Where there is none, what stands in the way.
    """

    submodels: tuple[str, ...] = ()
    bytes_per_example: int | None = None
    examples: int | None = None
    share: float | None = None
    obstacles: tuple[str, ...] = ()

    @property
    def bytes(self) -> int | None:
        """The bytes of the features of all examples."""
        return None if None in (self.bytes_per_example, self.examples) else self.bytes_per_example * self.examples  # type: ignore[operator]

    def __bool__(self) -> bool:
        return self.bytes_per_example is not None

    def __str__(self) -> str:
        if self.bytes_per_example is None or self.share is None:
            return f"There is no frontier: {'; '.join(self.obstacles)}."
        whole = "" if self.bytes is None else f", {self.bytes:,} bytes for {self.examples:,} examples"
        return (
            f"Before the frontier: {listed(self.submodels)}\n"
            f"Features: {self.bytes_per_example:,} bytes an example{whole}\n"
            f"Share of a step's forward and backward pass that they save: {self.share:.0%}"
        )


def frontier_of(step: CompiledStep, loader: DataLoader) -> Frontier:
    """Report the frontier of a training step on data; what the step leaves behind is put back."""
    spec, batch = open_spec(loader), next(loader.drawn())
    size = int(examples_of(batch))
    last = size if loader.fewest is None else loader.fewest
    examples = None if loader.per_epoch is None else (loader.per_epoch - 1) * size + last
    found = split(step, spec, batch, random=False)
    if not isinstance(found, Cut):
        return Frontier(examples=examples, obstacles=tuple(map(str, found)))
    paths = tuple(submodel.path for submodel in found.submodels)
    return Frontier(paths, found.bytes, examples, _share(found, batch))


def _share(cut: Cut, batch: Any) -> float:
    """Return the share of the time of a step that lies before its cut: the median of some rounds, after a warm-up."""
    after = tf.function(cut.rest, autograph=False)
    kept = Snapshot([cut.whole.variables[name] for name in cut.whole.written() if name in cut.whole.variables])
    tensors = flat(batch)
    features = Features(tuple(cut.compute(*tensors)))
    try:
        shares = []
        for _ in range(ROUNDS + 1):
            early, late = _seconds(lambda: cut.compute(*tensors)), _seconds(lambda: after(features))
            shares.append(early / (early + late))
        return statistics.median(shares[1:])
    finally:
        kept.roll_back()


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    tensors = [value for value in tf.nest.flatten(run()) if isinstance(value, tf.Tensor)]
    if tensors:
        min(tensors, key=lambda value: value.shape.num_elements() or 0).numpy()  # for which a device must be done
    return time.perf_counter() - began
