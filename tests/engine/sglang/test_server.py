"""What a server is started with, and how its end is noticed. No server runs here."""

import asyncio
import os
import secrets
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from aiohttp import web
from tempo_engine.sglang import server
from tempo_engine.sglang.client import Client, Unreachable
from tempo_engine.sglang.server import (
    LOOPBACK,
    Server,
    ServerOptions,
    end,
    free_port,
)

Serving = Callable[..., AbstractAsyncContextManager[Client]]
OPTIONS = ServerOptions(dtype="float32", max_running=16, context_length=100)
# Whatever torchrun sets for its ranks (torch.distributed.elastic.agent.server.local_elastic_agent).
TORCHRUN = (
    "LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip


@dataclass
class Start:
    """What would have been started."""

    command: list[str]
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        return Path(self.command[self.command.index("--config") + 1])

    @property
    def settings(self) -> dict[str, Any]:
        return yaml.safe_load(self.config.read_text())


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Server, Start]]:
    """start(tensor_parallel=2, number=1): all but the last step of starting a server."""
    starts: list[Start] = []

    def note(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        starts.append(Start(list(command), dict(environment)))

    monkeypatch.setattr(server, "_guarded", note)

    def begin(*, number: int = 0, is_blank: bool = True, **options: Any) -> tuple[Server, Start]:
        found = Server(number, "", "", log=tmp_path / f"server-{number}.log")
        found.start(replace(OPTIONS, **options), tmp_path / "model", is_blank=is_blank, version=7)
        return found, starts[-1]

    return begin


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


# --- What a server is started with -------------------------------------------------------------------------------------------


def test_the_key_is_nowhere_but_in_a_file_that_only_this_user_can_read(
    start: Callable[..., tuple[Server, Start]], tmp_path: Path
) -> None:
    (tmp_path / "server-0.yaml").write_text("left by another run, readable by all")
    (tmp_path / "server-0.yaml").chmod(0o644)
    found, begun = start()
    assert len(found.key) >= 32
    assert begun.settings["api-key"] == found.key
    assert stat.S_IMODE(begun.config.stat().st_mode) == 0o600
    assert not any(found.key in word for word in begun.command)
    assert not any(found.key in value for value in begun.environment.values())
    assert found.key not in found.name
    assert found.log is not None
    assert found.key not in found.log.read_text()


def test_every_start_has_a_key_of_its_own(start: Callable[..., tuple[Server, Start]]) -> None:
    found, _ = start()
    first = found.key
    found.start(OPTIONS, Path("model"), is_blank=True, version=0)
    assert found.key != first


def test_the_config_does_not_follow_a_link_that_somebody_laid(
    start: Callable[..., tuple[Server, Start]], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "server-0.yaml").symlink_to(tmp_path / "elsewhere")
    start()
    assert (tmp_path / "elsewhere").read_text() == "theirs"


def test_a_server_listens_on_this_machine_only_at_the_port_that_it_is_asked_at(
    start: Callable[..., tuple[Server, Start]],
) -> None:
    found, begun = start()
    assert begun.settings["host"] == LOOPBACK
    assert found.client.url == f"http://{LOOPBACK}:{begun.settings['port']}"


def test_replicas_count_up_from_the_port_of_the_first(start: Callable[..., tuple[Server, Start]]) -> None:
    assert [start(number=n, port=30000)[1].settings["port"] for n in range(3)] == [30000, 30001, 30002]


def test_settings_say_what_the_options_say(
    start: Callable[..., tuple[Server, Start]], on_a_cpu: None, tmp_path: Path
) -> None:
    settings = start(tensor_parallel=2, data_parallel=3, max_total_tokens=500)[1].settings
    wanted = {
        "model-path": str(tmp_path / "model"), "dtype": "float32", "tp-size": 2, "dp-size": 3, "max-running-requests": 16,
        "context-length": 108, "weight-version": "7", "skip-tokenizer-init": True, "load-format": "dummy",
        "max-total-tokens": 500, "device": "cpu", "attention-backend": "torch_native",
    }  # fmt: skip
    assert settings | wanted == settings
    assert "enable-deterministic-inference" not in settings


def test_a_server_with_weights_to_begin_with_loads_them(start: Callable[..., tuple[Server, Start]]) -> None:
    assert "load-format" not in start(is_blank=False)[1].settings


def test_deterministic_mode_is_switched_on(start: Callable[..., tuple[Server, Start]]) -> None:
    assert start(deterministic=True)[1].settings["enable-deterministic-inference"] is True


def test_on_a_cpu_the_cache_holds_what_can_run_and_no_more(
    start: Callable[..., tuple[Server, Start]], on_a_cpu: None
) -> None:
    settings = start(memory_fraction=0.5, saves_memory=True)[1].settings
    assert settings["max-total-tokens"] == 16 * 108
    assert not {"mem-fraction-static", "enable-memory-saver"} & settings.keys()


def test_on_gpus_memory_is_shared_as_the_options_say(start: Callable[..., tuple[Server, Start]], on_gpus: None) -> None:
    settings = start(memory_fraction=0.5, saves_memory=True)[1].settings
    assert (settings["mem-fraction-static"], settings["enable-memory-saver"]) == (0.5, True)
    assert not {"max-total-tokens", "device", "attention-backend"} & settings.keys()


def test_arguments_of_the_recipe_win_however_they_are_spelt(start: Callable[..., tuple[Server, Start]]) -> None:
    settings = start(arguments={"max_running_requests": 4, "chunked-prefill-size": 64})[1].settings
    assert (settings["max-running-requests"], settings["chunked-prefill-size"]) == (4, 64)
    assert "max_running_requests" not in settings


def test_what_torchrun_says_to_its_ranks_is_not_inherited(
    start: Callable[..., tuple[Server, Start]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HOLIDAY", "1")
    environment = start()[1].environment
    assert not environment.keys() & set(TORCHRUN)
    assert environment["HOLIDAY"] == "1"


def test_a_server_asks_no_hub_and_takes_one_thread_on_a_cpu(
    start: Callable[..., tuple[Server, Start]], on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    environment = start()[1].environment
    assert (environment["HF_HUB_OFFLINE"], environment["OMP_NUM_THREADS"]) == ("1", "1")
    assert start(threads=3)[1].environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("sizes", "visible"),
    [
        ({}, ["4", "5", "6", "7"]),
        ({"tensor_parallel": 2}, ["4,5", "6,7"]),
        ({"data_parallel": 2}, ["4,5", "6,7"]),
        ({"tensor_parallel": 2, "data_parallel": 2}, ["4,5,6,7"]),
    ],
)
def test_replicas_take_their_gpus_one_after_the_other(
    start: Callable[..., tuple[Server, Start]], on_gpus: None, sizes: dict[str, int], visible: list[str]
) -> None:
    starts = [start(number=n, gpus=(4, 5, 6, 7), **sizes)[1] for n in range(len(visible))]
    assert [begun.environment["CUDA_VISIBLE_DEVICES"] for begun in starts] == visible


def test_without_a_list_a_server_sees_the_gpus_that_we_see(
    start: Callable[..., tuple[Server, Start]], on_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert start()[1].environment["CUDA_VISIBLE_DEVICES"] == "2,3"


# --- While it starts, and afterwards -----------------------------------------------------------------------------------------


def guarded(tmp_path: Path, *command: str) -> Server:
    found = Server(3, f"http://{LOOPBACK}:{free_port()}", secrets.token_hex(16), log=tmp_path / "server-3.log")
    assert found.log is not None
    with found.log.open("ab") as log:
        found.process = server._guarded(command, os.environ, log)
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loading\\nValueError: no such model\\nbye\\n", "ValueError: no such model"),
        ("loading\\nbye\\n", "bye"),
        ("", "it said nothing"),
    ],
)
def test_a_server_that_ends_while_it_starts_is_noticed_with_its_last_words(
    tmp_path: Path, words: str, said: str
) -> None:
    async def main() -> None:
        found = guarded(tmp_path, "printf", words) if words else guarded(tmp_path, "true")
        with pytest.raises(
            Unreachable, match=rf"^server 3 \(.*\) ended while it started: {said}; see .*server-3\.log$"
        ):
            await found.wait_until_ready(seconds=60)
        assert found.has_ended
        await found.kill()

    asyncio.run(main())


def test_a_server_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        found = guarded(tmp_path, "sleep", "300")
        with pytest.raises(Unreachable, match="was not ready after 0 s; see"):
            await found.wait_until_ready(seconds=0)
        assert not found.has_ended
        process = found.process
        await found.kill()
        assert process is not None
        assert process.poll() is not None

    asyncio.run(main())


def test_a_server_is_ready_when_it_answers(serving: Serving, tmp_path: Path) -> None:
    statuses = iter([503, 503, 200])

    async def handle(request: web.Request) -> web.Response:
        assert request.path == "/health"
        return web.Response(status=next(statuses))

    async def main() -> None:
        found = guarded(tmp_path, "sleep", "300")
        async with serving(handle) as found.client:
            await found.wait_until_ready(seconds=60)
        await found.kill()

    asyncio.run(main())
    assert next(statuses, None) is None


def test_a_process_is_waited_for_when_it_is_ended(tmp_path: Path) -> None:
    process = guarded(
        tmp_path, sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(300)"
    ).process
    assert process is not None
    end(process)
    assert process.returncode is not None


def test_somebody_elses_server_has_no_end_that_we_could_see_or_bring_about() -> None:
    found = Server(0, f"http://{LOOPBACK}:30000", "key")
    assert not found.has_ended
    asyncio.run(found.kill())
