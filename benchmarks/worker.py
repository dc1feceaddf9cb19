"""A process that measures one case: it goes on when it is told to, and says what came of it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import KINDS, PEERS, Case

PEERS_MODULE = "benchmarks.peers:step"


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
    running: Any = None
    while True:
        try:
            pipe.recv()
        except (EOFError, OSError):
            return  # nobody waits any more
        try:
            if running is None:
                where = PEERS_MODULE if case.base in PEERS else KINDS.get(case.kind, case.kind)
                module, name = where.split(":")
                running = getattr(importlib.import_module(module), name)(case)
            answer: Any = _turn(running) if inspect.isgenerator(running) else ("ok", running)
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer = "error", {"error": text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"}
        with contextlib.suppress(OSError):
            pipe.send(answer)


def _turn(running: Any) -> Any:
    try:
        next(running)
    except StopIteration as end:
        return "ok", end.value
    return None
