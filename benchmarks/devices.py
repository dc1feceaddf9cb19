"""What a GPU says of itself: by `nvidia-smi`, and by NVML for the energy. Without a GPU there is nothing to say."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import os
import subprocess
from typing import Any

FIXED = ("name", "driver_version", "memory.total")
STATE = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "utilization.gpu", "memory.used")


def _first() -> str:
    """Return the index or the UUID of the first GPU that programs may see, nothing if they may see none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def _ask(*arguments: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--id={_first()}", *arguments, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(said.splitlines())]


@functools.cache
def gpus() -> list[dict[str, str]]:
    """Return the name, the driver and the memory (MiB) of the first GPU that programs may see, if there is one."""
    if _first() in ("", "-1"):
        return []
    return [dict(zip(FIXED, row)) for row in _ask(f"--query-gpu={','.join(FIXED)}") if len(row) == len(FIXED)]


def memory_mb() -> int:
    """Return the MiB of the first GPU, 0 without one."""
    return int(float(gpus()[0]["memory.total"])) if gpus() else 0


def state() -> dict[str, Any]:
    """Return clock (MHz), temperature (C), power (W), load (%) and memory (MiB) of the first GPU, and who is on it."""
    if not gpus():
        return {}
    row = next(iter(_ask(f"--query-gpu={','.join(STATE)}")), [])
    found: dict[str, Any] = {}
    for name, value in zip(STATE, row):
        with contextlib.suppress(ValueError):
            found[name] = float(value)
    others = [int(row[0]) for row in _ask("--query-compute-apps=pid") if row and row[0].isdigit()]
    return {**found, "other_processes": sum(not _is_ours(pid) for pid in others)}


def _is_ours(pid: int) -> bool:
    """Tell whether a process is of this run. In a container, processes have other numbers: none is found there."""
    with contextlib.suppress(OSError):
        return os.getpgid(pid) == os.getpgrp()
    return False


@functools.cache
def _nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """Return NVML and what it calls the first GPU, if both are there."""
    handle = ctypes.c_void_p()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        first, place = _first(), ctypes.byref(handle)
        if library.nvmlInit_v2():
            return None
        if first.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(int(first), place)
        else:
            failed = library.nvmlDeviceGetHandleByUUID(first.encode(), place)
        return None if failed else (library, handle)
    return None


def joules() -> float | None:
    """Return the energy that the first GPU has taken, where NVML counts it."""
    value = ctypes.c_ulonglong()
    there = _nvml() if gpus() else None
    if there is None or there[0].nvmlDeviceGetTotalEnergyConsumption(there[1], ctypes.byref(value)):
        return None
    return value.value / 1e3
