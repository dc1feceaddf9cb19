"""The report of a frontier: what a feature cache would save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._table import html_table
from tapeloop.data.batch import Features, examples_of, tensors_in
from tapeloop.data.loader import DataLoader
from tapeloop.errors import listed
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.splitting import split
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.step.atomic import Snapshot

ROUNDS = 5


@dataclass(frozen=True)
class Frontier:
    """Where in a training step the computations end that are frozen and the same for an example in each epoch.

    `Trainer.frontier` returns it. It is true if there is a frontier, and prints as a short report.

    Attributes:
        submodels: The paths of the submodels that lie wholly before it, the outermost of nested ones.
        bytes_per_example: The bytes of the features of one example; None if there is no frontier.
        examples: How many examples the data has at most; None if that is not known before the end of the data.
        share: The measured share, from 0 to 1, of the time of a step's forward and backward pass that lies before the
            frontier, without the optimizer; None if there is no frontier.
        obstacles: What stands in the way, if there is no frontier.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
        >>> found = tl.Trainer(model, tl.Freeze("base"), loss="mse").frontier((x, y))
        >>> bool(found), found.submodels, found.bytes_per_example, found.bytes
        (True, ('base',), 20, 160)
        >>> print(tl.Trainer(model, loss="mse").frontier((x, y)))
        There is no frontier: `base/kernel` trains and comes first.
    """

    submodels: tuple[str, ...] = ()
    bytes_per_example: int | None = None
    examples: int | None = None
    share: float | None = None
    obstacles: tuple[str, ...] = ()

    @property
    def bytes(self) -> int | None:
        """The bytes of the features of all examples; None if that is not known."""
        if self.bytes_per_example is None or self.examples is None:
            return None
        return self.bytes_per_example * self.examples

    def __bool__(self) -> bool:
        return self.bytes_per_example is not None

    def __str__(self) -> str:
        if not self:
            return f"There is no frontier: {'; '.join(self.obstacles)}."
        return "\n".join(f"{name}: {value}" for name, value in self._said().items())

    def _repr_html_(self) -> str:
        if not self:
            return html_table(["There is no frontier:"], [[obstacle] for obstacle in self.obstacles])
        return html_table((), list(self._said().items()))

    def _said(self) -> dict[str, str]:
        whole = "" if self.bytes is None else f", {self.bytes:,} bytes for {self.examples:,} examples"
        return {
            "Before the frontier": listed(self.submodels),
            "Features": f"{self.bytes_per_example:,} bytes an example{whole}",
            "Share of a step's forward and backward pass that they save": f"{self.share:.0%}",
        }


def frontier_of(step: CompiledStep, loader: DataLoader) -> Frontier:
    """Report the frontier of a training step on data; what the step leaves behind is put back."""
    spec, batch = next(loader.specs()), next(iter(loader))
    size = int(examples_of(batch))
    last = size if loader.smallest_batch is None else loader.smallest_batch
    examples = None if loader.batches_per_epoch is None else (loader.batches_per_epoch - 1) * size + last
    found = split(step, spec, batch, random=False)
    if not isinstance(found, Cut):
        return Frontier(examples=examples, obstacles=tuple(map(str, found)))
    return Frontier(tuple(submodel.path for submodel in found.submodels), found.bytes, examples, _share(found, batch))


def _share(cut: Cut, batch: Any) -> float:
    """Return the share of the time of a step that lies before its cut: the median of some rounds, after a warm-up."""
    after = tf.function(cut.rest, autograph=False)
    # The rest of the step updates weights, statistics and metrics.
    kept = Snapshot([cut.whole.variables[name] for name in cut.whole.written() if name in cut.whole.variables])
    tensors = tensors_in(batch, apart=True)
    features = Features(tuple(cut.compute(*tensors)))
    try:
        shares = []
        # In turns, so that a machine that becomes slower on the way slows both sides.
        for _ in range(ROUNDS + 1):  # the first traces, and does not count
            early, late = _seconds(lambda: cut.compute(*tensors)), _seconds(lambda: after(features))
            shares.append(early / (early + late))
        return statistics.median(shares[1:])
    finally:
        kept.roll_back()


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    tensors = [value for value in tf.nest.flatten(run()) if isinstance(value, tf.Tensor)]
    if tensors:
        # A device computes in the background. Fetching the smallest tensor waits for it and copies little.
        min(tensors, key=lambda value: value.shape.num_elements() or 0).numpy()
    return time.perf_counter() - began
