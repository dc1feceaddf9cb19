"""Showing how training goes: a bar in a terminal or notebook, a line an epoch in a log file."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from tqdm.auto import tqdm

STYLES = {0: "none", 1: "bar", 2: "lines"}
EVERY_SECONDS = 0.1  # at least between two looks at the logs, which the host fetches
COLUMNS = 80  # of a bar in a terminal that does not say how wide it is


class ProgressDisplay:
    """The progress of one pass over the data after the other.

    What it shows is asked for only when it is shown, at most every `EVERY_SECONDS`.
    """

    def __init__(
        self,
        verbose: int | str = "auto",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Choose how to show progress.

        Args:
            verbose: 1: a bar (tqdm); 2: a line an epoch; 0: nothing; `"auto"`: a bar in a terminal or notebook, else
                lines.
            stream: Where to write; standard error by default.
            clock: Seconds, from any origin.

        Raises:
            ValueError: `verbose` is none of these.
        """
        if verbose not in ("auto", *STYLES):
            raise ValueError(
                f"`verbose` must be 'auto', 0 (nothing), 1 (a bar) or 2 (a line an epoch). Received: {verbose!r}."
            )
        self._stream = sys.stderr if stream is None else stream
        # In a log file each update of a bar would be a line of its own.
        if verbose == "auto":
            verbose = 1 if _is_terminal(self._stream) or "ipykernel" in sys.modules else 2
        style = STYLES[int(verbose)]
        # Some services close standard error, or replace it by None.
        self._style = style if _is_open(self._stream) else "none"
        self._clock = clock
        self._bar: Any = None

    def start(self, title: str, total: int | None, done: int = 0) -> None:
        """Begin a pass of `total` batches, or go on with one of which some are done."""
        self._title = title
        self._began = self._shown = self._clock()
        if self._style == "bar":
            with self._unbroken():
                # A terminal that says it has no columns, as some do inside containers, would show nothing.
                fixed = None if shutil.get_terminal_size((0, 0)).columns else COLUMNS
                self._bar = tqdm(
                    total=total, initial=done, desc=title, unit="batch", file=self._stream, leave=True, ncols=fixed,
                    dynamic_ncols=fixed is None,
                )  # fmt: skip

    def advance(self, batches: int, look: Callable[[], tuple[Mapping[str, Any], int]]) -> None:
        """Count some batches, and, if it is time, look at the logs and the number of examples so far, and show them."""
        if self._bar is None:
            return
        said = None
        if self._clock() - self._shown >= EVERY_SECONDS:
            said, self._shown = self._said(*look()), self._clock()
        with self._unbroken():
            self._bar.update(batches)
            if said is not None:
                self._bar.set_postfix_str(said, refresh=True)

    def end(self, logs: Mapping[str, Any], examples: int) -> None:
        """Finish the pass with its final logs and the number of its examples."""
        said = self._said(logs, examples)
        with self._unbroken():
            if self._bar is not None:
                self._bar.set_postfix_str(said, refresh=True)
                self.close()
            elif self._style == "lines":
                seconds = self._clock() - self._began
                print(f"{self._title}: {said}, {seconds:.1f} s", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave an unfinished bar behind in good order."""
        if self._bar is not None:
            with self._unbroken():
                self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Show nothing more if showing fails: training goes on without a display."""
        try:
            yield
        except (OSError, ValueError, AttributeError, UnicodeError):
            self._style, self._bar = "none", None

    def _said(self, logs: Mapping[str, Any], examples: int) -> str:
        shown = [f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float)]
        seconds = self._clock() - self._began
        return ", ".join([*shown, f"{examples / seconds:,.0f} examples/s" if seconds > 0 else "- examples/s"])


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):  # no stream, a closed one, or an object that can only be written to
        return False


def _is_open(stream: Any) -> bool:
    return hasattr(stream, "write") and not getattr(stream, "closed", False)
