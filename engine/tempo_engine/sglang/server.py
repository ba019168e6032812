"""One SGLang server: a process of ours, started and killed, or somebody else's that we only talk to."""

import asyncio
import importlib.util
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch
import yaml

from tempo_engine.errors import UserError
from tempo_engine.sglang import VERSION
from tempo_engine.sglang.client import Client, Refused, Unreachable

LOOPBACK = "127.0.0.1"
LOOPBACKS = (LOOPBACK, "localhost", "::1")
# What torchrun says to its ranks must not reach a server, which has ranks of its own.
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
# SGLang keeps a few positions of a context for itself.
MARGIN = 8
# Between looks at a server that is starting.
POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How servers of ours are started. Names of `arguments` are SGLang's own, without dashes; they win over ours.

    `gpus` are the visible devices of all replicas, each replica taking tensor_parallel * data_parallel of them; empty: those of
    this process. `max_total_tokens` bounds the KV cache in tokens, `memory_fraction` weights and cache together in a share of the
    GPU.
    """

    dtype: str
    max_running: int
    context_length: int
    deterministic: bool = False
    tensor_parallel: int = 1
    data_parallel: int = 1
    max_total_tokens: int | None = None
    memory_fraction: float | None = None
    saves_memory: bool = False
    gpus: tuple[int | str, ...] = ()
    threads: int = 1
    port: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel * self.data_parallel


class Server:
    """A replica. `is_live` is set while requests may be sent to it, `version` is that of the weights it was last seen with, `asked`
    what waits for its answers."""

    def __init__(self, number: int, url: str, key: str, *, log: Path | None = None) -> None:
        self.number = number
        self.client = Client(url, key)
        self.key = key
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.is_live = False
        self.version: int | None = None
        self.complaint = "its process ended"  # why it was last suspected
        self.in_flight = 0
        self.asked: set[asyncio.Task[None]] = set()
        self.suspect = asyncio.Event()

    @property
    def name(self) -> str:
        return f"server {self.number} ({self.client.url})"

    @property
    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def start(self, options: ServerOptions, model: Path, *, is_blank: bool, version: int) -> None:
        """Start it in the background, on a free port of this machine, with a key that nobody else knows.

        `is_blank`: the folder holds a config only, weights follow. The key stands in a file that only this user can read, not in
        the list of processes.
        """
        assert self.log is not None
        port = options.port + self.number if options.port else free_port()
        self.key = secrets.token_hex(16)
        self.client = Client(f"http://{LOOPBACK}:{port}", self.key)
        settings = _settings(options, model, port, is_blank=is_blank, version=version) | {"api-key": self.key}
        config = self.log.with_suffix(".yaml")
        config.unlink(missing_ok=True)
        with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            yaml.safe_dump(settings, file)
        command = [sys.executable, "-m", "sglang.launch_server", "--config", str(config)]
        with self.log.open("ab") as log:
            self.process = _guarded(command, _environment(options, self.number), log)

    async def wait_until_ready(self, *, seconds: float) -> None:
        """Raises Unreachable when it ends, or takes longer; the message has the last words of its log."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.has_ended:
            try:
                await self.client.get("/health", seconds=10.0, attempts=1)
                if self.log is not None:
                    self.log.with_suffix(".yaml").unlink(missing_ok=True)  # with its key, which was read
                return
            except (Unreachable, Refused):
                pass
            if asyncio.get_running_loop().time() > deadline:
                raise Unreachable(f"{self.name} was not ready after {seconds:.0f} s; see {self.log}")
            await asyncio.sleep(POLL_SECONDS)
        raise Unreachable(f"{self.name} ended while it started: {_last_words(self.log)}; see {self.log}")

    async def kill(self) -> None:
        """The process, if it is ours, and everything it started."""
        await self.client.close()
        if self.process is not None:
            end(self.process)
            self.process = None


def from_disk(folder: Path, version: int) -> dict[str, Any]:
    """The update that reads this folder. Without a format, a server that began blank would load nothing."""
    return {"model_path": str(folder.resolve()), "load_format": "auto", "weight_version": str(version)}


