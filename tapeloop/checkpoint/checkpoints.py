"""When a run saves itself, and what of it is kept: the user's options."""

from __future__ import annotations

import numbers
import os
import pathlib
from dataclasses import dataclass
from typing import Any, Literal

from tapeloop._validation import whole_number
from tapeloop.checkpoint.records import best_of, names_in, records_in
from tapeloop.errors import CheckpointError

RESUME = "auto", "never", "must"
# What grows as a model gets better, by parts of the names of Keras' metrics; losses and errors shrink.
BETTER_IF_MORE = "acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "io_u", "dice", "r2", "hits", "similarity"
BETTER_IF_LESS = "loss", "error", "mse", "mae", "mape", "msle", "entropy", "perplexity", "divergence", "hinge"


@dataclass(frozen=True)
class Checkpoints:
    """When a fit saves the run, where, and which checkpoints are kept.

    Attributes:
        directory: A local folder for this run alone.
        every_steps: Save after every this many steps, besides the ends of epochs; by default, do not.
        every_minutes: Save after every this many minutes too, at the end of the step that runs then.
        every_epochs: Save at the end of every this many epochs, by default of each; None: at the end of the fit alone.
        keep: Keep this many of the newest checkpoints; by default 3.
        keep_best: Keep the best checkpoint too by this log, such as `"val_loss"`. With `ema`, that is the log of the
            variables' own values, and not of their averages. An epoch that is the best so far is saved in any case.
        mode: Whether the `"min"` or the `"max"` of `keep_best` is the best; `"auto"` tells by names such as `loss`,
            `error`, `accuracy` and `auc`.
        resume: `"auto"`: resume from the newest checkpoint if there is one, and say so; `"must"`: it is an error if
            there is none; `"never"`: it is an error if there is one.

    Raises:
        ValueError: An option has a value that it cannot have.

    Example:
        >>> import tempfile
        >>> x, y = np.ones((8, 4)), np.ones((8, 2))
        >>> def run(epochs):
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        ...     trainer = tl.Trainer(model, loss="mse")
        ...     trainer.fit((x, y), epochs=epochs, verbose=0, checkpoint=checkpoints)
        ...     return trainer.epoch
        >>> checkpoints = tl.Checkpoints(tempfile.mkdtemp(), keep=2)
        >>> run(2), run(3)  # the second goes on after the first, and trains one epoch more
        (2, 3)
        >>> checkpoints.newest == checkpoints.path / "000003-step-3", checkpoints.best
        (True, None)
    """

    directory: str | os.PathLike[str]
    every_steps: int | None = None
    every_minutes: float | None = None
    every_epochs: int | None = 1
    keep: int = 3
    keep_best: str | None = None
    mode: Literal["auto", "min", "max"] = "auto"
    resume: Literal["auto", "never", "must"] = "auto"

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_epochs"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        whole_number("keep", self.keep, 1)
        minutes = self.every_minutes
        if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, numbers.Real) or minutes <= 0):
            raise ValueError(f"`every_minutes` must be a number above 0. Received: {minutes!r}.")
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f"`mode` must be 'auto', 'min' or 'max'. Received: {self.mode!r}.")
        if self.resume not in RESUME:
            raise ValueError(f"`resume` must be one of {', '.join(map(repr, RESUME))}. Received: {self.resume!r}.")
        directory = os.fspath(self.directory)
        if not directory or "://" in directory:
            raise ValueError(f"`directory` must be the path of a local folder. Received: {directory!r}.")
        name = (self.keep_best or "loss").lower()
        if self.mode == "auto" and not any(part in name for part in (*BETTER_IF_MORE, *BETTER_IF_LESS)):
            raise ValueError(f"`mode` cannot be told from {self.keep_best!r}: pass `mode='min'` or `mode='max'`.")

    @property
    def path(self) -> pathlib.Path:
        """The folder of the run."""
        return pathlib.Path(self.directory).expanduser()

    @property
    def newest(self) -> pathlib.Path | None:
        """The folder of the newest checkpoint, or None."""
        names = names_in(self.path)
        return self.path / names[-1] if names else None

    @property
    def best(self) -> pathlib.Path | None:
        """The folder of the best checkpoint by `keep_best`, or None."""
        found = self.best_of(records_in(self.path))
        return None if found is None else self.path / found

    def restore_best(self, trainer: Any) -> pathlib.Path:
        """Bring a trainer to where the best checkpoint has it, and return the folder of that.

        Args:
            trainer: A trainer of the same model.

        Raises:
            CheckpointError: There is none, or it is of another model.

        Example:
            >>> import tempfile
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
            >>> trainer = tl.Trainer(model, loss="mse")
            >>> checkpoints = tl.Checkpoints(tempfile.mkdtemp(), keep_best="loss")
            >>> history = trainer.fit((np.ones((8, 4)), np.ones((8, 2))), verbose=0, checkpoint=checkpoints)
            >>> checkpoints.restore_best(trainer).name
            '000001-step-1'
        """
        best = self.best
        if best is None:
            why = (
                "`keep_best` names no log" if self.keep_best is None else f"none of those there has `{self.keep_best}`"
            )
            raise CheckpointError(f"There is no best checkpoint in {self.path}: {why}.")
        trainer.load(best)
        return best

    def best_of(self, records: dict[str, dict[str, Any]]) -> str | None:
        """Return the name of the best checkpoint by what they say of their runs."""
        return best_of(records, self.keep_best, is_more_better=self.is_more_better)

    @property
    def is_more_better(self) -> bool:
        """Whether the best is the highest."""
        name = (self.keep_best or "").lower()
        return self.mode == "max" or (self.mode == "auto" and any(part in name for part in BETTER_IF_MORE))
