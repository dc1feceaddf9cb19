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


def _ask(*arguments: str) -> list[list[str]]:
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(said.splitlines())]


@functools.cache
def gpus() -> list[dict[str, str]]:
    """Return the name, the driver and the memory (MiB) of each GPU that programs may see."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
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
    others = [row[0] for row in _ask("--query-compute-apps=pid") if row and row[0] != str(os.getpid())]
    return {**found, "other_processes": len(others)}


@functools.cache
def _nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """Return NVML and what it calls the first GPU, if both are there."""
    handle = ctypes.c_void_p()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return library, handle
    return None


def joules() -> float | None:
    """Return the energy that the first GPU has taken, where NVML counts it."""
    value = ctypes.c_ulonglong()
    there = _nvml() if gpus() else None
    if there is None or there[0].nvmlDeviceGetTotalEnergyConsumption(there[1], ctypes.byref(value)):
        return None
    return value.value / 1e3