def end(process: subprocess.Popen[bytes]) -> None:
    """Close a guardian's standard input, upon which it kills what it guards, and wait for it."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _guarded(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    guardian = Path(__file__).with_name("guardian.py")
    return subprocess.Popen(
        [sys.executable, str(guardian), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )


def _settings(options: ServerOptions, model: Path, port: int, *, is_blank: bool, version: int) -> dict[str, Any]:
    """SGLang's arguments by their names on its command line."""
    settings: dict[str, Any] = {
        "model-path": str(model.resolve()), "host": LOOPBACK, "port": port, "dtype": options.dtype,
        "tp-size": options.tensor_parallel, "dp-size": options.data_parallel,
        "max-running-requests": options.max_running, "context-length": options.context_length + MARGIN,
        "weight-version": str(version), "skip-tokenizer-init": True, "sleep-on-idle": True,
    }  # fmt: skip
    if is_blank:
        settings["load-format"] = "dummy"
    if options.deterministic:
        settings["enable-deterministic-inference"] = True
    if options.max_total_tokens is not None:
        settings["max-total-tokens"] = options.max_total_tokens
    if torch.accelerator.is_available():
        if options.memory_fraction is not None:
            settings["mem-fraction-static"] = options.memory_fraction
        if options.saves_memory:
            # What a nap takes from the weights comes back from host memory.
            settings |= {"enable-memory-saver": True, "enable-weights-cpu-backup": True}
    else:
        # Without a bound the KV cache takes most of a machine's memory, whatever the model.
        settings.setdefault("max-total-tokens", options.max_running * (options.context_length + MARGIN))
        settings |= {"device": "cpu", "attention-backend": "torch_native", "sampling-backend": "pytorch"}
    return settings | {name.replace("_", "-"): value for name, value in options.arguments.items()}


def _environment(options: ServerOptions, number: int) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED and not k.startswith("TORCHELASTIC")}
    # Of a context as long as the model's positions, the margin is the excess.
    environment |= {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if not torch.accelerator.is_available():
        # Threads that wait in turns for the trainer's are many times slower than one; and tracing takes longer than it saves.
        environment |= {"OMP_NUM_THREADS": str(options.threads), "TORCHDYNAMO_DISABLE": "1"}
    elif options.gpus:
        mine = options.gpus[number * options.num_gpus : (number + 1) * options.num_gpus]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
    return environment


def free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return found.getsockname()[1]


def _last_words(log: Path | None) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and log.is_file() else []
    said = [line.strip() for line in lines[-40:] if line.strip()]
    errors = [line for line in said if "Error" in line or "error" in line]
    return (errors or said or ["it said nothing"])[-1][:300]


# --- Before a run ------------------------------------------------------------------------------------------------------------


def check_can_start(replicas: int, first_port: int | None) -> None:
    """Raises UserError when servers of ours cannot be started here: sglang missing or another release, a port in use."""
    if importlib.util.find_spec("sglang") is None:
        raise UserError(
            "rollout.backend is sglang, but sglang is not installed; run `make sglang-cpu`, or on GPUs "
            f"`pip install sglang=={VERSION}`"
        )
    if (found := version("sglang")) != VERSION:
        raise UserError(
            f"sglang {found} is installed, this engine works with {VERSION}; install sglang=={VERSION} "
            "(on a CPU: `make sglang-cpu`)"
        )
    for port in range(first_port, first_port + replicas) if first_port else ():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                raise UserError(
                    f"rollout.sglang.port: port {port} is in use; choose another, or leave it out for any free one"
                ) from error


def check_url(url: str, allowed_hosts: Sequence[str]) -> None:
    """Raises UserError for a URL that is not http(s) to this machine or to a host that the recipe allows."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets of an IPv6 address that do not fit together
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"rollout.sglang.servers: {url!r} is no URL of a server; write for example http://127.0.0.1:30000"
        )
    if parts.hostname not in (*LOOPBACKS, *allowed_hosts):
        raise UserError(
            f"rollout.sglang.servers: {url} is another machine; add {parts.hostname} to rollout.sglang.allowed_hosts "
            "if prompts and weights may go there"
        )


async def check_answers(client: Client, *, dtype: str) -> dict[str, Any]:
    """What the server says of itself. Raises UserError when it is dead, wants another key, or is of another release or dtype."""
    try:
        info = await client.get("/get_server_info", seconds=20.0, attempts=2)
    except Unreachable as error:
        raise UserError(f"no server answers at {client.url}: start it, or correct rollout.sglang.servers") from error
    except Refused as error:
        if error.status in (401, 403):
            raise UserError(
                f"the server at {client.url} wants another API key; set the variable named by rollout.sglang.key_variable"
            ) from error
        raise UserError(f"{client.url} does not answer like an SGLang server: {error}") from error
    if not isinstance(info, dict) or info.get("version") != VERSION:
        found = info.get("version") if isinstance(info, dict) else None
        raise UserError(
            f"the server at {client.url} is sglang {found or 'of an unknown version'}, wanted {VERSION}; restart it with that"
        )
    if info.get("dtype") not in (dtype, "auto"):
        raise UserError(
            f"the server at {client.url} computes in {info.get('dtype')}, the policy in {dtype}; restart it with --dtype {dtype}"
        )
    return info
