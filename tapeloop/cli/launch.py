"""Starting the workers of one machine, joining what they print, and stopping all of them when one fails."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from tapeloop.cli.answer import BadUsage

PR_SET_PDEATHSIG = 1  # of Linux' <sys/prctl.h>
DRAIN_SECONDS = 1.0  # for what a process that has left its worker's group may still print when all workers have ended
AT_ONCE = 1 << 16  # bytes


def worker_command(script: str, arguments: Sequence[str], *, is_module: bool) -> list[str]:
    """Return the command of a worker.

    Args:
        script: The path of a script, or the name of a module.
        arguments: What it is given.
        is_module: Which of the two it is.

    Raises:
        BadUsage: There is no such script, or workers cannot be started here.
    """
    if os.name != "posix":
        raise BadUsage(f"`tapeloop launch` needs Linux or macOS. Received: a system of the kind {os.name!r}.")
    given = os.environ.get("TF_CONFIG")
    if given:
        raise BadUsage(
            "`tapeloop launch` gives each worker a `TF_CONFIG` of its own, and the environment has one already. Unset "
            "it if all workers are to run on this machine; in a cluster, start the script with `python` on each host. "
            f"Received: TF_CONFIG={given}"
        )
    # Python looks for a module where the workers run, and says what it does not find.
    if not is_module and not pathlib.Path(script).exists():
        raise BadUsage(f"There is no script {script}. Of a module, give the name: `-m package.module`.")
    return [sys.executable, *(["-m"] if is_module else []), script, *arguments]


def launch(command: Sequence[str], workers: int, grace_seconds: float) -> int:
    """Start a command as several workers, wait until all have ended, and return the exit status.

    Args:
        command: What each worker runs.
        workers: How many there are.
        grace_seconds: How long after SIGTERM a worker is killed, if another one has failed.
    """
    group = _Group(grace_seconds)
    group.run(command, _free_ports(workers))
    if group.failed is None:
        return 0
    index, status = group.failed
    others = ", and the others were stopped" if group.has_stopped_others else ""
    killed = ", ".join(map(str, group.killed))
    late = f" Killed, since they had not ended {grace_seconds:g} s after SIGTERM: {killed}." if killed else ""
    sys.stderr.write(f"Worker {index} {_ending(status)}{others}.{late}\n")
    return status if status >= 0 else 128 - status


def _free_ports(number: int) -> list[int]:
    """Return ports that are free now.

    They are all bound at the same time, so that they differ, and on all addresses, as TensorFlow will.
    """
    # What remains of the race: until a worker binds its port, after the seconds of importing TensorFlow, the system may
    # give that port to another program. The worker then fails, and with it all: nothing is lost but the start.
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


class _Worker:
    """A process, and the two pipes that it prints to.

    Attributes:
        index: Its number.
        status: Its exit status, negative if a signal ended it. None while it runs.
        process: The process.
    """

    def __init__(self, index: int, command: Sequence[str], ports: Sequence[int]) -> None:
        """Start it."""
        cluster = {"worker": [f"localhost:{port}" for port in ports]}
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        self.index = index
        self.status: int | None = None
        self._is_told = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # several workers cannot share a keyboard
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1"},
            # In a group of its own, a worker does not get the terminal's Ctrl-C beside the one that is passed on, and
            # can be killed together with the processes that it has started.
            start_new_session=True,
            preexec_fn=_before_exec(os.getpid()),
        )

    def ask_to_stop(self, number: int) -> None:
        """Send a signal, if none was sent before: a run that is saving itself would be cut short by a second one."""
        if self.status is None and not self._is_told:
            self._is_told = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it and what it has started."""
        # macOS refuses to signal a group of which only a process that has ended is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Return whether it has ended since this was asked last."""
        if self.status is not None or self.process.poll() is None:
            return False
        self.kill()  # what it has started and left behind: it would outlive the launcher, and holds the pipes
        self.status = self.process.returncode
        return True


