"""The process from which those of candidates are forked: it imports TensorFlow once, and never runs an op.

Nothing here imports TensorFlow. It is a process of its own, and none of Python's fork servers, of which a program has
one for good: this one ends with the tuning, and knows nothing of the program's script.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import statistics
import sys
import time
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

ROUNDS, ROUND_S = 7, 0.3  # of candidates that take turns
FORKS = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


class Server:
    """The process, and the pipe to it."""

    def __init__(self, parcel: bytes) -> None:
        """Start it.

        Args:
            parcel: The trainer and its data, of which all candidates are made.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # No daemon, since those may not have processes of their own; it ends when the pipe is closed.
        self._process = context.Process(target=serve, args=(theirs,), daemon=False)
        with _without_main():
            self._process.start()
        theirs.close()
        self._pipe.send_bytes(parcel)

    def ask(self, options: Any, first_s: float, limit_s: float, fastest_ms: float | None) -> dict[str, Any]:
        """Have a candidate measured, and return what was found until it ended or was stopped.

        Args:
            options: Its options.
            first_s: Seconds after which it is stopped unless its first step has ended.
            limit_s: Seconds after which it is stopped.
            fastest_ms: The step of the fastest so far, or None.

        Raises:
            RuntimeError: The process has died.
        """
        return dict(self._asked("measure", options, first_s, limit_s, fastest_ms))

    def compare(self, several: Sequence[Any], limit_s: float) -> list[float] | None:
        """Have candidates train in turns, and return how long each takes, as ratios to the first; None if one fails.

        A machine that others use drifts from one candidate to the next, but hits all that take turns.

        Args:
            several: Their options.
            limit_s: Seconds after which they are stopped.

        Raises:
            RuntimeError: The process has died.
        """
        ratios: list[float] | None = self._asked("compare", several, limit_s)
        return ratios

    def _asked(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise RuntimeError(
                f"The process that `tune` starts candidates from ended with exit code {self._process.exitcode}: "
                "`tapeloop` could not be imported in it, or something has ended it."
            ) from None

    def close(self) -> None:
        """End it, and whatever it runs."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve(pipe: Connection) -> None:
    """Measure one candidate after another, until the pipe is closed: the program's side of it has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program, which closes the pipe
    # TensorFlow and XLA write there what the rows of the table say.
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    with contextlib.suppress(EOFError, OSError):
        parcel = pipe.recv_bytes()
        # By name: the module imports TensorFlow, which the program's side has done already.
        measurement = importlib.import_module("tapeloop.tuning.measurement")
        importlib.import_module("tapeloop._public")
        while True:
            verb, options, *others = pipe.recv()
            if verb == "measure":
                first_s, limit_s, fastest_ms = others
                pipe.send(_measured(measurement.run, (parcel, options, fastest_ms), pipe, first_s, limit_s))
            else:
                pipe.send(_compared(measurement.take_turns, parcel, options, pipe, *others))


def _measured(run: Any, arguments: tuple[Any, ...], pipe: Connection, first_s: float, limit_s: float) -> dict[str, Any]:
    """Run a candidate in a process of its own, and return what it has found, and how it ended.

    Raises:
        EOFError: The program has gone.
    """
    context: Any = multiprocessing.get_context(FORKS)
    ours, theirs = context.Pipe(duplex=False)
    began, found = time.monotonic(), dict[str, Any]()
    process = context.Process(target=run, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            until = began + (limit_s if "first_step_s" in found else min(first_s, limit_s))
            ready = wait([ours, pipe], max(0.0, until - time.monotonic()))
            if pipe in ready:
                raise EOFError
            if not ready:
                found["stopped_s"] = time.monotonic() - began
                break
            found |= ours.recv()
    except EOFError:
        if pipe in wait([pipe], 0):
            raise
        process.join(5)  # its side is closed: it ends, or has ended
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()
    return {**found, "exitcode": process.exitcode}


def _compared(
    take_turns: Any, parcel: bytes, several: Sequence[Any], pipe: Connection, limit_s: float
) -> list[float] | None:
    """Run candidates at once, of which one trains at a time, and return how long each takes, as ratios to the first.

    Raises:
        EOFError: The program has gone.
    """
    context: Any = multiprocessing.get_context(FORKS)
    deadline = time.monotonic() + limit_s
    processes: list[Any] = []
    candidates: list[Connection] = []
    try:
        for options in several:
            # One after the other: a process that has the far end of another's pipe keeps it open when that one dies.
            ours, theirs = context.Pipe()
            candidates.append(ours)
            processes.append(context.Process(target=take_turns, args=(theirs, parcel, options), daemon=True))
            processes[-1].start()
            theirs.close()
        seconds: list[list[float]] = []
        # Compiled at once, which takes less time than one after the other.
        if all(_answer(candidate, pipe, deadline) is not None for candidate in candidates):
            seconds = _rounds(candidates, pipe, deadline)
        return [statistics.median(own / one[0] for own, one in zip(each, seconds)) for each in zip(*seconds)] or None
    finally:
        for process in processes:
            process.kill()
            process.join()
        for candidate in candidates:
            candidate.close()


def _rounds(candidates: Sequence[Connection], pipe: Connection, deadline: float) -> list[list[float]]:
    """Return the seconds of each candidate in each round that there was time for."""
    rounds: list[list[float]] = []
    steps, warms_up = 1, True
    while len(rounds) < ROUNDS:
        found: dict[int, float] = {}
        # Who is first in a round, is last in the next.
        for number in range(len(candidates))[:: 1 if len(rounds) % 2 else -1]:
            candidates[number].send(steps)
            answer = _answer(candidates[number], pipe, deadline)
            if answer is None:
                return rounds
            found[number] = answer["seconds"]
        quickest = min(found.values())
        if quickest < ROUND_S / 2:  # of which the start of the fit may be the most
            steps = min(8 * steps, int(steps * ROUND_S / quickest))
        elif not warms_up:
            rounds.append([found[number] for number in range(len(candidates))])
        warms_up = False
    return rounds


def _answer(candidate: Connection, pipe: Connection, deadline: float) -> dict[str, Any] | None:
    """Return what a candidate answers, or None if it fails or the time is over.

    Raises:
        EOFError: The program has gone.
    """
    ready = wait([candidate, pipe], max(0.0, deadline - time.monotonic()))
    if pipe in ready:
        raise EOFError
    if not ready:
        return None
    try:
        answer: dict[str, Any] = candidate.recv()
    except (EOFError, OSError):
        return None
    return answer if answer.keys() & {"is_ready", "seconds"} else None


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start a process that knows nothing of the program's script, which it would import: there it may train."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
