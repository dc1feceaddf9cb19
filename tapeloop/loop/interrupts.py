"""Letting a step end before Ctrl-C ends the run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold back a `KeyboardInterrupt` until the end of this context; a second one comes at once.

    Between a call of the compiled loop and the bookkeeping of it, an interrupt would leave the two apart. A handler
    of the user's own is left alone, and so is any thread but the main one, which alone gets signals.
    """
    # Python delivers signals to the main thread alone.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Now that the bookkeeping is done.
    if received:
        raise KeyboardInterrupt
