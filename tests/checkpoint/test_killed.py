"""Processes that are killed at any moment: what goes on from them ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys

import pytest

FEW, MANY = 3, 50


def killed(ending, kills, seed):
    command = [sys.executable, "-m", "tests.support.killed", ending, str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_bit_for_bit(kills):
    results = killed("SIGKILL", kills, kills)
    assert results["statuses"].count(int(signal.SIGKILL)) >= kills
    assert results["finished"] >= 1
    assert results["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", [FEW, MANY])
def test_a_run_that_a_scheduler_ends_repeats_no_step(kills):
    results = killed("SIGTERM", kills, kills)
    # Before the fit has begun, the signal ends the process as it does any other.
    assert set(map(os.waitstatus_to_exitcode, results["statuses"])) <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}
    assert results["repeated"]
    assert all(ended == saved for ended, saved in results["repeated"])
    assert results["differences"] == []
