"""A small web server of the test's own, with answers of the test's choosing."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from aiohttp import web
from tempo_engine.sglang.client import Client
from tempo_engine.sglang.server import LOOPBACK

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serving = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def serving() -> Serving:
    """`async with serving(handler) as client`: every request goes to the handler. `port` 0 is any free one."""

    @asynccontextmanager
    async def serve(handler: Handler, *, port: int = 0, key: str = "") -> AsyncIterator[Client]:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await handler(request)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, LOOPBACK, port).start()
        client = Client(f"http://{LOOPBACK}:{runner.addresses[0][1]}/", key)
        try:
            yield client
        finally:
            await client.close()
            await runner.cleanup()

    return serve
