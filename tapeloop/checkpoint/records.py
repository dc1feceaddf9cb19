"""What checkpoints say of their runs, read without TensorFlow and without writing anything."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from tapeloop.checkpoint import files
from tapeloop.errors import CheckpointError

FORMAT = 1  # of what a checkpoint says; an older tapeloop refuses a newer one
RECORD = "checkpoint.json"
_NAME = re.compile(r"(\d{6,})-step-\d+")


def names_in(folder: pathlib.Path) -> list[str]:
    """Return the names of the checkpoints in a folder, the oldest first."""
    found = [path.name for path in folder.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda name: int(name.split("-")[0]))


def records_in(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return what each checkpoint in a folder says of its run, the oldest first, but for those that cannot be read."""
    found = {}
    for name in names_in(folder):
        try:
            found[name] = json.loads((folder / name / RECORD).read_text())
        except (OSError, ValueError):
            continue
    return found


def read_record(checkpoint: pathlib.Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run, which was found to be as it was written.

    Raises:
        CheckpointError: It was written by a newer tapeloop.
    """
    record: dict[str, Any] = json.loads((checkpoint / RECORD).read_text())
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"{checkpoint} was written by tapeloop {record['written_by']['tapeloop']}, in format "
            f"{record['format']}; this tapeloop reads formats up to {FORMAT}. Update tapeloop."
        )
    return record


def best_of(records: Mapping[str, Mapping[str, Any]], log: str | None, *, is_more_better: bool) -> str | None:
    """Return the name of the best checkpoint by a log; None if no checkpoint has it.

    Args:
        records: What each checkpoint says of its run, by its name.
        log: The name of the log.
        is_more_better: Whether the best is the highest.
    """
    values = {name: record["epoch_logs"].get(log) for name, record in records.items()}
    # NaN is never the best: it compares as neither less nor more.
    known = {name: value for name, value in values.items() if isinstance(value, (int, float)) and value == value}
    if not known:
        return None
    return (max if is_more_better else min)(known, key=known.__getitem__)


def require_shared(folder: pathlib.Path, digest: str, *, every_byte: bool = True) -> None:
    """Check that a folder which checkpoints share is as it was written, and the one that a checkpoint refers to.

    Args:
        folder: The shared folder.
        digest: Its digest, as the checkpoint has it.
        every_byte: Whether all files are read, and not only the list of them.

    Raises:
        DamagedError: The folder is damaged, or is another one.
    """
    files.verify(folder, None if every_byte else ())
    # Digests that agree in themselves may be those of another folder that took the name.
    if files.digest_of(folder) != digest:
        raise files.DamagedError("its digest is not the one that the checkpoint recorded")
