"""The data of a fit, epoch by epoch."""

from __future__ import annotations

from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.phases import ActivePhase


class FitData:
    """The data of a fit as the user gave it. A feature cache gives features of it instead.

    Attributes:
        spec: The data to train on.
        validation_spec: The data to validate on, or None.
        loader: Batches of the data to train on.
    """

    def __init__(self, spec: DataSpec, validation_spec: DataSpec | None, epoch: int, epochs: int) -> None:
        """Make loaders of the data.

        Args:
            spec: The data to train on.
            validation_spec: The data to validate on, or None.
            epoch: The number of epochs trained before.
            epochs: The number of epochs to come.

        Raises:
            DataError: The data is empty, of no known kind, or does not last for so many epochs.
        """
        self.spec = spec
        self.validation_spec = validation_spec
        self.loader = spec.loader(spec.sampler(epoch))
        self._validation = None if validation_spec is None else validation_spec.loader()
        if self._validation is not None:
            self._validation.require_epochs(epochs)
            # Raises if there is no batch, which would otherwise be found after the first epoch.
            self._validation.cursor()
        self.loader.require_epochs(epochs)

    def training(self, phase: ActivePhase, epoch: int) -> DataLoader:
        """Return what an epoch of a phase trains on."""
        return self.loader

    def validation(self, step: CompiledStep) -> DataLoader:
        """Return what an epoch is validated on."""
        assert self._validation is not None
        return self._validation
