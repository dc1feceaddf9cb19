"""Letting a step end before Ctrl-C or a scheduler ends the run."""

from __future__ import annotations

import _signal  # under `signal`, which takes ten times as long to make enumerations of what it is given and returns
import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn


class StopRequested(BaseException):
    """A scheduler has asked the process to end, by SIGTERM. Like `KeyboardInterrupt`, it is no `Exception`.

    Attributes:
        number: The number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise `StopRequested` inside this context.

    A handler of the user's own is left alone, and so is any thread but the main one, which alone gets signals.
    """
    if not _is_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Deferral]:
    """Hold back a `KeyboardInterrupt` or `StopRequested` until the end of this context; a second one comes at once.

    Between a call of the compiled loop and the bookkeeping of it, an interrupt would leave the two apart. A handler
    of the user's own may raise too, and is called at the end likewise.
    """
    found = (
        {number: _signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if _is_main_thread() else {}
    )
    # One that holds signals back already goes on to; what is not callable is none of Python's.
    deferral = Deferral({n: each for n, each in found.items() if callable(each) and not isinstance(each, Deferral)})
    for number in deferral.handlers:
        _signal.signal(number, deferral)
    try:
        yield deferral
    finally:
        for number, handler in deferral.handlers.items():
            _signal.signal(number, handler)
    # Now that the bookkeeping is done.
    for number, frame in deferral.received:
        deferral.handlers[number](number, frame)


@dataclass(eq=False)
class Deferral:
    """A handler of signals that notes the first, for the handler that it stands for.

    Attributes:
        handlers: The handlers of each signal.
        received: What was noted.
    """

    handlers: dict[int, Any]
    received: list[tuple[int, Any]] = field(default_factory=list)

    def __call__(self, number: int, frame: Any) -> None:
        """Note a signal; hand on a second one."""
        if self.received:
            self.handlers[number](number, frame)
        self.received.append((number, frame))

    def deliver(self) -> NoReturn:
        """Act on the signal that was noted; without one, as if on SIGTERM, since another process has got one."""
        for number, frame in self.received[:1]:
            self.received.clear()
            self.handlers[number](number, frame)
        raise StopRequested(signal.SIGTERM)


class CommonEnd:
    """Has all workers that train together end after the same step, if one of them gets a signal.

    A worker that ended by itself would leave the others waiting for it.
    """

    def __init__(self, workers: int) -> None:
        """Take in how many there are; one alone ends as the signal has it."""
        self._workers = workers
        self._held: Deferral | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back inside this context, until the workers have come to the same step."""
        if self._workers == 1:
            yield
            return
        with deferred_interrupt() as self._held:
            try:
                yield
            finally:
                self._held = None

    def is_asked(self) -> bool:
        """Tell whether this worker has got a signal."""
        return self._held is not None and bool(self._held.received)

    def come(self) -> None:
        """End as the signal has it, after a step after which all workers end."""
        if self._held is not None:
            self._held.deliver()


def _raise_stop(number: int, frame: Any) -> NoReturn:
    raise StopRequested(number)


def _is_main_thread() -> bool:
    # Python delivers signals to the main thread alone.
    return threading.current_thread() is threading.main_thread()
