"""HTTP to one SGLang server: calls that come back with JSON, and generations that arrive piece by piece."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

# A call that never reached the server, or that it answered with 5xx, is made again so many times in all.
ATTEMPTS = 4
CONNECT_SECONDS = 10.0
# SGLang's server closes connections that were idle for 5 s; one that is being closed must not be used again.
IDLE_SECONDS = 2.0


class Unreachable(Exception):
    """The server did not answer: no connection, a time-out, 5xx, or an answer that breaks off."""


class Refused(Exception):
    """The server answered that it will not: 4xx. `status` is the code."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"{path} was refused ({status}): {message}")
        self.status = status


class Client:
    """One server's endpoints. Its coroutines belong to the event loop that first awaited one."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
                trust_env=False,
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str, *, seconds: float, attempts: int = ATTEMPTS) -> Any:
        return await self._call("GET", path, None, seconds, attempts)

    async def post(self, path: str, payload: Mapping[str, Any], *, seconds: float, attempts: int = ATTEMPTS) -> Any:
        """What the server answers, from JSON where it is that. Raises Unreachable or Refused."""
        return await self._call("POST", path, payload, seconds, attempts)

    async def _call(self, method: str, path: str, payload: Any, seconds: float, attempts: int) -> Any:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential_jitter(multiplier=0.2, max=5.0),
            reraise=True,
        )
        return await retrying(self._call_once, method, path, payload, seconds)

    async def _call_once(self, method: str, path: str, payload: Any, seconds: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, CONNECT_SECONDS))
        try:
            async with self.session.request(
                method, self.url + path, json=payload, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text()
                _check(path, response.status, text)
                return json.loads(text) if response.content_type == "application/json" and text else text
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            raise Unreachable(f"{self.url}{path}: {_why(error)}") from error

    async def is_well(self, *, seconds: float) -> bool:
        """Whether the server generates, as far as it can say within this time."""
        try:
            await self.get("/health_generate", seconds=seconds, attempts=1)
        except (Unreachable, Refused):
            return False
        return True

    async def generate(
        self, payload: Mapping[str, Any], *, seconds: float
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Several prompts in one request: (index, output) whenever there is more of one, its `finish_reason` set when that is all.

        Never sent again by itself: what has arrived would be generated twice. Raises Unreachable when the stream breaks off.
        """
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self.session.post(
                f"{self.url}/generate", json={**payload, "stream": True}, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    _check("/generate", response.status, await response.text())
                async for event in _events(response.content):
                    if "meta_info" not in event:
                        raise Refused("/generate", 400, _message(event))
                    yield event.get("index", 0), event
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            raise Unreachable(f"{self.url}/generate: {_why(error)}") from error


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events, `data: {...}` each. Of any length: aiohttp's own lines are bounded."""
    waiting = bytearray()
    async for chunk in content.iter_any():
        waiting += chunk
        *lines, waiting = waiting.split(b"\n\n")
        for line in lines:
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    raise ConnectionError("the answer ended before it was finished")


def _check(path: str, status: int, text: str) -> None:
    if status >= 500:
        raise Unreachable(f"{path} failed ({status}): {text[:300]}")
    if status != 200:
        try:
            message = _message(json.loads(text))
        except ValueError:
            message = text
        raise Refused(path, status, message[:500] or "no reason given")


def _message(answer: Any) -> str:
    """The sentence in an answer: endpoints put it in different places."""
    for name in ("error", "message"):
        if isinstance(answer, dict) and name in answer:
            answer = answer[name]
    return str(answer)


def _why(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else (str(error) or type(error).__name__)
