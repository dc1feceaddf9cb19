"""A process that measures one case: its turns and rounds, what these tell, and how sure that is."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import devices
from benchmarks.cases import KINDS, PEERS, Case

DRAWS = 2000  # of a bootstrap


def serve(pipe: Connection, case: Case) -> None:
    """Measure a case, a turn each time that the pipe says so.

    What measures is a generator, or a function where there is but one turn: it yields at the end of each turn and
    returns its figures. The answers are None, that the turn has ended, or `("ok", figures)`, or `("error", why)`.
    Whatever goes wrong is answered, not raised.
    """
    os.dup2(2, 1)  # what libraries print is not the user's to read
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"  # or the CPU's allocator counts nothing
    if case.cap_mb:
        os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(case.cap_mb)
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # which dies of a segmentation fault where there is no memory left
    if case.base == "jax":
        os.environ |= {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    running: Any = None
    while True:
        try:
            pipe.recv()
        except (EOFError, OSError):
            return  # nobody waits any more
        try:
            if running is None:
                kinds = PEERS[case.base][0] if case.base in PEERS else "kinds"
                module, name = (f"benchmarks.{kinds}:{case.kind}" if case.kind in KINDS else case.kind).split(":")
                running = getattr(importlib.import_module(module), name)(case)
            answer: Any = next(running) if inspect.isgenerator(running) else ("ok", running)
        except StopIteration as end:
            answer = "ok", end.value
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer = "error", {"error": text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"}
        with contextlib.suppress(OSError):
            pipe.send(answer)


def short_of(steps: int) -> int:
    """Return how many steps a short round has beside a long one."""
    return max(1, steps // 5)


def summary(short: Sequence[float], long: Sequence[float], steps: int, batch: int, first: float) -> dict[str, Any]:
    """Return the figures of pairs of rounds and of the first step, which took so many seconds.

    A step is the time by which a long round, of so many steps, exceeds the short one before it, by the number of steps:
    what a fit costs at its ends, `fixed_ms`, is in neither. What of the first step is no step is `compile_s`.
    """
    few = short_of(steps)
    pairs = np.array([1e3 * (more - less) / (steps - few) for less, more in zip(short, long)])
    step = float(np.median(pairs))
    fixed = float(np.median([1e3 * less - few * step for less in short]))
    return {
        "step_ms": step,
        "step_ms_interval": interval([pairs], np.random.default_rng(0)),
        "fixed_ms": fixed,
        "examples_per_s": 1e3 * batch / step if step > 0 else None,
        "first_step_s": first,
        "compile_s": max(0.0, first - max(step, 0.0) / 1e3),
        "rounds_ms": pairs.tolist(),
    }


def draws(processes: Sequence[Sequence[float]], generator: np.random.Generator, count: int = DRAWS) -> np.ndarray:
    """Return medians over processes of the medians of their rounds, drawn again at both levels.

    Processes are the unit: rounds of one process are more alike than those of two (Kalibera and Jones, 2013).
    """
    places = len(processes)
    again = [generator.choice(rounds, (count, places, len(rounds))) for rounds in processes]
    medians = np.stack([np.median(rounds, axis=-1) for rounds in again], axis=-1)
    which = generator.integers(0, places, (count, places, 1))
    return np.median(np.take_along_axis(medians, which, axis=-1), axis=(1, 2))


def interval(processes: Sequence[Sequence[float]], generator: np.random.Generator, share: float = 0.95) -> list[float]:
    """Return the bounds between which a share of the drawn medians lie."""
    low, high = np.quantile(draws(processes, generator), [(1 - share) / 2, (1 + share) / 2])
    return [float(low), float(high)]


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that something takes, and let nobody see the progress that it shows."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


def rounds(case: Case, make: Callable[[], Callable[[int], Any]]) -> Generator[None, None, tuple[Any, dict[str, Any]]]:
    """Time an arm that `make` builds: its first step, then pairs of a short and a long round, the first as warm-up.

    Each `yield` ends a turn: other arms may have theirs before it goes on. Returns the arm, and its figures.
    """
    before = devices.state()
    arm = make()
    yield
    first = timed(lambda: arm(1))
    yield
    few, short, long, joules = short_of(case.steps), [], [], []
    for _ in range(case.rounds + 1):
        started = devices.joules()
        short.append(timed(lambda: arm(few)))
        long.append(timed(lambda: arm(case.steps)))
        ended = devices.joules()
        if started is not None and ended is not None:
            joules.append((ended - started) / (few + case.steps))
        yield
    figures = summary(short[1:], long[1:], case.steps, case.batch, first)
    if joules:
        figures["joules_a_step"] = float(np.median(joules[1:]))
    if before:
        figures["gpu"] = {"before": before, "after": devices.state()}
    return arm, figures
