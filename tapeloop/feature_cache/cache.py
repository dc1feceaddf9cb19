"""The feature cache: what is frozen and comes first is computed once for each example, and not once an epoch."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapeloop._validation import whole_number
from tapeloop.data.array_source import SparseSource
from tapeloop.data.batch import Features
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.data.sampler import Sampler
from tapeloop.errors import CacheError
from tapeloop.feature_cache import fingerprint
from tapeloop.feature_cache.fill import are_even, check_same, check_sample, computed, open_spec, seen_in
from tapeloop.feature_cache.frontier import Cut
from tapeloop.feature_cache.obstacles import Obstacle
from tapeloop.feature_cache.splitting import moves_of, split
from tapeloop.feature_cache.storage import FORMAT, CachedFeatures, Files, Memory, Writer, changed
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.optimization.microbatches import Microbatches

_LOG = logging.getLogger("tapeloop")


@dataclass(frozen=True)
class _Ready:
    """The features that a step runs on.

    Attributes:
        step: The step.
        kept: The features; None where it has no frontier.
        cut: Where it is cut.
        checksum: That of the frozen weights before the cut, when they were computed.
    """

    step: CompiledStep
    kept: CachedFeatures | None
    cut: Cut | None
    checksum: tuple[int, ...] | None

    def holds(self, step: CompiledStep) -> bool:
        """Tell whether they are a step's, and still what the weights make of the data."""
        return step is self.step and (self.cut is None or self.cut.checksum() == self.checksum)


