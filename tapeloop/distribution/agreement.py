"""Finding out, before anything has moved, whether all workers are about to train the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping

import tensorflow as tf

from tapeloop._backend.fingerprint import fingerprint
from tapeloop.distribution.replicas import Replicas
from tapeloop.errors import WorkerError

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the `repr` of an object: another in each process


def require_agreement(replicas: Replicas, said: Callable[[], Mapping[str, object]]) -> None:
    """Check that all workers say the same, and wait until all have said it.

    Args:
        replicas: Who trains.
        said: Returns what this worker is about to do, by what it is called in the error; not asked where one trains.

    Raises:
        WorkerError: They do not: on all workers, each of which says what it has.
    """
    if replicas.workers == 1:
        return
    texts = {name: ADDRESS.sub("", str(value)) for name, value in said().items()}
    rows = replicas.gathered([_number(text) for text in texts.values()])
    differing = [number for number in range(replicas.workers) if (rows[number] != rows[0]).any()]
    if not differing:
        return
    columns = [name for place, name in enumerate(texts) if (rows[:, place] != rows[0, place]).any()]
    here = "; ".join(f"{name}: {texts[name][:200]}" for name in columns)
    raise WorkerError(
        f"Workers must train the same, and of {replicas.workers} workers "
        f"{', '.join(map(str, differing))} {'differ' if len(differing) > 1 else 'differs'} from worker 0 in "
        f"{', '.join(columns)}. Worker {replicas.worker} has {here}. Start the same program, with the same versions "
        "and arguments, on all of them."
    )


def end_epoch(replicas: Replicas, *, stops: bool, variables: Iterable[tf.Variable]) -> bool:
    """Return whether any worker stops after an epoch, having checked that all have the same weights.

    Raises:
        WorkerError: They have not: code of the user's has set other values on some of them.
    """
    if replicas.workers == 1:
        return stops
    rows = replicas.gathered([stops, int.from_bytes(fingerprint(variables), "big") >> 1])
    if (rows[:, 1] != rows[0, 1]).any():
        raise WorkerError(
            "The workers ended the epoch with different weights: code of yours, such as a callback, has set some on "
            "one worker alone. Have it do the same on all of them."
        )
    return bool(rows[:, 0].any())


def _number(text: str) -> int:
    """Return a number of 63 bits that tells texts apart."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
