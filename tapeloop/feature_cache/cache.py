"""The feature cache: features of the frozen beginning of a step are computed once, and not once an epoch."""

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

from tapeloop._backend.fingerprint import fingerprint
from tapeloop._validation import whole_number
from tapeloop.data.array_source import ArraySource, SparseSource
from tapeloop.data.batch import Features
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.data.sampler import Sampler
from tapeloop.errors import CacheError
from tapeloop.feature_cache import digests
from tapeloop.feature_cache.digests import CacheKey
from tapeloop.feature_cache.fill import are_even, check_same, check_sample, computed, seen_in
from tapeloop.feature_cache.frontier import Cut, Obstacle
from tapeloop.feature_cache.splitting import split
from tapeloop.feature_cache.storage import CachedFeatures, Files, Memory, Writer
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.fit_data import FitData
from tapeloop.loop.phases import ActivePhase
from tapeloop.loop.state import Resumption
from tapeloop.step.accumulation import Microbatches

_LOG = logging.getLogger("tapeloop")


@dataclass
class _Ready:
    """The features that a step runs on.

    Attributes:
        step: The step.
        kept: The features; None if the step has no frontier.
        cut: Where it is cut.
        weights: The fingerprint of the frozen weights before the cut when the features were found.
        interventions: How often other code than that of steps had run when the weights were last looked at.
        source: What the last epoch drew features from.
    """

    step: CompiledStep
    kept: CachedFeatures | None = None
    cut: Cut | None = None
    weights: bytes = b""
    interventions: int = 0
    source: ArraySource | None = None

    def is_for(self, step: CompiledStep) -> bool:
        """Tell whether the features are a step's, and still what the weights make of the data."""
        # The step cannot move a frozen weight, but a policy or the user may set it by hand within a fit.
        now = step.planner.parts.interventions.count
        if step is not self.step or self.cut is None or now == self.interventions:
            return step is self.step
        self.interventions = now
        return fingerprint(self.cut.weights) == self.weights


