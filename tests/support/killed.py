"""Runs in processes that are killed: `python -m tests.support.killed SIGNAL KILLS SEED`.

A process that has imported TensorFlow, and never run an op, is forked for each attempt, which spares each the import.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import tapeloop as tl
from tests.support import runs

KIND, EPOCHS, LONGEST_S = "gradual", 20, 2.0
CHECKPOINTS = {"every_steps": 2, "keep": 2}


def attempt(folder, log):
    """Train until the end, in a process of its own: what it begins with and comes to is written to the log."""

    def said(what, trainer):
        with open(log, "a") as file:
            file.write(json.dumps([what, trainer.step, trainer.epoch]) + "\n")

    run, made = runs.RUNS[KIND], []

    def trainer():
        made.append(run.trainer())
        return made[0]

    begun = runs.Run(trainer, run.data, run.options)
    print("begins", flush=True)
    try:
        begun.fit(EPOCHS, folder and tl.Checkpoints(folder, **CHECKPOINTS))
    finally:
        said("ends", made[0])
    digest = runs.digest(made[0])
    with open(log, "a") as file:
        file.write(json.dumps(["digest", digest]) + "\n")


def forked(folder, log, ending=None, wait=0.0):
    """Run an attempt in a child, kill it after a while, and return how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        code = 1
        try:
            attempt(folder, log)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    os.read(read, 6)
    if ending is not None:
        time.sleep(wait)
        os.kill(child, ending)
    status = os.waitpid(child, 0)[1]
    os.close(read)
    return status


def main():
    ending, kills, seed = getattr(signal, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw, parent = random.Random(seed), pathlib.Path(tempfile.mkdtemp())
    reference = parent / "reference.log"
    assert forked(None, reference) == 0
    expected = json.loads(reference.read_text().splitlines()[-1])[1]
    results = {"statuses": [], "finished": 0, "differences": [], "repeated": [], "writing": 0}

    def goes_on():
        """Whether more are to be killed: by SIGTERM, until one at least was within its fit."""
        return kills > 0 or (ending == signal.SIGTERM and not results["repeated"])

    while goes_on():
        folder, log = parent / f"run{results['finished']}", parent / f"run{results['finished']}.log"
        folder.mkdir()
        status = 1
        while status != 0:
            # Once enough were killed, the last run goes to its end.
            status = forked(folder, log, ending if goes_on() else None, draw.uniform(0, LONGEST_S))
            kills -= status != 0
            results["statuses"].append(status)
            results["writing"] += any(path.name.startswith(".writing") for path in folder.iterdir())
            newest = tl.Checkpoints(folder).newest
            ends = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            if ending == signal.SIGTERM and status != 0 and os.WIFEXITED(status) and newest is not None:
                results["repeated"].append([ends[-1][1], json.loads((newest / "checkpoint.json").read_text())["step"]])
        found = ends[-1][1]
        results["differences"] += [
            [name, expected[name], found.get(name)] for name in expected if found.get(name) != expected[name]
        ]
        results["finished"] += 1
    shutil.rmtree(parent)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
