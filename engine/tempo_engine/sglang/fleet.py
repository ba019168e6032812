"""Several servers as one: requests go where there is room, each answer is kept once, and a server that dies is replaced.

All of it runs in one event loop on a thread of its own, so that sampling can go on while the trainer trains.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tempo_engine.errors import Halted, UserError
from tempo_engine.sglang.client import Refused, Unreachable
from tempo_engine.sglang.server import LOOPBACKS, Server, ServerOptions, from_disk

T = TypeVar("T")
# Between looks at servers that seem well. Processes that have ended are found sooner, by the requests they owe.
WATCH_SECONDS = 5.0
# Tokens of a prompt from which on the first response of a group goes ahead, and the others take the prompt from its cache.
SHARED_PROMPT = 64
# Of the same request, each on a server that was found well afterwards or that was replaced.
MAX_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for what, in seconds, and how many deaths without a finished batch between them are too many."""

    start: float = 600.0
    health: float = 60.0
    generation: float = 3600.0
    update: float = 600.0
    restarts: int = 3


@dataclass
class Group:
    """Responses wanted to one prompt: a dict of sampling parameters for each. `outputs` fills up as they finish."""

    input_ids: list[int]
    parameters: list[dict[str, Any]]
    outputs: list[dict[str, Any] | None] = field(default_factory=list)
    num_failures: int = 0

    def __post_init__(self) -> None:
        self.outputs = [None] * len(self.parameters)

    @property
    def owed(self) -> list[int]:
        return [i for i, output in enumerate(self.outputs) if output is None]


