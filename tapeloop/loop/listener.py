"""Who looks on while a fit runs: callbacks, and what saves the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tapeloop.data.loader import DataLoader

ReadLogs = Callable[[], tuple[Mapping[str, Any], int]]


class FitListener:
    """Is told how a fit goes. Every method does nothing unless it is overridden."""

    def steps_left(self) -> int:
        """Return after how many steps it must be told, at the latest."""
        return sys.maxsize

    def state(self) -> tuple[Any, Mapping[str, np.ndarray]]:
        """Return what it has come to, as JSON has it, and arrays by name: a checkpoint keeps both."""
        return None, {}

    def before_fit(self) -> None:
        """Take in that a fit begins."""

    def before_epoch(self, number: int) -> None:
        """Take in that an epoch of the fit begins, or goes on after the run was stopped; the first is 0."""

    def before_steps(self, number: int) -> None:
        """Take in that steps begin, with this batch of the epoch."""

    def after_steps(self, number: int, read_logs: ReadLogs) -> None:
        """Take in that steps have run, the last on this batch of the epoch; what they logged is there to be read."""

    def before_evaluation(self, loader: DataLoader) -> None:
        """Take in that an evaluation begins."""

    def before_evaluating(self, number: int) -> None:
        """Take in that batches are evaluated, from this one on."""

    def after_evaluating(self, number: int, read_logs: ReadLogs) -> None:
        """Take in that batches were evaluated, this one last."""

    def after_evaluation(self, logs: Mapping[str, Any]) -> None:
        """Take in what an evaluation has found."""

    def end_epoch(self, number: int, logs: dict[str, Any]) -> None:
        """Take in the logs of an epoch of the fit before they are recorded, and add to them."""

    def after_epoch(self, logs: Mapping[str, Any]) -> None:
        """Take in that an epoch has ended and is recorded, with these logs."""

    def after_fit(self, logs: Mapping[str, Any]) -> None:
        """Take in that all epochs of the fit have ended, the last with these logs."""

    def on_stop(self, stop: BaseException) -> None:
        """Take in that a signal ends the fit, after the last whole step."""
