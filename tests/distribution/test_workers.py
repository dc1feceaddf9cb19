"""Workers that disagree, that are told to end, and that die."""

import random
import re
import signal

import numpy as np
import pytest

from tests.support import distributed, saved_workers, workers

# The others notice within seconds that a worker is gone, and at the latest when it has been silent for TensorFlow's
# own deadline.
NOTICED_S = 60


def told(output):
    """What a worker was told, by what was wrong."""
    return dict(re.findall(r"^([a-z ]+): (.*)$", output, re.MULTILINE))


def test_workers_that_do_not_train_the_same_are_told_so_all_of_them():
    trainer, (x, y) = distributed.made("head", None), distributed.data()
    loss = trainer.train_on_batch(x[:7], y[:7])["loss"]
    predicted = np.abs(trainer.predict(x[:5])).sum()
    outputs = workers.ran(2, "-m", "tests.support.disagreeing")
    for worker, output in enumerate(outputs):
        said = told(output)
        begins = "WorkerError: Workers must train the same, and of 2 workers 1 differs from worker 0 in "
        policy = "Freeze(glob('base'))" if worker else "TrainAll()"
        assert said["policy"].startswith(
            f"{begins}the policy. Worker {worker} has the policy: {policy}. Start the same"
        )
        assert said["data"].startswith(f"{begins}the data. Worker {worker} has the data: ")
        assert f"'examples': {60 if worker else 80}" in said["data"]
        assert said["batches"].startswith(f"{begins}the batches. Worker {worker} has the batches: {4 - worker}.")
        assert said["weights"].startswith(f"{begins}the weights.")
        assert "The workers ended the epoch with different weights: code of yours, such as" in said["set"]
        assert said["batch size"] == (
            "DataError: `x` has a batch of 1 for 2 devices, each of which computes a share of it. Choose another "
            "`batch_size`, or leave out the examples that are left over."
        )
        assert "A batch of 1 cannot be shared by 2 devices" in said["dataset"]
        assert "stopped after 1" in output  # by a callback of one worker alone
        found = re.search(r"on batch (\S+) (\S+)", output)
        np.testing.assert_allclose([float(found[1]), float(found[2])], [loss, predicted], rtol=1e-4)


def saved(folder, count, seconds=0.0):
    return workers.started(count, "-m", "tests.support.saved_workers", folder, seconds)


def ends(results):
    """What the workers of a run have ended with: all with the same."""
    assert {status for status, _ in results} == {0}, "\n".join(output[-2000:] for _, output in results)
    (found,) = {tuple(re.search(r"END (.*)", output)[1].split()) for _, output in results}
    return np.array(found, float)


def kill_one(folder, draw, how):
    """Kill one of three workers at some step, or have it fall silent, and look at how the others stop."""
    processes, victim = saved(folder, 3, 0.05), draw.randrange(3)
    workers.wait_for(processes[victim], rf"step {draw.randrange(3, 20)}\b")
    processes[victim].send_signal(how)
    others = workers.ended([each for each in processes if each is not processes[victim]], NOTICED_S)
    processes[victim].kill()
    workers.ended([processes[victim]])
    for status, output in others:
        assert status == 1, output[-2000:]  # and not None: hung
        assert re.search(r"WorkerError: Worker \d of 3 had to stop: another worker is gone", output), output[-2000:]


def check_killed(tmp_path, kills, draw, ways=(signal.SIGKILL,)):
    expected = np.array(saved_workers.trained(None).split(), float)
    for number in range(kills):
        folder = tmp_path / str(number)
        kill_one(folder, draw, draw.choice(ways))
        results = workers.ended(saved(folder, draw.choice([2, 3])))
        np.testing.assert_allclose(ends(results), expected, rtol=1e-5, atol=1e-5)
        # It went on, and did not begin again.
        assert re.search(r"Resuming from .*step ([1-9]\d*)", results[0][1]), results[0][1][-2000:]


def test_a_worker_that_is_killed_stops_the_others_and_the_run_resumes(tmp_path):
    check_killed(tmp_path, 1, random.Random(1))


@pytest.mark.slow  # 10 times
def test_workers_that_are_killed_at_random(tmp_path):
    check_killed(tmp_path, 10, random.Random(2), (signal.SIGKILL, signal.SIGSTOP))


def test_all_workers_end_after_the_same_step_if_one_of_them_is_told_to(tmp_path):
    processes = saved(tmp_path / "ended", 2, 0.05)
    workers.wait_for(processes[1], r"step 5\b")
    processes[1].send_signal(signal.SIGTERM)
    (chief, said), (other, _) = workers.ended(processes)
    assert (chief, other) == (128 + signal.SIGTERM,) * 2
    step = int(re.search(r"Stopped by SIGTERM after step (\d+)", said)[1])
    results = workers.ended(saved(tmp_path / "ended", 3))
    assert f"step {step}, after" in results[0][1]
    expected = np.array(saved_workers.trained(None).split(), float)
    np.testing.assert_allclose(ends(results), expected, rtol=1e-5)
