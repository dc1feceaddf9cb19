"""Runs on two devices, and on two and four workers, end as those on one device."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support import distributed, workers

EVERYWHERE = "head", "two_groups", "unfreezing", "micro_batches", "clipping", "ragged", "gan", "ema"
OF_DEVICES = *EVERYWHERE, "folded", "skipping", "dataset"
OF_WORKERS = *EVERYWHERE, "cached", "batches", "layer_metric"
# What each device moves by what it sees: weights differ from those of one device, and not between workers.
OF_DATA = "statistics", "moving"
# What a device gives in each step of a run: the gradients of what trains last, the loss, and the number of examples.
CRITIC, MAKER = (6 * 8 + 8) + (8 + 1), (6 * 8 + 8) + (8 * 6 + 6)
HEAD, BASE, TOLD = 8 * 3 + 3, 6 * 8 + 8, 2
NUMBERS = {
    "gan": CRITIC + MAKER + 2 * TOLD,
    "head": HEAD + TOLD,
    "unfreezing": BASE + HEAD + TOLD,
    "micro_batches": BASE + HEAD + TOLD,
}


@functools.cache
def alone(name):
    """What a run ends with on one device."""
    trainer, weights, logs = distributed.fitted(name, None)
    return weights, logs, trainer.step


def check(folder, name, worker):
    """Compare what a worker has ended with with the same on one device."""
    weights, logs, step = alone(name)
    said = json.loads((folder / f"{name}-{worker}.json").read_text())
    assert said["step"] == step
    assert said["logs"].keys() == logs.keys()
    for log, values in logs.items():
        np.testing.assert_allclose(said["logs"][log], values, rtol=1e-5, atol=1e-6, err_msg=f"{name} {log}")
    with np.load(folder / f"{name}-{worker}.npz") as found:
        assert set(found.files) == set(weights)
        for path, value in weights.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} {path}")
    return said


def test_two_devices_of_one_process(tmp_path):
    arguments = ["-m", "tests.support.distributed", str(tmp_path), *OF_DEVICES]
    environment = {**os.environ, "PYTHONPATH": str(workers.ROOT)}
    subprocess.run([sys.executable, *arguments], env=environment, cwd=workers.ROOT, check=True, timeout=300)
    for name in OF_DEVICES:
        check(tmp_path, name, 0)


def test_two_workers(tmp_path):
    printed = workers.ran(2, "-m", "tests.support.distributed", tmp_path, *OF_WORKERS, *OF_DATA)
    for name in OF_WORKERS:
        # Every worker has the same weights and logs in the end, whichever of them the user looks at.
        said = [check(tmp_path, name, worker) for worker in range(2)]
        assert name not in NUMBERS or said[0]["bytes"] == 4 * NUMBERS[name]
    for name in (*OF_WORKERS, *OF_DATA):
        first, second = (np.load(tmp_path / f"{name}-{worker}.npz") for worker in range(2))
        assert all(np.array_equal(first[path], second[path]) for path in first.files), name
    assert not [line for output in printed for line in output.splitlines() if "topological" in line]


def test_four_workers(tmp_path):
    workers.ran(4, "-m", "tests.support.distributed", tmp_path, *EVERYWHERE)
    for name in EVERYWHERE:
        check(tmp_path, name, 3)


@pytest.mark.parametrize("name", ["head"])
def test_a_run_differs_where_the_weights_do(tmp_path, name):
    """The comparison above would notice."""
    weights, _, _ = alone(name)
    np.savez(tmp_path / f"{name}-0.npz", **{path: value + 1e-3 for path, value in weights.items()})
    (tmp_path / f"{name}-0.json").write_text(json.dumps({"step": alone(name)[2], "logs": alone(name)[1]}))
    with pytest.raises(AssertionError):
        check(tmp_path, name, 0)
