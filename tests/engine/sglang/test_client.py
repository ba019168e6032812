"""HTTP with a server of the test's own: what is tried again, what is not, and streams that come in any pieces."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.sglang.client import Client, Refused, Unreachable, _events
from tempo_engine.sglang.server import LOOPBACK, free_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serving = Callable[..., AbstractAsyncContextManager[Client]]
Outputs = list[tuple[int, dict[str, Any]]]


class Answers:
    """A handler that gives one answer after the other, the last one for ever. `requests` are their paths and bodies."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, str]] = []

    async def __call__(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, await request.text()))
        status, body = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)


def output(index: int, *, reason: Any, ids: list[int] | None = None) -> dict[str, Any]:
    """An event of a stream: `reason` is None until the response is finished."""
    return {"index": index, "output_ids": ids or [7], "meta_info": {"finish_reason": reason}}


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


STOP = {"type": "stop", "matched": 1}
DONE = b"data: [DONE]\n\n"


def streaming(*pieces: bytes, then: str = "ends") -> Handler:
    """A handler that sends these pieces, and then ends, breaks off or falls silent."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        if then == "breaks off":
            assert request.transport is not None
            request.transport.close()
        elif then == "falls silent":
            await asyncio.Event().wait()
        return response

    return handle


async def received(client: Client, outputs: Outputs, *, seconds: float = 20.0) -> None:
    async for found in client.generate({"input_ids": [[5], [6]]}, seconds=seconds):
        outputs.append(found)


# --- Calls -------------------------------------------------------------------------------------------------------------------


def test_json_and_text_come_back_as_what_they_are(serving: Serving) -> None:
    async def main() -> None:
        async with serving(Answers((200, {"version": "0.5.23"}), (200, "ready"), (200, ""))) as client:
            assert await client.get("/get_server_info", seconds=20) == {"version": "0.5.23"}
            assert await client.get("/health", seconds=20) == "ready"
            assert await client.post("/flush_cache", {}, seconds=20) == ""

    asyncio.run(main())


def test_the_key_goes_with_every_request(serving: Serving) -> None:
    heard: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Authorization"))
        return web.Response(body=DONE) if request.path == "/generate" else web.json_response({})

    async def main() -> None:
        async with serving(handle, key="secret") as client:
            await client.get("/a", seconds=20)
            await client.post("/b", {}, seconds=20)
            await received(client, [])
        async with serving(handle) as client:
            await client.get("/a", seconds=20)

    asyncio.run(main())
    assert heard == ["Bearer secret"] * 3 + [None]


def test_a_proxy_of_the_environment_is_not_asked(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{LOOPBACK}:{free_port()}")

    async def main() -> None:
        async with serving(Answers((200, "ready"))) as client:
            assert await client.get("/health", seconds=20, attempts=1) == "ready"

    asyncio.run(main())


def test_what_a_server_failed_at_is_asked_again(serving: Serving) -> None:
    answers = Answers((500, "out of memory"), (503, "starting"), (200, {"success": True}))

    async def main() -> None:
        async with serving(answers) as client:
            assert await client.post("/update", {"weight_version": "3"}, seconds=20) == {"success": True}

    asyncio.run(main())
    assert answers.requests == [("/update", '{"weight_version": "3"}')] * 3


def test_so_many_attempts_and_no_more(serving: Serving) -> None:
    answers = Answers((500, "out of memory"))

    async def main() -> None:
        async with serving(answers) as client:
            with pytest.raises(Unreachable, match=r"/update failed \(500\): out of memory"):
                await client.post("/update", {}, seconds=20, attempts=2)

    asyncio.run(main())
    assert len(answers.requests) == 2


def test_a_server_that_listens_late_is_found(serving: Serving) -> None:
    port = free_port()

    async def main() -> str:
        early = Client(f"http://{LOOPBACK}:{port}", "")
        asked = asyncio.create_task(early.get("/health", seconds=20))
        await asyncio.sleep(0.1)  # by now it was refused
        assert not asked.done()
        async with serving(Answers((200, "ready")), port=port):
            try:
                return await asked
            finally:
                await early.close()

    assert asyncio.run(main()) == "ready"


def test_a_connection_that_is_refused_to_the_end_is_unreachable() -> None:
    async def main() -> None:
        client = Client(f"http://{LOOPBACK}:{free_port()}", "")
        with pytest.raises(Unreachable, match=f"{client.url}/health: "):
            await client.get("/health", seconds=20, attempts=2)
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"error": {"message": "the prompt is too long", "code": 400}}, "the prompt is too long"),
        ({"success": False, "message": "no such folder"}, "no such folder"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        ("plain words", "plain words"),
        ("", "no reason given"),
    ],
)
def test_a_refusal_is_said_in_the_servers_words_and_not_tried_again(serving: Serving, body: Any, sentence: str) -> None:
    answers = Answers((400, body))

    async def main() -> None:
        async with serving(answers) as client:
            with pytest.raises(Refused) as refused:
                await client.post("/update", {}, seconds=20)
            assert str(refused.value) == f"/update was refused (400): {sentence}"
            assert refused.value.status == 400
            with pytest.raises(Refused) as refused:
                await received(client, [])
            assert str(refused.value) == f"/generate was refused (400): {sentence}"

    asyncio.run(main())
    assert len(answers.requests) == 2


def test_a_redirection_is_not_followed(serving: Serving) -> None:
    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("http://example.org/")

    async def main() -> None:
        async with serving(elsewhere) as client:
            with pytest.raises(Refused, match="307"):
                await client.get("/health", seconds=20)
            with pytest.raises(Refused, match="307"):
                await received(client, [])

    asyncio.run(main())


def test_an_answer_that_claims_to_be_json_and_is_not_is_none(serving: Serving) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(text='{"version": ', content_type="application/json")

    async def main() -> None:
        async with serving(handle) as client:
            with pytest.raises(Unreachable):
                await client.get("/get_server_info", seconds=20, attempts=1)

    asyncio.run(main())


@pytest.mark.parametrize("call", ["get", "generate"])
def test_silence_is_given_up_after_the_time_allowed(serving: Serving, call: str) -> None:
    async def main() -> None:
        async with serving(streaming(then="falls silent")) as client:
            calls = {
                "get": lambda: client.get("/health", seconds=0.2, attempts=1),
                "generate": lambda: received(client, [], seconds=0.2),
            }
            with pytest.raises(Unreachable, match="no answer in time"):
                await calls[call]()

    asyncio.run(main())


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False), (401, False)])
def test_a_server_is_well_when_it_says_so(serving: Serving, status: int, well: bool) -> None:
    answers = Answers((status, ""))

    async def main() -> bool:
        async with serving(answers) as client:
            return await client.is_well(seconds=20)

    assert asyncio.run(main()) is well
    assert [path for path, _ in answers.requests] == ["/health_generate"], "asked once"


def test_a_server_that_is_not_there_or_stuck_is_not_well(serving: Serving) -> None:
    async def main() -> list[bool]:
        absent = Client(f"http://{LOOPBACK}:{free_port()}", "")
        async with serving(streaming(then="falls silent")) as stuck:
            found = [await absent.is_well(seconds=20), await stuck.is_well(seconds=0.2)]
        await absent.close()
        return found

    assert asyncio.run(main()) == [False, False]


# --- Generations -------------------------------------------------------------------------------------------------------------


def test_responses_arrive_in_the_order_in_which_they_grow_and_finish(serving: Serving) -> None:
    events = [
        output(0, reason=None),
        output(1, reason=STOP),
        output(0, reason=None),
        output(0, reason={"type": "length", "length": 8}),
    ]
    outputs: Outputs = []

    async def main() -> None:
        async with serving(streaming(*map(event, events), DONE)) as client:
            await received(client, outputs)

    asyncio.run(main())
    assert outputs == list(zip([0, 1, 0, 0], events, strict=True))


def test_a_response_arrives_while_others_still_grow(serving: Serving) -> None:
    """The server goes on only after the first one has arrived."""
    has_arrived = asyncio.Event()
    outputs: list[int] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(event(output(1, reason=STOP)))
        await has_arrived.wait()
        await response.write(event(output(0, reason=STOP)) + DONE)
        return response

    async def main() -> None:
        async with serving(handle) as client:
            async for index, _ in client.generate({}, seconds=20):
                outputs.append(index)
                has_arrived.set()

    asyncio.run(main())
    assert outputs == [1, 0]


def test_a_single_prompts_events_have_no_index(serving: Serving) -> None:
    only = {"output_ids": [7], "meta_info": {"finish_reason": STOP}}
    outputs: Outputs = []

    async def main() -> None:
        async with serving(streaming(event(only), DONE)) as client:
            await received(client, outputs)

    asyncio.run(main())
    assert outputs == [(0, only)]


def test_a_request_asks_for_a_stream(serving: Serving) -> None:
    answers = Answers((200, "data: [DONE]\n\n"))

    async def main() -> None:
        async with serving(answers) as client:
            await received(client, [])

    asyncio.run(main())
    assert [(path, json.loads(body)) for path, body in answers.requests] == [
        ("/generate", {"input_ids": [[5], [6]], "stream": True})
    ]


def test_a_stream_that_breaks_off_is_unreachable_after_what_had_arrived(serving: Serving) -> None:
    first, second = output(1, reason=STOP), output(0, reason=STOP)
    pieces = [event(first), event(second), event(output(2, reason=STOP))[:-9]]
    outputs: Outputs = []

    async def main() -> None:
        async with serving(streaming(*pieces, then="breaks off")) as client:
            with pytest.raises(Unreachable, match="/generate: "):
                await received(client, outputs)

    asyncio.run(main())
    assert outputs == [(1, first), (0, second)]


def test_what_came_before_the_silence_arrives(serving: Serving) -> None:
    outputs: Outputs = []

    async def main() -> None:
        async with serving(streaming(event(output(0, reason=STOP)), then="falls silent")) as client:
            with pytest.raises(Unreachable, match="no answer in time"):
                await received(client, outputs, seconds=0.5)

    asyncio.run(main())
    assert [index for index, _ in outputs] == [0]


@pytest.mark.parametrize("answer", [(500, "out of memory"), (503, "")])
def test_a_generation_is_never_sent_again(serving: Serving, answer: tuple[int, str]) -> None:
    answers = Answers(answer)

    async def main() -> None:
        async with serving(answers) as client:
            with pytest.raises(Unreachable, match=str(answer[0])):
                await received(client, [])

    asyncio.run(main())
    assert len(answers.requests) == 1


def test_a_generation_without_a_server_is_unreachable() -> None:
    async def main() -> None:
        client = Client(f"http://{LOOPBACK}:{free_port()}", "")
        with pytest.raises(Unreachable, match="/generate: "):
            await received(client, [])
        await client.close()

    asyncio.run(main())


def test_an_error_in_a_stream_is_a_refusal_in_the_servers_words(serving: Serving) -> None:
    error = {"error": {"message": "the prompt has 9 tokens, the context 8", "code": 400}}

    async def main() -> None:
        async with serving(streaming(event(error), DONE)) as client:
            with pytest.raises(Refused, match="the prompt has 9 tokens, the context 8"):
                await received(client, [])

    asyncio.run(main())


def test_events_may_be_longer_than_any_buffer(serving: Serving) -> None:
    long = output(0, reason=STOP, ids=list(range(100_000)))
    outputs: Outputs = []

    async def main() -> None:
        async with serving(streaming(event(long), event(output(1, reason=STOP)), DONE)) as client:
            await received(client, outputs)

    assert len(event(long)) > 500_000
    asyncio.run(main())
    assert outputs == [(0, long), (1, output(1, reason=STOP))]


class Pieces:
    """The part of aiohttp's reader that is read: bytes as they come."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), len(data)]
        self.pieces = [data[start:end] for start, end in itertools.pairwise(edges)]

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


