"""Results in a file of lines: one JSON object for each process that was measured, written as it ends, never changed.

A line holds the case, the code and the environment that it was measured with, whose digest is its key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from typing import Any

from benchmarks.cases import PEERS, Case
from benchmarks.devices import gpus

ROOT = pathlib.Path(__file__).parents[1]
# What reads results, and does not make them: a change to it leaves results as they are.
READERS = ("__main__.py", "compare.py", "plots.py", "report.py", "results.py", "runner.py", "tune.py")
PACKAGES = ("tensorflow", "keras", "numpy", *dict.fromkeys(itertools.chain(*(needed for _, needed in PEERS.values()))))

Row = dict[str, Any]


def append(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Add lines to a file, and wait until they are on the disk.

    A line that was torn, since its writer was killed, is ended first, so that it spoils none but itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def load(*paths: pathlib.Path) -> list[Row]:
    """Return the rows of some files: of those with one key the last that ended, or else the longest that was cut off.

    Torn lines are left out.

    Raises:
        ValueError: A file has lines, and none of them is a result.
        FileNotFoundError: There is no such file.
    """
    found: dict[str, Row] = {}
    for path in paths:
        lines = path.read_bytes().split(b"\n")
        rows = [row for line in lines if (row := _read(line)) is not None]
        if not rows and any(lines):
            raise ValueError(f"`{path}` has no results of this suite: no line is a JSON object with a key and a case.")
        for row in rows:
            last = found.get(row["key"])
            if not last or row["status"] != "cut" or (last["status"] == "cut" and row["wall_s"] > last["wall_s"]):
                found[row["key"]] = row
    return list(found.values())


def _read(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        Case.of(row)
        return row if row["key"] and row["status"] in ("ok", "error", "cut") else None
    except (ValueError, KeyError, TypeError):
        return None


def ended(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of what came to its end: those that were cut off for want of time are none."""
    return [row for row in rows if row["status"] != "cut"]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each case, whatever the code that it was measured with."""
    return list({Case.of(row): row for row in rows}.values())


def key_of(case: Case) -> str:
    """Return the digest of a case, and of the code and the environment here, less frameworks that it does not use."""
    here = used_by(case, environment())
    parts = {"case": dataclasses.asdict(case), "code": code(), "environment": here, "own": own_code(case)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def used_by(case: Case, environment: dict[str, Any]) -> dict[str, Any]:
    """Return an environment, less the frameworks that a case does not use."""
    _, needed = PEERS.get(case.base, ("", ()))
    others = {name for _, packages in PEERS.values() for name in packages}.difference(needed)
    return {name: what for name, what in environment.items() if name not in others}


def row_of(case: Case, status: str, wall_s: float, **figures: Any) -> Row:
    """Return a row of what was measured here."""
    said = {"key": key_of(case), "status": status, "case": dataclasses.asdict(case), "wall_s": round(wall_s, 3)}
    return {**said, **figures, "code": code(), "commit": commit(), "environment": environment()}


def own_code(case: Case) -> list[str]:
    """Return digests of the modules that a user's own model is named in, of packages all that is in them."""
    found = []
    for name in sorted({value.split(":")[0].split(".")[0] for _, value in case.own if ":" in value}):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            folders = spec.submodule_search_locations if spec else None
            files = [path for folder in folders or () for path in sorted(pathlib.Path(folder).rglob("*.py"))]
            if spec is not None and spec.origin is not None and not files:
                files = [pathlib.Path(spec.origin)]
            found.append(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16])
    return found


@functools.cache
def code() -> str:
    """Return the digest of what is measured and of what measures it."""
    digest = hashlib.sha256()
    measuring = [path for path in (ROOT / "benchmarks").glob("*.py") if path.name not in READERS]
    for path in sorted([*measuring, *(ROOT / "tapeloop").rglob("*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def commit() -> str:
    """Return the commit that is checked out, with a `+` where files differ from it; nothing where git is not there."""
    asked = "git rev-parse --short=12 HEAD && git status --porcelain tapeloop benchmarks"
    done = subprocess.run(asked, shell=True, cwd=ROOT, capture_output=True, text=True)
    head, *changed = done.stdout.splitlines() or [""]
    return "" if done.returncode else head + "+" * bool(changed)


@functools.cache
def environment() -> dict[str, Any]:
    """Return what is known of this machine and what is installed, without importing it."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*?)\s*$", info.read_text() if info.exists() else "", re.MULTILINE)
    device = gpus()[0] if gpus() else {}
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "device": device.get("name", "CPU"),
        "driver": device.get("driver_version", ""),
        **{name: next((found.version for found in distributions(name=name)), "") for name in PACKAGES},
    }


def differences(one: Sequence[Row], other: Sequence[Row]) -> list[str]:
    """Say in what the environments of two files of results differ."""
    found = []
    for name in environment():
        sides = [sorted({str(row["environment"].get(name)) for row in rows}) for rows in (one, other)]
        if sides[0] != sides[1]:
            found.append(f"{name}: {' and '.join(sides[0])}, then {' and '.join(sides[1])}")
    return found