class Fleet:
    """Starts `replicas` servers of ours, or joins those at `urls`.

    `weights` is a directory with the current weights, if there is one: what a replaced server begins with. `version` is theirs:
    only servers that have it are asked.
    """

    def __init__(self, options: ServerOptions, patience: Patience, *, folder: Path, replicas: int = 1) -> None:
        self.options, self.patience, self.folder = options, patience, folder
        self.servers = [Server(n, "", "", log=folder / f"server-{n}.log") for n in range(replicas)]
        self.is_own = True
        self.weights: Path | None = None
        self.version: int | None = None  # of no weights yet
        self.wants_weights = False
        self.is_napping = False
        self.num_restarts, self.num_repeated = 0, 0
        self._deaths = 0
        self._failure: Exception | None = None
        self._num_generating = 0
        self._updating = False
        self._num_updates = 0
        self._known: set[str] = set()  # versions that there were
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sglang", daemon=True)
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []
        self._thread.start()

    @classmethod
    def at(cls, urls: Sequence[str], key: str, options: ServerOptions, patience: Patience, *, folder: Path) -> "Fleet":
        """Of servers that somebody else started."""
        fleet = cls(options, patience, folder=folder, replicas=0)
        fleet.is_own = False
        fleet.servers = [Server(n, url, key) for n, url in enumerate(urls)]
        return fleet

    # --- From the trainer's thread ---

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on the servers' loop and wait."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def start(self, skeleton: Path) -> None:
        """Begin to start servers, without waiting: `skeleton` has the model's config, weights follow by an update."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_own:
            for server in self.servers:
                server.start(self.options, skeleton, is_blank=True, version=-1)

    def wait_until_ready(self) -> None:
        """Raises UserError when one of them does not start."""

        async def wait() -> None:
            await asyncio.gather(*(s.wait_until_ready(seconds=self.patience.start) for s in self.servers))
            self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

        try:
            self.run(wait())
        except Unreachable as error:
            raise UserError(str(error)) from error

    def close(self) -> None:
        """Servers of ours end, connections close. What is still being generated ends with Halted."""

        async def end() -> None:
            self._failure = self._failure or Halted("the servers were closed")
            for task in [task for server in self.servers for task in server.asked]:
                task.cancel()
            async with self._changed:
                self._changed.notify_all()
                await self._changed.wait_for(lambda: not self._num_generating)
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)
            await asyncio.gather(*(server.kill() for server in self.servers))

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    # --- Generation ---

    async def generate(self, groups: Sequence[Group]) -> None:
        """Fill every group's outputs. Longest prompts first; those of a group stay together, so that its prompt is computed once.

        Returns early, with some still owed, when `wants_weights`. Raises Halted when servers failed for good.
        """
        tasks = [asyncio.create_task(self._finish(g)) for g in sorted(groups, key=lambda g: -len(g.input_ids))]
        self._num_generating += 1
        try:
            await asyncio.gather(*tasks)
        finally:
            self._num_generating -= 1
            await self._notify()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not any(group.owed for group in groups):
            self._deaths = 0

    async def _finish(self, group: Group) -> None:
        while owed := group.owed:
            server = await self._server_with_room(len(owed))
            if server is None:  # nothing goes on without weights on disk
                return
            started = asyncio.Event()
            first = 1 if len(group.input_ids) >= SHARED_PROMPT else len(owed)
            asking = {
                asyncio.create_task(self._ask(server, group, owed[:first], begins=started)),
                asyncio.create_task(self._ask(server, group, owed[first:], after=started)),
            }
            server.asked |= asking
            ends = await asyncio.gather(*asking, return_exceptions=True)
            server.asked -= asking
            server.in_flight -= len(owed)
            for error in ends:
                if isinstance(error, Unreachable | asyncio.CancelledError):
                    server.is_live, server.complaint = False, str(error)
                    server.suspect.set()
                elif error is not None:
                    raise error
            await self._notify()
            if group.owed:
                self.num_repeated += len(group.owed)
                group.num_failures += 1
                if group.num_failures > MAX_FAILURES:
                    raise Halted(f"a request to {len(group.input_ids)} prompt tokens failed {group.num_failures} times")

    async def _ask(
        self,
        server: Server,
        group: Group,
        samples: list[int],
        *,
        begins: asyncio.Event | None = None,
        after: asyncio.Event | None = None,
    ) -> None:
        """Keep the outputs of these samples of a group. `begins` is set when the first token is there, or none will come."""
        if after is not None:
            await after.wait()
        if not samples:
            return
        payload = {
            "input_ids": [group.input_ids] * len(samples),
            "sampling_params": [group.parameters[i] for i in samples],
            "return_logprob": True,
            **({"return_sampling_mask": True} if group.parameters[0].get("top_k", -1) > 1 else {}),
        }
        try:
            async for index, output in server.client.generate(payload, seconds=self.patience.generation):
                if begins is not None:
                    begins.set()
                reason = output["meta_info"]["finish_reason"]
                if reason is None or reason["type"] == "abort":
                    continue
                if not self._known.issuperset(span["version"] for span in output["meta_info"]["weight_versions"]):
                    server.version = None
                    raise Unreachable(f"{server.name} has weights that nobody gave it: it was started again")
                group.outputs[samples[index]] = output
        finally:
            if begins is not None:
                begins.set()

    async def _server_with_room(self, count: int) -> Server | None:
        """The least loaded live one, with `count` places taken; None when nothing goes on without weights."""

        def best() -> Server | None:
            live = [s for s in self.servers if s.is_live and s.version == self.version]
            server = min(live, key=lambda s: s.in_flight, default=None)
            has_room = server is not None and (not server.in_flight or server.in_flight + count <= self._places)
            return server if has_room else None

        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or self.wants_weights or best())
            if self._failure:
                raise self._failure
            server = best()
            if server is not None:
                server.in_flight += count
            return server

    @property
    def _places(self) -> int:
        """Requests in flight at one server: some more than it runs, so that it need not wait for the next."""
        return 2 * self.options.max_running

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- Weights ---

    async def begin_update(self, version: int, *, waits: bool) -> list[Server]:
        """The live servers, to be given this version; nobody asks for their health until `end_update`.

        `waits`: until nothing is being generated.
        """
        async with self._changed:
            if waits:
                await self._changed.wait_for(lambda: not self._num_generating)
            if self._failure:
                raise self._failure
            self._updating = True
            self._num_updates += 1
            self._known.add(str(version))
            return [server for server in self.servers if server.is_live]

    async def end_update(self, version: int, folder: Path | None) -> None:
        """From now on only servers with this version are asked. `folder` has the weights on disk, if they are there."""
        async with self._changed:
            self.version, self.weights = version, folder
            self._updating = False
            self._changed.notify_all()

    async def give_weights(self, folder: Path) -> None:
        """The current weights on disk, which a server that is to be replaced waits for."""
        async with self._changed:
            self.weights, self.wants_weights = folder, False
            self._changed.notify_all()

    # --- Faults ---

    async def _watch(self, server: Server) -> None:
        """For as long as the fleet works: find out when the server is dead or stuck, or missed an update, and mend that."""
        server.is_live = True
        await self._notify()
        while self._failure is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await server.suspect.wait()
            await self._until_updated()
            updates, is_well = self._num_updates, await self._is_well(server)
            if updates != self._num_updates:  # paused meanwhile, it could not answer
                continue
            server.is_live = is_well and server.version == self.version
            try:
                if not is_well:
                    await self._replace(server)
                if not server.is_live:
                    await self._catch_up(server)
            except (Unreachable, Refused) as error:
                self._failure = Halted(str(error))
            await self._notify()

    async def _until_updated(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)

    async def _is_well(self, server: Server) -> bool:
        if server.has_ended or self.is_napping:  # without memory it cannot generate, but its process can end
            return not server.has_ended
        return await server.client.is_well(seconds=self.patience.health)

    async def _replace(self, server: Server) -> None:
        """A server of ours is killed and started again with the current weights; one of others' is waited for.

        Raises Unreachable when too many died, or when it does not come back.
        """
        for task in server.asked:  # a stopped server leaves its connections open
            task.cancel()
        if not self.is_own:
            await server.wait_until_ready(seconds=self.patience.start)
            server.version = None  # nobody knows
            return
        await server.kill()
        self._deaths += 1
        if self._deaths > self.patience.restarts:
            before = self._deaths - 1
            raise Unreachable(
                f"{server.name} died ({server.complaint}), and servers {before} times before it since a batch was finished; "
                f"see {server.log}"
            )
        self.num_restarts += 1
        weights, version = await self._weights_on_disk()
        server.start(self.options, weights, is_blank=False, version=version)
        await server.wait_until_ready(seconds=self.patience.start)
        server.version = version

    async def _catch_up(self, server: Server) -> None:
        """Give it the current weights, if it has others, and requests."""
        while server.version != self.version:
            weights, version = await self._weights_on_disk()
            update, seconds = from_disk(weights, version), self.patience.update
            await server.client.post("/update_weights_from_disk", update, seconds=seconds)
            server.version = version
        server.suspect.clear()
        server.is_live = True

    async def _weights_on_disk(self) -> tuple[Path, int]:
        """A directory with the current weights and their version, as soon as there is one and no update is going on."""
        async with self._changed:
            if self.weights is None:
                self.wants_weights = True
                self._changed.notify_all()
            await self._changed.wait_for(lambda: self.weights is not None and not self._updating)
            assert self.weights is not None
            assert self.version is not None
            return self.weights, self.version

    @property
    def is_on_this_machine(self) -> bool:
        return all(urlsplit(server.client.url).hostname in LOOPBACKS for server in self.servers)


async def on_all(servers: Sequence[Server], call: Callable[[Server], Awaitable[Any]]) -> list[Any]:
    """The same call to every server at once. One that cannot be reached is left to its watcher: None. Raises Refused."""

    async def one(server: Server) -> Any:
        try:
            return await call(server)
        except Unreachable as error:
            server.is_live, server.complaint = False, str(error)
            server.suspect.set()
            return None
        except Refused as error:
            raise Refused(f"{server.name}", error.status, str(error)) from error

    return await asyncio.gather(*(one(server) for server in servers))
