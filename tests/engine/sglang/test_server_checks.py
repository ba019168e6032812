"""What is found out before a run: whether servers can be started here, and whether somebody else's may be asked and fit."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import pytest
from aiohttp import web
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tempo_engine.errors import UserError
from tempo_engine.sglang import VERSION, server
from tempo_engine.sglang.client import Client
from tempo_engine.sglang.server import (
    LOOPBACK,
    ServerOptions,
    check_answers,
    check_can_start,
    check_url,
    free_port,
)

Serving = Callable[..., AbstractAsyncContextManager[Client]]
OPTIONS = ServerOptions(dtype="float32", max_running=16, context_length=100)


# --- URLs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:30000",
        "http://localhost:30000/",
        "https://localhost",
        "http://[::1]:30000",
        "http://LOCALHOST",
    ],
)
def test_servers_on_this_machine_may_always_be_asked(url: str) -> None:
    check_url(url, [])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:30000",
        "localhost:30000",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "http://",
        "http://:80",
        "http://[::1",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no URL of a server; write for example http://"):
        check_url(url, [])


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://10.0.0.7:30000", "10.0.0.7"),
        ("https://localhost.example.org", "localhost.example.org"),
        ("http://localhost@example.org", "example.org"),
        ("http://127.0.0.2", "127.0.0.2"),
    ],
)
def test_another_machine_is_asked_only_when_the_recipe_allows_it(url: str, host: str) -> None:
    with pytest.raises(UserError, match=f"is another machine; add {host} to rollout.sglang.allowed_hosts"):
        check_url(url, ["gpu7.example.org"])
    check_url(url, ["gpu7.example.org", host])


@settings(deadline=None)
@given(url=st.text() | st.text().map("http://{}".format))
@example(url="http://[")
def test_any_text_is_answered_by_a_sentence_or_not_at_all(url: str) -> None:
    with suppress(UserError):
        check_url(url, [])


# --- Servers ----------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_with_its_number() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"rollout\.sglang\.port: port {port} is in use; choose another"):
            check_can_start(1, port)
        with pytest.raises(UserError, match="is in use"):
            check_can_start(2, port - 1)
    check_can_start(1, port)


def test_without_a_port_there_is_nothing_to_be_in_use() -> None:
    check_can_start(8, None)


def test_a_missing_sglang_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"sglang is not installed; run `make sglang-cpu`, or on GPUs `pip install sglang==0"
    ):
        check_can_start(1, None)


def test_another_release_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "VERSION", "0.4.9")
    with pytest.raises(UserError, match=rf"sglang {VERSION} is installed, this engine works with 0\.4\.9; install"):
        check_can_start(1, None)


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            401,
            {"error": "Unauthorized"},
            "wants another API key; set the variable named by rollout.sglang.key_variable",
        ),
        (403, "", "wants another API key"),
        (404, {"detail": "Not Found"}, "does not answer like an SGLang server: /get_server_info was refused"),
        (200, {"version": "0.4.9", "dtype": "float32"}, rf"is sglang 0\.4\.9, wanted {VERSION}; restart it with that"),
        (200, {}, "is sglang of an unknown version"),
        (200, ["pong"], "is sglang of an unknown version"),
        (200, "pong", "is sglang of an unknown version"),
        (
            200,
            {"version": VERSION, "dtype": "bfloat16"},
            "computes in bfloat16, the policy in float32; restart it with --dtype float32",
        ),
    ],
)
def test_a_server_that_cannot_be_worked_with_is_refused(
    serving: Serving, status: int, body: Any, sentence: str
) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    async def main() -> None:
        async with serving(handle) as client:
            with pytest.raises(UserError, match=f"{client.url} {sentence}"):
                await check_answers(client, dtype="float32")

    asyncio.run(main())


def test_a_server_that_is_not_there_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = Client(f"http://{LOOPBACK}:{free_port()}", "")
        with pytest.raises(UserError, match=f"no server answers at {client.url}: start it, or correct"):
            await check_answers(client, dtype="float32")
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_server_that_fits_says_what_it_is(serving: Serving, dtype: str) -> None:
    info = {"version": VERSION, "dtype": dtype, "tp_size": 2}

    async def handle(request: web.Request) -> web.Response:
        return web.json_response(info)

    async def main() -> dict[str, Any]:
        async with serving(handle) as client:
            return await check_answers(client, dtype="float32")

    assert asyncio.run(main()) == info
