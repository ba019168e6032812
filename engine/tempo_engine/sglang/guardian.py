"""Runs a command that must not outlive its parent: `python guardian.py COMMAND...`. Needs nothing but the standard library.

The parent holds the other end of this process's standard input. When it ends, in whatever way, that end closes, and the command
goes with everything it started. A terminal's Ctrl-C does not reach the command: its parent decides when it ends.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_begin)
    threading.Thread(target=_wait_for_end, args=(child.pid,), daemon=True).start()
    code = child.wait()
    _kill(child.pid)  # what it started and left behind
    return code


def _begin() -> None:
    """In the child: handlers as ever, and should even this process be killed, so is the command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_end(group: int) -> None:
    while os.read(0, 1024):
        pass
    _kill(group)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