EVENTS = [output(0, reason=None), {"text": "déjà vu\n\ndata: 7"}, output(1, reason=STOP, ids=[1, 2, 3])]
STREAM = b"".join(map(event, EVENTS)) + b": a comment\n\n" + DONE


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=20) | st.just(list(range(len(STREAM)))))
def test_events_are_the_same_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    async def main() -> list[Any]:
        return [found async for found in _events(cast(aiohttp.StreamReader, Pieces(STREAM, cuts)))]

    assert asyncio.run(main()) == EVENTS


def test_a_stream_that_ends_before_it_is_done_is_unreachable(serving: Serving) -> None:
    found: Outputs = []

    async def main() -> None:
        async with serving(streaming(event(output(0, reason=STOP)))) as client:
            await received(client, found)

    with pytest.raises(Unreachable, match="ended before it was finished"):
        asyncio.run(main())
    assert len(found) == 1


def test_many_generations_go_on_at_a_time(serving: Serving) -> None:
    """More than aiohttp's own bound of 100 connections: nobody waits for another's response."""
    everybody_is_there = asyncio.Event()
    waiting = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        if waiting == 150:
            everybody_is_there.set()
        await everybody_is_there.wait()
        return web.Response(body=event(output(0, reason=STOP)) + DONE)

    async def main() -> list[Outputs]:
        outputs: list[Outputs] = [[] for _ in range(150)]
        async with serving(handle) as client:
            await asyncio.gather(*(received(client, found, seconds=60) for found in outputs))
        return outputs

    assert all(len(found) == 1 for found in asyncio.run(main()))
