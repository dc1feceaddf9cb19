"""Starting local workers, and waiting for them."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 240  # after which workers are taken for hung


def free_ports(count):
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def started(workers, *arguments):
    """Start the same program as several workers; their output is to be read."""
    hosts, processes = [f"localhost:{port}" for port in free_ports(workers)], []
    for index in range(workers):
        config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        # Each has all processors to itself otherwise, which all then fight for.
        few = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONPATH": str(ROOT), **few}
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def ended(processes, seconds=SECONDS):
    """Wait for all workers, and return the status and the output of each; one that hangs is killed, and has None."""
    results, deadline = [], time.monotonic() + seconds
    for process in processes:
        try:
            output = process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
            results.append((process.returncode, output))
        except subprocess.TimeoutExpired:
            process.kill()
            results.append((None, process.communicate()[0]))
    return results


def ran(workers, *arguments):
    """Run a program as several workers, all of which must end well, and return what they printed."""
    results = ended(started(workers, *arguments))
    assert [status for status, _ in results] == [0] * workers, "\n".join(output[-2000:] for _, output in results)
    return [output for _, output in results]


def wait_for(process, pattern):
    """Read what a worker prints until a line matches, and return the match."""
    for line in process.stdout:
        found = re.search(pattern, line)
        if found:
            return found
    raise AssertionError(f"The worker ended without {pattern!r}.")
