"""`tapeloop launch`: what workers are given, how their output is joined, and how they end together."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support.commands import ask

ROOT = pathlib.Path(__file__).parents[2]
# Whatever starts the tests may have Ctrl-C ignored, as a shell does for what runs in the background.
LAUNCH = """
import signal
from tapeloop.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
WORKER = """
import json, os, pathlib, signal, subprocess, sys, time
CONFIG = json.loads(os.environ["TF_CONFIG"])
INDEX = CONFIG["task"]["index"]
def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
"""
# Says which signals it gets, and saves itself, which takes a while.
SAVES = """
got = []
def save(number, frame):
    got.append(signal.Signals(number).name)
    if len(got) == 1:
        time.sleep(0.3)
        pathlib.Path(f"saved-{INDEX}").write_text(" ".join(got))
        sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"ready-{INDEX}").touch()
print("ready", os.getpid())
"""
WAITS = "time.sleep(60)\n"  # longer than a test that fails


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Write a script, and start the launcher on it in that folder."""
    launched = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))

    def start(script, *options, arguments=(), named="script.py", boot=LAUNCH, **streams):
        (tmp_path / "script.py").write_text(WORKER + textwrap.dedent(script))
        command = [sys.executable, "-c", boot, "launch", "-n", "2", *options, named, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        # Not what libraries have set beside Python, such as readline's COLUMNS.
        launched.append(subprocess.Popen(command, env=dict(os.environ), **streams))
        return launched[-1]

    yield start
    for each in launched:
        each.kill()
        each.communicate()


@pytest.fixture
def run(start):
    """Launch a script, and return the exit status, the standard output and the standard error."""

    def run(script, *options, **keywords):
        launcher = start(script, *options, **keywords)
        out, err = launcher.communicate(timeout=50)
        return launcher.returncode, out.decode(), err.decode()

    return run


def processes(launcher):
    """Wait until both workers of `SAVES` are ready, and return the numbers of their processes."""
    lines = [launcher.stdout.readline().decode().split() for _ in range(2)]
    assert [said for _, said, _ in lines] == ["ready", "ready"]
    return [int(number) for _, _, number in sorted(lines)]


def are_gone(numbers):
    """Whether processes end within some seconds. Nobody may be there to bury those whose parent was killed."""
    for _ in range(500):
        if not any(map(is_running, numbers)):
            return True
        time.sleep(0.01)
    return False


def is_running(number):
    try:
        os.kill(number, 0)
        about = pathlib.Path(f"/proc/{number}/stat")
        # The state, after the name in brackets. Z: it has ended, and nobody has asked how.
        return not pathlib.Path("/proc").exists() or about.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


# What workers are given


def test_each_worker_finds_the_cluster_and_its_own_number(run):
    status, said, error = run('print(os.environ["TF_CONFIG"])', "-n", "3")
    given = [json.loads(line.partition(" ")[2]) for line in sorted(said.splitlines())]
    assert (status, error) == (0, "")
    assert [each["task"] for each in given] == [{"type": "worker", "index": index} for index in range(3)]
    assert given[0]["cluster"] == given[1]["cluster"] == given[2]["cluster"]
    assert list(given[0]["cluster"]) == ["worker"]
    hosts, ports = zip(*(address.split(":") for address in given[0]["cluster"]["worker"]))
    assert set(hosts) == {"localhost"}
    assert len(set(ports)) == 3
    assert all(1024 <= int(port) < 65536 for port in ports)


def test_the_ports_can_be_bound(run):
    script = """
        import socket
        port = int(CONFIG["cluster"]["worker"][INDEX].rpartition(":")[2])
        socket.socket().bind(("", port))
        print(port)
    """
    status, said, error = run(script)
    assert (status, error, len(said.splitlines())) == (0, "", 2)


@pytest.mark.parametrize("named", [["script.py"], ["-m", "script"]], ids=" ".join)
def test_arguments_pass_through(run, named):
    given = ["--epochs", "3", "-n", "5", "--help", "a b", "", "--", "-m", "--grace=x", "*", "é"]
    status, said, _ = run("print(json.dumps(sys.argv[1:]))", *named[:-1], named=named[-1], arguments=given)
    assert status == 0
    assert [json.loads(line.partition(" ")[2]) for line in said.splitlines()] == [given, given]


def test_nothing_else_of_the_environment_changes(run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    status, said, _ = run("print(json.dumps(dict(os.environ)))")
    assert status == 0
    for line in said.splitlines():
        found = json.loads(line[4:])
        assert set(found) - set(os.environ) <= {"TF_CONFIG", "PYTHONUNBUFFERED", "LC_CTYPE"}
        assert all(found[name] == value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED")


def test_no_worker_takes_what_is_typed(run, tmp_path):
    (tmp_path / "typed").write_text("text\n")
    with (tmp_path / "typed").open() as typed:
        assert run("print(repr(sys.stdin.read()))", "-n", "1", stdin=typed) == (0, "[0] ''\n", "")


def test_it_needs_no_tensorflow(run, tmp_path):
    for name in ("tensorflow", "keras", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not needed')")
    assert run("print('here')", "-n", "1") == (0, "[0] here\n", "")


# What they print


def test_their_lines_are_joined(run):
    script = """
        for number in range(200):
            print(INDEX, number)
            print("error", INDEX, number, file=sys.stderr)
        print("the end has", "no end of a line", end="")
        print("é", end="", file=sys.stderr)
    """
    status, said, error = run(script)
    assert status == 0
    for index in range(2):
        lines = [line for line in said.splitlines() if line.startswith(f"[{index}] ")]
        assert lines == [*(f"[{index}] {index} {n}" for n in range(200)), f"[{index}] the end has no end of a line"]
        lines = [line for line in error.splitlines() if line.startswith(f"[{index}] ")]
        assert lines == [*(f"[{index}] error {index} {n}" for n in range(200)), f"[{index}] é"]
    assert len(said.splitlines()) == len(error.splitlines()) == 402


HALF = """
    if INDEX == 0:
        print("half of ", end="")
        pathlib.Path("half").touch()
        wait_for("whole")
        print("a line")
    else:
        wait_for("half")
        print("a whole line")
        pathlib.Path("whole").touch()
