"""The data of a fit, epoch by epoch, and when it is validated."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

from tapeloop._validation import whole_number
from tapeloop.data.array_source import ArraySource, SparseSource
from tapeloop.data.loader import DataLoader, DataSpec
from tapeloop.loop.compiled_step import CompiledStep
from tapeloop.loop.phases import ActivePhase
from tapeloop.loop.state import Resumption

_LOG = logging.getLogger("tapeloop")
VALUES = "own", "ema"


@dataclass(frozen=True)
class Validation:
    """When the epochs of a fit are validated, and with which values.

    Attributes:
        freq: After every this many epochs, or after these epochs, of which the first is 1.
        values: `"own"`: those of the variables; `"ema"`: their averages.
    """

    freq: int | Collection[int] = 1
    values: str = "own"

    def __post_init__(self) -> None:
        for number in self.freq if isinstance(self.freq, Collection) else (self.freq,):
            whole_number("validation_freq", number, 1)
        if isinstance(self.freq, Collection) and not self.freq:
            raise ValueError("`validation_freq` is empty: name an epoch, the first of which is 1, or leave it out.")
        if self.values not in VALUES:
            raise ValueError(f"`validate_with` must be 'own' or 'ema'. Received: {self.values!r}.")

    def is_due(self, epoch: int) -> bool:
        """Tell whether an epoch of the fit is validated, of which the first is 0."""
        return (epoch + 1) in self.freq if isinstance(self.freq, Collection) else (epoch + 1) % self.freq == 0


class FitData:
    """The data of a fit as the user gave it. A feature cache gives features of it instead.

    Attributes:
        spec: The data to train on.
        validation_spec: The data to validate on, or None.
        first_epoch: The epoch at which the fit begins or, if it was saved, began.
        loader: Batches of the data to train on.
        current: What the epoch that is under way trains on.
        resumption: Where the fit goes on, if it was saved before, over the same data.
    """

    def __init__(
        self, spec: DataSpec, validation_spec: DataSpec | None, epochs: range, resumption: Resumption | None = None
    ) -> None:
        """Make loaders of the data.

        Args:
            spec: The data to train on.
            validation_spec: The data to validate on, or None.
            epochs: The epochs of the fit, those included that are trained already.
            resumption: Where the fit goes on, if it was saved before.

        Raises:
            DataError: The data is empty, of no known kind, or does not last for so many epochs.
        """
        self.spec = spec
        self.first_epoch = epochs.start
        self.validation_spec = validation_spec
        self.loader = self.current = spec.loader(spec.sampler(epochs.start))
        self._validation = None if validation_spec is None else validation_spec.loader()
        self.resumption = self._of_this_data(resumption)
        if self._validation is not None:
            self._validation.require_epochs(len(epochs))
        self.loader.require_epochs(len(epochs))
        # Before anything is read: an iterator cannot be put back.
        if self.resumption is not None:
            self._seek(self.resumption)
        if self._validation is not None:
            # Raises if there is no batch, which would otherwise be found after the first epoch.
            self._validation.cursor()

    @property
    def runs_python(self) -> bool:
        """Whether code of the user's may make the batches, which may also set weights and flags of the model."""
        loaders = [self.loader] if self._validation is None else [self.loader, self._validation]
        # A dataset of `tf.data` may call a generator, and does not say so.
        return not all(isinstance(loader.source, (ArraySource, SparseSource)) for loader in loaders)

    def close(self) -> None:
        """Let go of the data, such as of generators of the user's, whose `finally` then runs."""
        self.current.close()
        if self._validation is not None:
            self._validation.close()

    def positions(self) -> dict[str, list[int | None]]:
        """Return how far each data set has been read, as JSON has it."""
        found = {"data": self.current}
        # Other validation data begins at its start after each epoch.
        if self._validation is not None and self._validation.is_one_shot:
            found["validation_data"] = self._validation
        return {name: list(astuple(loader.position())) for name, loader in found.items()}

    @property
    def iterator(self) -> Any:
        """The `tf.data` iterator of the user's own dataset that is being read, or None."""
        return self.current.iterator

    def described(self) -> dict[str, Any]:
        """Return what tells this data from other, without reading it."""
        spec, loader = self.spec, self.loader
        size = loader.batches_per_epoch
        return {
            "kind": type(spec.data).__name__,
            "batches": size,
            "examples": getattr(loader.source, "examples", None),
            "batch_size": spec.examples_per_batch if spec.is_arrays else None,
        }

    def _of_this_data(self, resumption: Resumption | None) -> Resumption | None:
        """Return where the fit goes on, or None if it went over other data."""
        if resumption is None:
            return None
        here = self.described()
        there = resumption.data
        other = [f"{name} {there[name]}, now {here[name]}" for name in here if there[name] != here[name]]
        if not other:
            return resumption
        _LOG.warning("The data has changed (%s): a new epoch begins at its start.", "; ".join(other))
        return None

    def _seek(self, resumption: Resumption) -> None:
        """Begin where the data was read to in the run that was loaded."""
        self.loader.seek(resumption.positions["data"], resumption.restore_iterator)
        if self._validation is not None and "validation_data" in resumption.positions:
            self._validation.seek(resumption.positions["validation_data"])

    def pass_over(self, epochs: int) -> None:
        """Leave data that a later fit may go on in as it is after so many epochs, without training on it."""
        self.loader.pass_over(epochs)
        if self._validation is not None and self._validation.is_one_shot:
            self._validation.pass_over(epochs)

    def training(self, phase: ActivePhase, epoch: int) -> DataLoader:
        """Return what an epoch of a phase trains on."""
        return self.loader

    def validation(self, step: CompiledStep) -> DataLoader:
        """Return what an epoch is validated on."""
        assert self._validation is not None
        return self._validation