class FeatureCache:
    """Gives batches of features instead of batches of data, for as long as that makes no difference.

    Features are found again if nothing of their `CacheKey` has changed; otherwise they are computed anew.
    """

    def __init__(self, memory: Memory, where: str | os.PathLike[str] | None, views: int) -> None:
        """Choose where features are kept for one fit.

        Args:
            memory: Keeps them from one fit to the next.
            where: `"memory"`, the path of a folder, or None to cache nothing.
            views: How many passes over the data are kept.

        Raises:
            TypeError: `where` is none of these.
            ValueError: `views` is no whole number of 1 or more, or more than 1 without a cache.
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
        self._is_on = where is not None
        self._store = memory if where in (None, "memory") else Files(where)
        self._digests = memory.digests
        self._ready: dict[str, _Ready] = {}
        self._train_step: CompiledStep | None = None

    @property
    def is_on(self) -> bool:
        """Whether features are kept at all."""
        return self._is_on

    def require_compatible(
        self, data: Sequence[DataSpec], microbatches: Microbatches, *, run_eagerly: bool, is_saved: bool
    ) -> None:
        """Check that the options of a fit go with a cache, if there is one.

        Args:
            data: The data of the fit.
            microbatches: The number of pieces that batches are cut in.
            run_eagerly: Whether steps run op by op.
            is_saved: Whether the run is saved, so that another process may go on.

        Raises:
            CacheError: The data can be gone through only once.
            ValueError: Another option does not go with a cache.
        """
        if not self._is_on:
            return
        if microbatches.adapts or microbatches.count > 1:
            raise ValueError(
                "`feature_cache` and `microbatches` were both asked for. Set `microbatches=1`: what is left of a step "
                "behind the cache takes little memory."
            )
        if run_eagerly:
            raise ValueError("`feature_cache` needs a graph to cut, which `run_eagerly=True` has not: leave one out.")
        if is_saved and self._views > 1 and isinstance(self._store, Memory):
            raise ValueError(
                "`feature_cache_views` draws versions of the data that are lost with the memory, and a run that goes "
                "on from `checkpoint` would draw others. Give `feature_cache` the path of a folder."
            )
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
        self, step: CompiledStep, given: DataSpec, epoch: int = 0, every_steps: int | None = None
    ) -> DataLoader:
        """Return the batches of an epoch: of features, or of the data if there are none for this step.

        Args:
            step: The step that runs on them.
            given: The data.
            epoch: The epoch's number.
            every_steps: After how many steps another may come within the epoch, or None.

        Raises:
            CacheError: Nothing can be cached, or it would be wrong, or does not fit.
        """
        if every_steps is not None:
            raise CacheError(
                f"The policy may change what trains after every {every_steps} steps, and features are those of an "
                "epoch. Let it change by epochs, or leave `feature_cache` out."
            )
        ready = self._ready.get(given.name)
        if ready is None or not ready.is_for(step):
            ready = self._ready[given.name] = self._features(step, given)
        elif ready.kept is not None:
            check_sample(given, ready.kept)
        orders = given.sampler(epoch)
        if ready.kept is None:
            return given.loader(orders)
        loader = _loader(ready.kept, given, orders, epoch)
        if isinstance(loader.source, ArraySource):
            # To describe the features in each epoch would take as long as a small step.
            if ready.source is not None:
                loader.source.key = ready.source.key
            ready.source = loader.source
        return loader

    def _features(self, step: CompiledStep, given: DataSpec) -> _Ready:
        """Find or compute the features of some data for a step, if it has a frontier."""
        batches = given.loader()
        # The signature leaves the number of examples open, so that the graph shows what mixes them.
        spec, batch = next(batches.specs()), next(iter(batches))
        batches.rewind()
        trains = step.kind == "train"
        views = self._views if trains else 1
        self._train_step = step if trains else self._train_step
        # Batch statistics that the training step moves are not frozen for an evaluation either.
        cut = split(step, spec, batch, random=views > 1, beside=None if trains else self._train_step)
        if not isinstance(cut, Cut):
            # In a later phase more may train than in the first: the fit goes on without the cache.
            said = _nothing(step, given, cut)
            if not self._ready:
                raise CacheError(said)
            _LOG.warning("%s The cache is dropped.", said)
            return _Ready(step)
        if given.is_arrays:
            self._check_room(cut, given, int(tf.nest.flatten(given.data)[0].shape[0]), views)
        # The first pass tells whether there are features of this data; the second computes them.
        seen, sizes = ([], []) if given.is_arrays else seen_in(batches)
        weights, digest = self._digests.of_weights(cut)
        data = self._digests.of_data(given.name, given.data) if given.is_arrays else _of_seen(seen, sizes)
        key = _key(cut, given, data, digest, views)
        # A name for each data set, so that folds of a cross-validation do not take each other's place.
        name = f"{given.name}-{key.computation[:12]}-{key.data[:12]}"
        kept = self._store.find(name)
        if kept is not None:
            in_order = kept.shuffled or list(kept.examples) == seen
            differences = key.differences(kept.key) or ([] if in_order else ["the order of the data"])
            if not differences:
                return _Ready(step, kept, cut, weights, step.planner.parts.interventions.count)
            said = f"The feature cache of `{given.name}` is out of date ({', '.join(differences)} changed)"
            _LOG.warning("%s: it is computed anew.", said)
        with self._store.writing(name) as writer:
            kept = self._compute(cut, given, batches, seen, key, writer)
        return _Ready(step, kept, cut, weights, step.planner.parts.interventions.count)

    def _compute(
        self, cut: Cut, given: DataSpec, batches: DataLoader, seen: list[str], key: CacheKey, writer: Writer
    ) -> CachedFeatures:
        """Compute the features of some data, and keep them if the data is the same in each pass."""
        shapes, shuffled = list[tuple[int, ...]](), False
        # Before the first epoch trains, so that features are there wholly or not at all. This costs less than the
        # epoch that it saves.
        for _ in range(key.views):
            sizes, again = list[int](), list[str]()
            for batch, examples, rows in computed(cut, batches):
                shapes = shapes or [row.shape[1:] for row in rows]
                if [row.shape[1:] for row in rows] != shapes or {len(row) for row in rows} != {examples}:
                    raise CacheError(
                        f"The features of {examples} examples of `{given.name}` have the shapes "
                        f"{[row.shape for row in rows]}, and need one row for each, of the shapes {shapes}. Pad the "
                        "examples to one length and keep them all, or leave `feature_cache` out."
                    )
                writer.add(rows)
                sizes.append(examples)
                if not given.is_arrays:
                    again += digests.of_examples(batch)
                    self._check_room(cut, given, sum(sizes), key.views)
            batches.rewind()
            check_same(given, seen, again, sizes)
            shuffled = shuffled or again != seen
        return writer.finish(key, sizes, again, shuffled)

    def _check_room(self, cut: Cut, given: DataSpec, examples: int, views: int) -> None:
        features, times = examples * views * cut.bytes, f", {views} times" if views > 1 else ""
        room, said = self._store.room()
        if features > room:
            raise CacheError(
                f"The features of {examples:,} examples of `{given.name}`, {cut.bytes:,} bytes each{times}, come to "
                f"{features:,} bytes, and {said}"
            )


class CachedData(FitData):
    """The data of a fit as features; the data itself while a phase has no frozen part that comes first."""

    def __init__(self, cache: FeatureCache, *data: Any) -> None:
        """Keep the cache, and what `FitData` takes."""
        super().__init__(*data)
        self._cache = cache
        self._saved = self.resumption

    def training(self, phase: ActivePhase, epoch: int) -> DataLoader:
        """Return what an epoch of a phase trains on."""
        self.current = self._cache.batches(phase.step, self.spec, epoch, phase.every_steps)
        # Features are read from their start in each epoch: only an epoch that was saved under way begins within them.
        saved, self._saved = self._saved, None
        if saved is not None and saved.progress is not None and saved.progress.drawn:
            self.current.seek(saved.positions["data"])
        return self.current

    def _seek(self, resumption: Resumption) -> None:
        """Leave the data as it is, which is read for its features as a whole."""

    def validation(self, step: CompiledStep) -> DataLoader:
        """Return what an epoch is validated on."""
        assert self.validation_spec is not None
        return self._cache.batches(step, self.validation_spec)


def _loader(kept: CachedFeatures, given: DataSpec, orders: Sampler, epoch: int) -> DataLoader:
    """Return batches of features in the order in which those of the data would come."""
    tensors = kept.in_pass(epoch)
    size = given.examples_per_batch
    if given.is_sparse:  # which `tf.data` shuffles
        return DataLoader(SparseSource(Features(tensors), size, orders), None, given.name)
    if not given.is_arrays:
        # Keras shuffles the batches of a `PyDataset`, not its examples. Batches of uneven sizes cannot be cut anew.
        if given.shuffles_batches or not are_even(kept.sizes):
            starts = np.cumsum([0, *kept.sizes])
            numbers = orders.next_order(len(kept.sizes)) if given.shuffles_batches else range(len(kept.sizes))
            apart = [Features(tuple(part[starts[n] : starts[n + 1]] for part in tensors)) for n in numbers]
            return DataSpec(given.name, apart).loader()
        # Data that comes in another order each time is shuffled by the seed, as its own order cannot be known before.
        size, orders = kept.sizes[0], Sampler(kept.shuffled, given.seed, epoch)
    return DataSpec(given.name, Features(tensors), size).loader(orders)


def _nothing(step: CompiledStep, given: DataSpec, obstacles: list[Obstacle]) -> str:
    said = "; ".join(map(str, obstacles))
    # An evaluation draws nothing, so views would be of no help to it.
    random = any("random" in obstacle.why for obstacle in obstacles)
    more = " `feature_cache_views=n` caches n passes of it, drawn once each." if random and step.kind == "train" else ""
    return f"Of the {step.kind} step on `{given.name}` nothing can be cached: {said}.{more}"


def _of_seen(seen: Sequence[str], sizes: Sequence[int]) -> str:
    """Return the digest of data, given those of its examples."""
    # Sorted, since data that shuffles itself comes in another order in each fit.
    return digests.of_texts([*sorted(seen), str(sizes)])


def _key(cut: Cut, given: DataSpec, data: str, weights: str, views: int) -> CacheKey:
    """Return what features depend on.

    Args:
        cut: Where the step is cut.
        given: The data.
        data: Its digest.
        weights: The digest of the weights before the cut.
        views: How many passes over the data are kept.
    """
    precise = tf.config.experimental.tensor_float_32_execution_enabled()
    device = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    versions = f"tensorflow {tf.__version__}, keras {keras.__version__}, {device}, TF32 {precise}"
    classes = repr(given.class_weight and sorted(given.class_weight.items()))
    return CacheKey(data, cut.computation, weights, versions, classes, views)