class _Group:
    """The workers together.

    Attributes:
        failed: The number of the worker that failed first, and its status.
        has_stopped_others: Whether others were running then, and had to be stopped.
        killed: The numbers of those that did not end when they were told to.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.failed: tuple[int, int] | None = None
        self.has_stopped_others = False
        self.killed: list[int] = []
        self._grace_seconds = grace_seconds
        self._workers: list[_Worker] = []
        self._pipes: list[_Pipe] = []
        self._screen = _Screen()
        self._passed_on: int | None = None
        self._kill_at: float | None = None

    def run(self, command: Sequence[str], ports: Sequence[int]) -> None:
        """Start the workers and wait until they have ended."""
        with selectors.DefaultSelector() as selector, self._signals_handled(selector):
            try:
                for index in range(len(ports)):
                    self._start(_Worker(index, command, ports), selector)
                self._wait(selector)
            finally:  # whatever has gone wrong here
                self._kill()
                for worker in self._workers:
                    worker.process.wait()

    def _start(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        self._workers.append(worker)
        if self._passed_on is not None:  # while it was being started
            worker.ask_to_stop(self._passed_on)
        for source, target in ((worker.process.stdout, sys.stdout), (worker.process.stderr, sys.stderr)):
            assert source is not None
            pipe = _Pipe(source, target.buffer, f"[{worker.index}] ".encode(), self._screen)
            self._pipes.append(pipe)
            selector.register(source, selectors.EVENT_READ, pipe.read)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        drained_at = None
        while True:
            now = time.monotonic()
            if all(worker.status is not None for worker in self._workers):
                drained_at = now + DRAIN_SECONDS if drained_at is None else drained_at
                if now >= drained_at or all(pipe.is_at_end for pipe in self._pipes):
                    break
            times = [at for at in (self._kill_at, drained_at) if at is not None]
            for key, _ in selector.select(max(0.0, min(times) - now) if times else None):
                if not key.data():
                    selector.unregister(key.fileobj)
            self._look_at_workers()
        for pipe in self._pipes:
            pipe.finish()

    def _look_at_workers(self) -> None:
        for worker in self._workers:
            if worker.has_ended() and worker.status and self.failed is None:
                self.failed = worker.index, worker.status
        # If nobody reads any more, as after `| head`, a program would end too.
        if (self.failed or self._screen.is_broken) and self._passed_on is None:
            self._stop(signal.SIGTERM)
            self.has_stopped_others = any(worker.status is None for worker in self._workers)
            self._kill_at = time.monotonic() + self._grace_seconds
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            self.killed = [worker.index for worker in self._workers if worker.status is None]
            self._kill()

    def _stop(self, number: int) -> None:
        self._passed_on = number
        for worker in self._workers:
            worker.ask_to_stop(number)

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.status is None:
                worker.kill()

    @contextlib.contextmanager
    def _signals_handled(self, selector: selectors.BaseSelector) -> Iterator[None]:
        """Pass signals on inside this context, and have the selector wake up when a worker ends."""
        interrupts = 0

        def interrupt(number: int, frame: Any) -> None:
            nonlocal interrupts
            interrupts += 1
            if interrupts > 1:
                self._kill()
            else:
                self._stop(number)

        def stop(number: int, frame: Any) -> None:
            self._stop(signal.SIGTERM)

        def wake(number: int, frame: Any) -> None:
            pass  # the byte that Python writes for it wakes the selector

        handlers: dict[int, Callable[[int, Any], None]] = {
            signal.SIGINT: interrupt, signal.SIGTERM: stop, signal.SIGHUP: stop, signal.SIGCHLD: wake
        }  # fmt: skip
        # One that is ignored, as by `nohup` or for a job in the background, stays so, for the workers too.
        found = {number: signal.getsignal(number) for number in handlers}
        handled = [n for n in handlers if n == signal.SIGCHLD or found[n] is not signal.SIG_IGN]
        reading, writing = socket.socketpair()
        with reading, writing:
            reading.setblocking(False)
            writing.setblocking(False)
            selector.register(reading, selectors.EVENT_READ, lambda: reading.recv(AT_ONCE))
            before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
            for number in handled:
                signal.signal(number, handlers[number])
            try:
                yield
            finally:
                for number in handled:
                    signal.signal(number, found[number])
                signal.set_wakeup_fd(before)
                selector.unregister(reading)


class _Screen:
    """Where the workers' lines are joined.

    Attributes:
        is_broken: Whether nobody reads any more.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self._bar: _Pipe | None = None  # whose line stands on the terminal without its end

    def show_line(self, pipe: _Pipe, text: bytes) -> None:
        """Show a whole line."""
        again = b"\r" if self._bar is pipe else self._after_bar(pipe)
        self._write(pipe.target, again + pipe.prefix + text + b"\n")
        if self._bar is pipe:
            self._bar = None

    def redraw(self, pipe: _Pipe, text: bytes) -> None:
        """Show a line that is to be drawn again in the same place."""
        self._write(pipe.target, self._after_bar(pipe) + b"\r" + pipe.prefix + text)
        self._bar = pipe

    def _after_bar(self, pipe: _Pipe) -> bytes:
        # A bar of another's keeps its line, and is drawn again further down.
        if self._bar is None or self._bar is pipe or not pipe.is_terminal:
            return b""
        self._bar = None
        return b"\n"

    def _write(self, target: IO[bytes], data: bytes) -> None:
        try:
            target.write(data)
            target.flush()
        except OSError:
            self.is_broken = True
            # What is still in the buffer would fail again, now and when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, target.fileno())
            os.close(nowhere)


class _Pipe:
    r"""What a worker prints to its standard output or error, taken apart into lines.

    A bar draws its line again after each `\r`. A terminal shows it so; a file gets the line as it is in the end.

    Attributes:
        target: Where it is shown.
        prefix: What stands before each line.
        is_terminal: Whether it is shown on a terminal.
        is_at_end: Whether no more will come.
    """

    def __init__(self, source: IO[bytes], target: IO[bytes], prefix: bytes, screen: _Screen) -> None:
        self.target = target
        self.prefix = prefix
        self.is_terminal = target.isatty()
        self.is_at_end = False
        self._source = source
        self._screen = screen
        self._pending = b""  # the last line, as far as it has come

    def read(self) -> bool:
        """Show the lines that have come, and return whether there may be more."""
        data = os.read(self._source.fileno(), AT_ONCE)
        if not data:
            self.finish()
            return False
        *lines, pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._screen.show_line(self, _last_drawn(line))
        if b"\r" in pending:
            drawn = _last_drawn(pending)
            # A `\r` at the end may belong to a `\r\n`, of which the rest is still to come.
            pending = b"\r" + drawn + (b"\r" if pending.endswith(b"\r") else b"")
            if self.is_terminal:
                self._screen.redraw(self, drawn)
        self._pending = pending
        return True

    def finish(self) -> None:
        """Show a last line that has no end."""
        if not self.is_at_end:
            self.is_at_end = True
            if self._pending:
                self._screen.show_line(self, _last_drawn(self._pending))
            self._source.close()


def _last_drawn(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _before_exec(parent: int) -> Callable[[], None] | None:
    """Return what has the kernel kill a worker when the launcher ends in whatever way, by SIGKILL too.

    Linux alone has this, for workers and not for what they start. On macOS workers outlive a launcher that is killed.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # it has ended before this was said
            os.kill(os.getpid(), signal.SIGKILL)

    return before_exec


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    known = {each.value: each.name for each in signal.Signals}
    return f"was ended by {known.get(-status, f'signal {-status}')}"