class FeatureCache:
    """Batches of features in the stead of batches of data, for as long as that makes no difference.

    Features belong to the computation before the cut, the values of the weights that it takes, the data, and the
    versions of the libraries. What differs in one of them is computed anew.
    """

    def __init__(self, memory: Memory, where: str | os.PathLike[str] | None, views: int) -> None:
        """Choose where features are kept for one fit.

        Args:
            memory: Keeps them from one fit to the next.
            where: `"memory"`, the path of a folder, or None where nothing is cached.
            views: How many passes over the data are kept.

        Raises:
            TypeError: `where` is none of these.
            ValueError: `views` is no whole number of 1 or more, or there is no cache that could have several.
        """
        self._views = whole_number("feature_cache_views", views, 1)
        if where is not None and (not isinstance(where, (str, os.PathLike)) or where == ""):
            raise TypeError(f'`feature_cache` must be None, "memory" or a path. Received: {where!r}.')
        if where not in (None, "memory") and pathlib.Path(where).expanduser().is_file():
            raise ValueError(f"`feature_cache` must be the path of a folder, and {where} is a file.")
        if where is None and views > 1:
            raise ValueError(
                f"`feature_cache_views` is {views}, and there is no cache: pass `feature_cache='memory'` or a path."
            )
        self._store = None if where is None else memory if where == "memory" else Files(where)
        self._ready: dict[str, _Ready] = {}
        self._moving: frozenset[int] = frozenset()

    def check(self, data: Sequence[DataSpec], microbatches: Microbatches, run_eagerly: bool) -> None:
        """Check that a fit is such that it can be cached, if it is to be.

        Raises:
            CacheError: Its data can be gone through once alone.
            ValueError: Another of its options does not go with a cache.
        """
        if self._store is None:
            return
        if microbatches.adapts or microbatches.count > 1:
            raise ValueError(
                "`feature_cache` and `microbatches` were both asked for. Set `microbatches=1`: what is left of a step "
                "behind the cache takes little memory."
            )
        if run_eagerly:
            raise ValueError("`feature_cache` needs a graph to cut, which `run_eagerly=True` has not: leave one out.")
        for given in data:
            if isinstance(given.data, Iterator):
                raise CacheError(
                    f"`{given.name}` is an iterator, which can be gone through once alone. Pass something that can be "
                    "gone through again, such as a list or a dataset, or leave `feature_cache` out."
                )
            if given.steps[1] is not None:
                raise ValueError(
                    f"`feature_cache` goes through the whole of `{given.name}`: leave `{given.steps[0]}` out."
                )

    def batches(
        self, step: CompiledStep, given: DataSpec, plain: DataLoader, epoch: int = 0, every_steps: int | None = None
    ) -> DataLoader:
        """Return the batches of an epoch: of features, or of the data where there are none for this step.

        Args:
            step: What runs on them.
            given: The data.
            plain: Batches of it, which are returned where nothing is cached.
            epoch: The epoch's number.
            every_steps: After how many steps another may come within the epoch, or None.

        Raises:
            CacheError: Nothing can be cached, or it would be wrong, or does not fit.
        """
        if self._store is None:
            return plain
        if every_steps is not None:
            raise CacheError(
                f"The policy may change what trains after every {every_steps} steps, and features are those of an "
                "epoch. Let it change by epochs, or leave `feature_cache` out."
            )
        ready = self._ready.get(given.name)
        is_fresh = ready is None or not ready.holds(step)
        if ready is None or is_fresh:
            kept, cut = self._features(step, given)
            ready = self._ready[given.name] = _Ready(step, kept, cut, None if cut is None else cut.checksum())
        kept, orders = ready.kept, given.sampler(epoch)
        if kept is None:
            return given.loader(orders)
        if not is_fresh:
            check_sample(given, kept)
        tensors = kept.passed(epoch)
        if given.is_sparse:  # which `tf.data` shuffles
            source = SparseSource(Features(tensors), given.batch_size, orders)
            return DataLoader(source, None, given.name)
        if given.is_arrays:
            return DataSpec(given.name, Features(tensors), given.batch_size).loader(orders)
        if given.shuffles_batches or not are_even(kept.sizes):
            starts = np.cumsum([0, *kept.sizes])
            numbers = orders.next_order(len(kept.sizes)) if given.shuffles_batches else range(len(kept.sizes))
            apart = [Features(tuple(part[starts[n] : starts[n + 1]] for part in tensors)) for n in numbers]
            return DataSpec(given.name, apart).loader()
        again = Sampler(kept.shuffled, given.seed, epoch)
        return DataSpec(given.name, Features(tensors), kept.sizes[0]).loader(again)

    def _features(self, step: CompiledStep, given: DataSpec) -> tuple[CachedFeatures | None, Cut | None]:
        """Find or compute the features of some data for a step, and its cut; neither where it has no frontier."""
        assert self._store is not None
        batches = given.loader()
        spec = open_spec(batches)
        batch = next(iter(batches))
        batches.rewind()
        trains = step.kind == "train"
        views = self._views if trains else 1
        cut = split(step, spec, batch, random=views > 1, moving=frozenset() if trains else self._moving)
        if trains:
            self._moving = moves_of(step)
        if not isinstance(cut, Cut):
            said = _nothing(step, given, cut)
            if not self._ready:  # the fit begins, and the cache is of no use
                raise CacheError(said)
            _LOG.warning("%s The cache is dropped.", said)
            return None, None
        if given.is_arrays:
            examples = sum(int(part.shape[0]) for part in tf.nest.flatten(given.data)[:1])
            self._store.check(examples * views * cut.bytes, self._said(given, examples, views, cut))
        weights = repr(given.class_weight and sorted(given.class_weight.items()))
        ingredients = {**_ingredients(cut), "views": str(views), "class_weight": weights, "format": FORMAT}
        seen, sizes = ([], []) if given.is_arrays else seen_in(batches)
        data = (
            fingerprint.of_arrays(given.data) if given.is_arrays else fingerprint.of_texts([*sorted(seen), str(sizes)])
        )
        ingredients["data"] = data
        # A name for each data set, so that folds of a cross-validation do not take each other's place.
        name = f"{given.name}-{ingredients['computation'][:12]}-{data[:12]}"
        found = self._store.find(name)
        if found is not None:
            differ = list(changed(found[0], ingredients))
            if not differ and (given.is_arrays or found[1].shuffled or list(found[1].examples) == seen):
                return found[1], cut
            _LOG.warning(
                "The feature cache of `%s` is out of date (%s changed): it is computed anew.",
                given.name, ", ".join(differ) or "the order of the data",
            )  # fmt: skip
        writer = self._store.write(name)
        try:
            return self._compute(cut, given, batches, views, seen, writer, ingredients), cut
        except BaseException:
            writer.abandon()
            raise

    def _compute(
        self,
        cut: Cut,
        given: DataSpec,
        batches: DataLoader,
        views: int,
        seen: list[str],
        writer: Writer,
        ingredients: Any,
    ) -> CachedFeatures:
        """Compute the features of some data, and keep them if the data is the same as when it was seen before."""
        assert self._store is not None
        shapes: list[tuple[int, ...]] = []
        sizes: list[int] = []
        again: list[str] = []
        for view in range(views):
            for batch, examples, rows in computed(cut, batches):
                shapes = shapes or [row.shape[1:] for row in rows]
                if [row.shape[1:] for row in rows] != shapes or {len(row) for row in rows} != {examples}:
                    raise CacheError(
                        f"The features of {examples} examples of `{given.name}` have the shapes "
                        f"{[row.shape for row in rows]}, and need one row for each, of the shapes {shapes}. Pad the "
                        "examples to one length and keep them all, or leave `feature_cache` out."
                    )
                writer.add(rows)
                if view == 0:
                    sizes.append(len(rows[0]))
                if view == 0 and not given.is_arrays:
                    again += fingerprint.of_examples(batch)
                    self._store.check(sum(sizes) * views * cut.bytes, self._said(given, sum(sizes), views, cut))
            batches.rewind()
        check_same(given, seen, again, sizes)
        return writer.finish(ingredients, sizes, again, again != seen)

    def _said(self, given: DataSpec, examples: int, views: int, cut: Cut) -> str:
        times = f", {views} times" if views > 1 else ""
        return f"The features of {examples:,} examples of `{given.name}`, {cut.bytes:,} bytes each{times},"


def _nothing(step: CompiledStep, given: DataSpec, obstacles: list[Obstacle]) -> str:
    said = "; ".join(map(str, obstacles))
    random = any("random" in obstacle.why for obstacle in obstacles)
    more = " `feature_cache_views=n` caches n passes of it, drawn once each." if random and step.kind == "train" else ""
    return f"Of the {step.kind} step on `{given.name}` nothing can be cached: {said}.{more}"


def _ingredients(cut: Cut) -> dict[str, str]:
    """Return the digests of all that goes into features beside the data."""
    labels = {feed.name: f"input {number}" for number, feed in enumerate(cut.whole.batch)}
    labels |= {name: f"weight {number}" for number, name in enumerate(cut.before.captures)}
    captured = [name for name in cut.before.captures if name not in cut.drawn]
    weights = [cut.whole.variables.get(name, cut.whole.captures[name]) for name in captured]
    precise = tf.config.experimental.tensor_float_32_execution_enabled()
    device = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return {
        "computation": fingerprint.of_texts([cut.before.described(labels)]),
        "weights": fingerprint.of_texts(map(fingerprint.of_arrays, weights)),
        "versions": f"tensorflow {tf.__version__}, keras {keras.__version__}, {device}, TF32 {precise}",
    }