"""


def test_no_line_is_cut_by_that_of_another_worker(run):
    status, said, _ = run(HALF)
    assert (status, sorted(said.splitlines())) == (0, ["[0] half of a line", "[1] a whole line"])


BAR = """
    if INDEX == 0:
        for done in (0, 50, 100):
            sys.stderr.write(f"\\rdone {done}%")
            wait_for(f"seen {done}%")
        wait_for("seen line")
        sys.stderr.write("\\rdone at last\\n")
        print("a line of Windows\\r\\nand one more", file=sys.stderr)
    else:
        wait_for("seen 100%")
        print("a line")
"""


def test_a_file_gets_a_bar_as_it_is_in_the_end(run, tmp_path):
    for name in ("0%", "50%", "100%", "line"):
        (tmp_path / f"seen {name}").touch()
    assert run(BAR) == (0, "[1] a line\n", "[0] done at last\n[0] a line of Windows\n[0] and one more\n")


def test_a_terminal_shows_a_bar_as_it_grows_and_other_lines_below(start, tmp_path):
    terminal, side = pty.openpty()
    launcher = start(BAR, stdout=side, stderr=side)
    os.close(side)
    shown = ""

    def read_until(end):
        nonlocal shown
        while not shown.endswith(end):
            shown += os.read(terminal, 1).decode()

    for name in ("0%", "50%", "100%", "line"):
        read_until(f"{name}\r\n" if name == "line" else name)
        (tmp_path / f"seen {name}").touch()
    read_until("one more\r\n")
    os.close(terminal)
    assert launcher.wait(50) == 0
    bar = "\r[0] done 0%\r[0] done 50%\r[0] done 100%"
    below = "\n[1] a line\n[0] done at last\n[0] a line of Windows\n[0] and one more\n"
    assert shown.replace("\r\n", "\n") == bar + below


def test_when_nobody_reads_any_more_all_stop(start):
    launcher = start(SAVES + "wait_for('closed')\nwhile True:\n    print('more')\n    time.sleep(0.01)\n")
    workers = processes(launcher)
    launcher.stdout.close()
    pathlib.Path("closed").touch()
    assert launcher.wait(50) == 143
    assert are_gone(workers)
    assert [pathlib.Path(f"saved-{index}").read_text() for index in range(2)] == ["SIGTERM", "SIGTERM"]


# How they end


def test_when_one_fails_the_others_save_themselves(run):
    script = "if INDEX == 1:\n    wait_for('ready-0')\n    sys.exit(3)\n" + SAVES + WAITS
    status, _, error = run(script)
    assert (status, error) == (3, "Worker 1 ended with exit status 3, and the others were stopped.\n")
    assert pathlib.Path("saved-0").read_text() == "SIGTERM"


def test_a_worker_that_a_signal_ends(run):
    script = "if INDEX == 0:\n    wait_for('ready-1')\n    os.kill(os.getpid(), signal.SIGSEGV)\n" + SAVES + WAITS
    status, _, error = run(script)
    assert (status, error) == (139, "Worker 0 was ended by SIGSEGV, and the others were stopped.\n")


def test_a_traceback_is_shown(run):
    status, _, error = run("raise ValueError('no data')", "-n", "1")
    assert status == 1
    assert error.endswith("[0] ValueError: no data\nWorker 0 ended with exit status 1.\n")


def test_one_that_ends_well_leaves_the_others_running(run):
    script = """
        if INDEX == 0:
            pathlib.Path("first").touch()
            sys.exit()
        wait_for("first")
        time.sleep(0.3)
        print("on")
        sys.exit(5)
    """
    assert run(script) == (5, "[1] on\n", "Worker 1 ended with exit status 5.\n")


def test_one_that_does_not_end_is_killed_after_the_grace_period(run):
    script = """
        if INDEX == 1:
            wait_for("deaf")
            sys.exit(3)
        signal.signal(signal.SIGTERM, lambda number, frame: print("heard"))
        pathlib.Path("deaf").touch()
        while True:
            time.sleep(0.01)
    """
    began = time.monotonic()
    status, said, error = run(script, "--grace", "0.5")
    assert 0.5 < time.monotonic() - began < 30
    assert (status, said) == (3, "[0] heard\n")
    assert error == (
        "Worker 1 ended with exit status 3, and the others were stopped. "
        "Killed, since they had not ended 0.5 s after SIGTERM: 0.\n"
    )


@pytest.mark.parametrize(("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_a_signal_is_passed_on_once_and_waited_for(start, sent, received):
    launcher = start(SAVES + WAITS, "--grace", "0")  # which is not for this
    workers = processes(launcher)
    launcher.send_signal(signal.Signals[sent])
    if sent != "SIGINT":
        time.sleep(0.1)  # they are saving themselves
        launcher.send_signal(signal.Signals[sent])
    _, error = launcher.communicate(timeout=50)
    status = 128 + signal.Signals[received]
    assert launcher.returncode == status
    assert error.decode() in [f"Worker {index} ended with exit status {status}.\n" for index in range(2)]
    assert [pathlib.Path(f"saved-{index}").read_text() for index in range(2)] == [received, received]
    assert not any(map(is_running, workers))


def test_ctrl_c_reaches_a_worker_as_itself(start):
    launcher = start("print('ready', os.getpid())\n" + WAITS)
    processes(launcher)
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate(timeout=50)
    assert launcher.returncode == 130
    assert error.count(b"KeyboardInterrupt") == 2
    assert error.endswith(b" was ended by SIGINT.\n")


def test_workers_that_end_well_when_they_are_told_to_are_no_failure(start):
    launcher = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit())\nprint('ready', os.getpid())\n" + WAITS)
    processes(launcher)
    launcher.terminate()
    assert launcher.communicate(timeout=50) == (b"", b"")
    assert launcher.returncode == 0


def test_a_second_ctrl_c_kills(start):
    deaf = "signal.signal(signal.SIGINT, lambda *_: print('heard'))\nprint('ready', os.getpid())\n"
    launcher = start(deaf + "while True:\n    time.sleep(0.01)\n")
    workers = processes(launcher)
    launcher.send_signal(signal.SIGINT)
    assert sorted(launcher.stdout.readline() for _ in range(2)) == [b"[0] heard\n", b"[1] heard\n"]
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate(timeout=50)
    assert launcher.returncode == 137
    assert error.endswith(b" was ended by SIGKILL.\n")
    assert not any(map(is_running, workers))


def test_a_signal_that_is_ignored_stays_so(start):
    boot = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LAUNCH  # as `nohup` does
    launcher = start("print('ready', os.getpid())\nwait_for('on')\n", boot=boot)
    processes(launcher)
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    pathlib.Path("on").touch()
    assert launcher.communicate(timeout=50) == (b"", b"")
    assert launcher.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' kernel does this")
def test_no_worker_outlives_a_launcher_that_is_killed(start):
    launcher = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', os.getpid())\n" + WAITS)
    workers = processes(launcher)
    assert all(map(is_running, workers))
    launcher.kill()
    assert are_gone(workers)


@pytest.mark.parametrize("status", [0, 4])
def test_what_a_worker_has_started_ends_with_it(run, status):
    script = f"""
        if INDEX == 0:
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            print(started.pid)
            sys.exit({status})
    """
    began = time.monotonic()
    found, said, _ = run(script)
    assert found == status
    assert time.monotonic() - began < 30  # though it holds the pipes
    assert are_gone([int(said.split()[1])])


# What is refused


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("-n 0 script.py", "Invalid value for '--workers' / '-n'"),
        ("-n two script.py", "Invalid value for '--workers' / '-n'"),
        ("script.py", "Missing option '--workers' / '-n'."),
        ("-n 2", "Missing argument 'SCRIPT'."),
        ("-n 2 -m", "Missing argument 'SCRIPT'."),
        ("-n 2 --grace -1 script.py", "Invalid value for '--grace'"),
        ("-n 2 --threads 3 script.py", "No such option: --threads"),
        ("-n 2 none.py", "There is no script none.py. Of a module, give the name: `-m package.module`.\n"),
    ],
)
def test_what_cannot_be_started(line, text, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("raise AssertionError")
    status, said, error = ask(f"launch {line}")
    assert (status, said) == (2, "")
    assert text in error


def test_a_module_that_does_not_exist(run):
    status, _, error = run("", "-m", named="no_such_module")
    assert status == 1
    assert "[0] " in error
    assert "No module named no_such_module\n" in error


def test_the_workers_of_a_cluster_that_exists_already_are_not_started_again(tmp_path, monkeypatch):
    config = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
    monkeypatch.setenv("TF_CONFIG", config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("raise AssertionError")
    assert ask("launch -n 2 script.py") == (
        2,
        "",
        "`tapeloop launch` gives each worker a `TF_CONFIG` of its own, and the environment has one already. Unset "
        "it if all workers are to run on this machine; in a cluster, start the script with `python` on each host. "
        f"Received: TF_CONFIG={config}\n",
    )
