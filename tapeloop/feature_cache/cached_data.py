"""The data of a fit, of which what is frozen and comes first is computed once."""

from __future__ import annotations

from typing import Any

from tapeloop.data.loader import DataLoader
from tapeloop.feature_cache.cache import FeatureCache
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.fit_data import FitData
from tapeloop.loop.phases import ActivePhase


class CachedData(FitData):
    """Features of the data of a fit; the data itself while a phase has no frozen part that comes first."""

    def __init__(self, cache: FeatureCache, *data: Any) -> None:
        """Keep the cache, and what `FitData` takes."""
        super().__init__(*data)
        self._cache = cache

    def training(self, phase: ActivePhase, epoch: int) -> DataLoader:
        """Return what an epoch of a phase trains on."""
        return self._cache.batches(phase.step, self.spec, epoch, phase.every_steps)

    def validation(self, step: CompiledStep) -> DataLoader:
        """Return what an epoch is validated on."""
        assert self.validation_spec is not None
        return self._cache.batches(step, self.validation_spec)
