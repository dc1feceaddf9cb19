"""What benchmark cases measure in tests: real processes, without TensorFlow."""

import os
import pathlib
import time
import zlib

import numpy as np

from benchmarks.cases import Case


def case_of(kind, arm="tapeloop", **fields):
    """A case that measures what a function here does."""
    return Case("mlp", "head", arm, 64, kind=f"tests.support.measured:{kind}", **fields)


def brief(case):
    """Takes two turns, and returns a figure that depends on the case alone."""
    yield
    time.sleep(0.02)
    yield
    return {"figure": case.batch + case.process}


def noted(case):
    """Notes each of its turns in a file."""
    for _ in range(4):
        with open(dict(case.own)["file"], "a") as file:
            file.write(f"{case.arm} ")
        yield
    return {}


def endless(case):
    """Sleeps for long."""
    time.sleep(100)


def broken(case):
    """Raises."""
    raise RuntimeError("this case cannot be measured")


def killed(case):
    """Dies as a process does that the kernel kills."""
    os._exit(9)


def figures(arm, process=0, slower=1.0, rounds=5, noise=0.01, nodes=100):
    """Rows as `step` gives them: every process a little slower or faster as a whole, and every round of it again."""
    generator = np.random.default_rng(zlib.crc32(f"{arm} {process} {slower}".encode()))
    base = {"forward": 1.0, "full": 4.0, "hand": 1.5, "tapeloop": 2.0}[arm] * slower
    base *= 1 + noise * generator.normal()
    each = (base * (1 + noise * generator.normal(size=rounds))).tolist()
    middle = float(np.median(each))
    return {
        "step_ms": middle, "rounds_ms": each, "fixed_ms": 3.0, "first_step_s": 0.5, "compile_s": 0.4,
        "examples_per_s": 64e3 / middle, "nodes": nodes, "weight_bytes": 1000, "optimizer_bytes": 8, "data_bytes": 64,
        "peak": int(2**20 * base), "persistent": 2**19, "growth": 0, "activation_bytes": int(2**20 * base) - 2**19,
    }  # fmt: skip


def lines(path):
    """How many lines a file has, 0 where there is none."""
    path = pathlib.Path(path)
    return len(path.read_bytes().splitlines()) if path.exists() else 0
