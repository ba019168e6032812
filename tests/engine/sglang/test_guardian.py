"""With real processes: a guarded command ends when it must, and only then."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tempo_engine.sglang.guardian as guardian

GUARDED = [sys.executable, guardian.__file__]
# A command with a child of its own: it writes down both process ids, and ends only when it is killed.
COMMAND = "sleep 300 & echo $$ $! > {file}.part; mv {file}.part {file}; wait"
PARENT = "import subprocess, sys, time; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); time.sleep(300)"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """start(*command): a process in a session of its own, as servers are started; killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in filter(None, (process.stdin, process.stdout)):
            stream.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(file: Path) -> list[int]:
    """Process ids of the command and of its child, once they are there."""
    until(file.exists)
    pids = [int(pid) for pid in file.read_text().split()]
    assert all(is_alive(pid) for pid in pids)
    return pids


def test_the_command_and_its_children_end_when_standard_input_closes(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start(*GUARDED, "sh", "-c", COMMAND.format(file=tmp_path / "pids"))
    pids = running(tmp_path / "pids")
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    until(lambda: not any(is_alive(pid) for pid in pids))


def test_the_command_and_its_children_end_when_the_parent_is_killed(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    parent = start(sys.executable, "-c", PARENT, *GUARDED, "sh", "-c", COMMAND.format(file=tmp_path / "pids"))
    pids = running(tmp_path / "pids")
    (guard,) = psutil.Process(parent.pid).children()
    parent.kill()
    until(lambda: not any(is_alive(pid) for pid in [guard.pid, *pids]))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel kills no children")
def test_the_command_ends_even_when_its_guardian_is_killed(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start(*GUARDED, "sleep", "300")
    until(lambda: bool(psutil.Process(process.pid).children()))
    (command,) = psutil.Process(process.pid).children()
    until(lambda: command.name() == "sleep")  # before, it has not asked for it yet
    process.kill()
    until(lambda: not is_alive(command.pid))


def test_what_the_command_leaves_behind_ends_with_it(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = start(*GUARDED, "sh", "-c", f"sleep 300 & echo $! > {tmp_path / 'pid'}; exit 0")
    assert process.wait() == 0
    until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_passes_through(start: Callable[..., subprocess.Popen[bytes]], code: int) -> None:
    assert start(*GUARDED, "sh", "-c", f"exit {code}").wait() == code


def test_a_command_that_is_killed_does_not_count_as_done(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    assert start(*GUARDED, "sh", "-c", "kill -9 $$").wait() != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_terminal_sends_to_the_group_does_not_reach_the_command(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*GUARDED, "sh", "-c", f"echo > {tmp_path / 'begun'}; read line < {fifo(tmp_path)}; exit 7")
    until((tmp_path / "begun").exists)
    os.killpg(process.pid, number)
    (tmp_path / "fifo").write_text("go on\n")
    assert process.wait() == 7, "neither the guardian nor the command heard it"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def test_the_command_itself_can_be_told_to_end(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Its handlers are the usual ones, whatever the guardian ignores."""
    process = start(*GUARDED, "sh", "-c", f"echo $$ > {tmp_path / 'pid'}; exec sleep 300")
    until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert process.wait() != 0


def test_output_is_the_commands_own(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start(*GUARDED, "echo", "ready")
    assert process.stdout is not None
    assert process.stdout.read() == b"ready\n"
