"""The measuring side of worker.py: one process for one stack."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tempo_em.servers import own_gpus
from tempo_em.throughput.work import Case

# Freed memory goes back to the system at once, on every side: what is resident is what is in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


# For a stack to close its samplers and servers.
SECONDS_TO_END = 60.0


class Failed(Exception):
    """A stack broke; the sentence says how."""


def one_gpu() -> dict[str, str]:
    """All sides have the same one, where there are several: a trainer that sees more takes more."""
    gpus = own_gpus()
    return {"CUDA_VISIBLE_DEVICES": str(gpus[0])} if gpus else {}


class Process:
    """`with Process("steps", "trl", case) as one: one.ask("go")`. One thread; `python` is the interpreter if not this one."""

    def __init__(
        self, kind: str, stack: str, case: Case, *more: str, python: str | None = None,
        environment: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        self.stack = stack
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [python or sys.executable, "-m", "tempo_em.throughput.worker", kind, stack, json.dumps(asdict(case)), *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **one_gpu(), **environment},
        )  # fmt: skip

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """It ends by itself, with all that it started; killed if that takes long, or if we leave in a hurry."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if kind is None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_END)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()

    def ask(self, command: str = "") -> dict[str, Any]:
        """The next line it says, after it was given this command. Raises Failed when it has nothing more to say."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if command:
                self.process.stdin.write(f"{command}\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self.last_words()}
        if "error" in answer:
            raise Failed(f"failed: {answer['error']}")
        return answer

    def finish(self) -> None:
        """Wait until it has ended by itself."""
        if self.process.wait():
            raise Failed(f"failed: {self.last_words()}")

    def last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1] if lines else f"it ended with exit code {self.process.returncode}"
