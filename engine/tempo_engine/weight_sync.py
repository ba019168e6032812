"""The policy's weights to the servers, and proof that they arrived.

Three paths: `disk` (a directory that servers read), `distributed` (a process group of trainer and servers: gloo on CPUs, NCCL on
GPUs) and `tensor` (handed to servers that are children of this process). On each, FSDP's shards are gathered bucket by bucket.
"""

import asyncio
import base64
import io
import json
import pickle
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tempo_engine import parallel
from tempo_engine.errors import Halted
from tempo_engine.model import Policy
from tempo_engine.sglang.client import Refused
from tempo_engine.sglang.fleet import Fleet, on_all
from tempo_engine.sglang.probe import Probe
from tempo_engine.sglang.receipt import Receipt
from tempo_engine.sglang.server import LOOPBACK, Server, free_port, from_disk
from tempo_engine.weights import save_config, whole_weights

SyncPath = Literal["disk", "distributed", "tensor"]
Bucket = list[tuple[str, Tensor]]
BUCKET_BYTES = 512 * 2**20
# An update that did not arrive whole is made again so many times in all.
ATTEMPTS = 3
GROUP = "tempo_weights"


class WeightSync:
    """Pushes the policy's weights to a fleet. `metrics` are those of the last push. `verify`: how the receipt is taken.

    The main rank talks to the servers (`fleet` is None elsewhere); all ranks gather.
    """

    def __init__(
        self,
        fleet: Fleet | None,
        path: SyncPath,
        folder: Path,
        *,
        verify: Literal["checksum", "probe", "off"] = "checksum",
        keeps_cache: bool = False,
        interrupts: bool = False,
    ) -> None:
        self.fleet, self.path, self.folder = fleet, path, folder
        self.verify = verify
        self.keeps_cache, self.interrupts = keeps_cache, interrupts
        self.metrics: dict[str, float] = {}
        self._group: Any = None
        self._members: list[str] = []

    def push(self, policy: Policy) -> None:
        """All servers hold these weights afterwards, or it raises Halted. Collective.

        With `interrupts`, responses that are being generated wait meanwhile and go on with the new weights; else there are none.
        """
        start = time.perf_counter()
        wrong = ""
        for attempt in range(ATTEMPTS):
            wrong = self._push_once(policy)
            if not wrong:
                self.metrics |= {"seconds": time.perf_counter() - start, "repeats": float(attempt)}
                return
        raise Halted(f"after {ATTEMPTS} updates {wrong}")

    def save(self, policy: Policy) -> Path:
        """The weights as a directory that a server can start from, complete or not there. Collective."""
        final = self.folder / f"version-{policy.version}"
        writing = self.folder / f".writing-{policy.version}"
        if parallel.is_main():
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            save_config(policy.model, writing)
        index: dict[str, str] = {}
        for number, bucket in enumerate(self._buckets(policy)):
            name = f"model-{number:05d}.safetensors"
            if parallel.is_main():
                save_file({n: x.cpu().contiguous() for n, x in bucket}, writing / name, metadata={"format": "pt"})
                index |= {n: name for n, _ in bucket}
        if parallel.is_main():
            (writing / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            writing.rename(final)
            versions = sorted(self.folder.glob("version-*"), key=lambda path: path.stat().st_mtime)
            for old in versions[:-2]:  # a server may be reading the last but one
                shutil.rmtree(old, ignore_errors=True)
        return final

    def _buckets(self, policy: Policy) -> Iterator[Bucket]:
        """Whole weights in the dtype of the computation, in parts of bounded size. Every one also goes into the receipt."""
        self._receipt, self._bytes = Receipt(), 0
        bucket: Bucket = []
        size = 0
        for name, weight in whole_weights(policy.model, policy.sharding.compute, policy.blocks.lora):
            if parallel.is_main():
                if self.verify == "checksum":
                    self._receipt.add(name, weight)
                bucket.append((name, weight))
            size += weight.nbytes
            self._bytes += weight.nbytes
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if size:
            yield bucket

    def _push_once(self, policy: Policy) -> str:
        """What is wrong afterwards, or nothing. Every rank hears the same."""
        folder = self.save(policy) if self.path == "disk" else None
        probe = Probe.of(policy) if self.verify == "probe" else None
        buckets = iter(()) if folder else self._buckets(policy)
        if self.fleet is None:
            deque(buckets, maxlen=0)
            wrong, self.verify = parallel.from_main(lambda: ["", self.verify])
        else:
            fleet = self.fleet
            wrong, self.verify = parallel.from_main(
                lambda: [self._send(fleet, policy, folder, buckets, probe), self.verify]
            )
        return wrong

    def _send(
        self, fleet: Fleet, policy: Policy, folder: Path | None, buckets: Iterator[Bucket], probe: Probe | None
    ) -> str:
        """Everything to all live servers; what is wrong afterwards, or nothing."""
        version = policy.version
        servers = fleet.run(fleet.begin_update(version, waits=not self.interrupts))
        try:
            if self.interrupts:
                self._all(servers, "/pause_generation", {"mode": "retract"})
            if folder:
                self._all(servers, "/update_weights_from_disk", from_disk(folder, version) | self._how(version))
            else:
                self._send_buckets(fleet, servers, version, buckets)
            wrong = fleet.run(self._what_is_wrong(fleet, servers, probe))
            for server in servers:
                if server.is_live and not wrong:
                    server.version = version
            return wrong
        except (Refused, RuntimeError) as error:
            deque(buckets, maxlen=0)  # the other ranks gather all of them
            return str(error)
        finally:
            self.metrics["bytes"] = float(self._bytes)
            if self.interrupts:
                self._all(servers, "/continue_generation", {})
            fleet.run(fleet.end_update(version, folder))

    def _send_buckets(self, fleet: Fleet, servers: list[Server], version: int, buckets: Iterator[Bucket]) -> None:
        if not servers:  # all are being replaced
            deque(buckets, maxlen=0)
            return
        with suppress(Refused):  # one that an update left open when it failed
            self._all(servers, "/end_weight_update", {})
        self._all(servers, "/begin_weight_update", {})
        if self.path == "distributed":
            self._join(fleet, servers)
        for bucket in buckets:
            if self.path == "distributed":
                self._broadcast(fleet, servers, version, bucket)
            else:
                data = [_serialized(bucket)] * fleet.options.tensor_parallel
                self._all(
                    servers, "/update_weights_from_tensor", self._how(version) | {"serialized_named_tensors": data}
                )
        self._all(servers, "/end_weight_update", {})

    def _how(self, version: int) -> dict[str, Any]:
        return {"weight_version": str(version), "flush_cache": not self.keeps_cache}

    def _all(self, servers: list[Server], path: str, payload: dict[str, Any]) -> list[Any]:
        """One that did not answer is not asked again: its watcher replaces it after the update."""
        assert self.fleet is not None
        seconds, servers = self.fleet.patience.update, [server for server in servers if server.is_live]
        return self.fleet.run(on_all(servers, lambda s: s.client.post(path, payload, seconds=seconds, attempts=1)))

    async def _what_is_wrong(self, fleet: Fleet, servers: list[Server], probe: Probe | None) -> str:
        servers = [server for server in servers if server.is_live]
        seconds = fleet.patience.update
        if probe is not None:
            found = await on_all(servers, lambda s: probe.difference(s.client, seconds=seconds))
            for server, difference in zip(servers, found, strict=True):
                if difference is not None and not difference <= probe.tolerance:
                    return (
                        f"log-probs of {server.name} are {difference:.3g} off the trainer's in the mean, more than the "
                        f"{probe.tolerance:g} of rounding"
                    )
        if self.verify == "checksum":
            answers = await on_all(
                servers, lambda s: s.client.post("/weights_checker", {"action": "checksum"}, seconds=seconds)
            )
            for server, answer in zip(servers, answers, strict=True):
                if answer is None:
                    continue
                ranks = answer["ranks"]
                if len(ranks) > 1 or not self._receipt.covers(ranks[0]["checksums"]):
                    self.verify = "probe"
                    return f"{server.name} keeps its weights in a form whose checksums are not the trainer's"
                if names := self._receipt.differing(ranks[0]["checksums"]):
                    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    return f"{server.name} holds other weights than the trainer: {names[0]}{more}"
        return ""

    # --- The process group of trainer and servers ---

    def _join(self, fleet: Fleet, servers: list[Server]) -> None:
        """One group of the trainer (rank 0) and every rank of the servers; another one when the servers are others."""
        members = [server.client.url for server in servers]
        if self._group is not None and members == self._members:
            return
        self._leave(servers)
        size = fleet.options.tensor_parallel
        host = LOOPBACK if fleet.is_on_this_machine else _own_address(servers[0].client.url)
        port, backend = free_port(), "nccl" if torch.cuda.is_available() else "gloo"
        name = f"{GROUP}-{port}"

        async def invite(server: Server) -> Any:
            offset = 1 + size * servers.index(server)
            payload = {
                "master_address": host, "master_port": port, "rank_offset": offset, "world_size": 1 + size * len(servers),
                "group_name": name, "backend": backend,
            }  # fmt: skip
            return await server.client.post(
                "/init_weights_update_group", payload, seconds=fleet.patience.update, attempts=1
            )

        invited = asyncio.run_coroutine_threadsafe(on_all(servers, invite), fleet.loop)
        self._group = _process_group(backend, host, port, 1 + size * len(servers), name, fleet.patience.update)
        self._members, self._name = members, name
        invited.result()

    def _leave(self, servers: list[Server]) -> None:
        if self._group is not None:
            with suppress(Refused):
                self._all(servers, "/destroy_weights_update_group", {"group_name": self._name})
            dist.destroy_process_group(self._group)
            self._group = None

    def _broadcast(self, fleet: Fleet, servers: list[Server], version: int, bucket: Bucket) -> None:
        payload = self._how(version) | {
            "names": [name for name, _ in bucket],
            "dtypes": [str(x.dtype).removeprefix("torch.") for _, x in bucket],
            "shapes": [list(x.shape) for _, x in bucket],
            "group_name": self._name,
        }
        seconds = fleet.patience.update
        receiving = asyncio.run_coroutine_threadsafe(
            on_all(
                servers,
                lambda s: s.client.post("/update_weights_from_distributed", payload, seconds=seconds, attempts=1),
            ),
            fleet.loop,
        )
        try:
            for _, x in bucket:
                dist.broadcast(x.contiguous(), src=0, group=self._group)
        except RuntimeError:  # a server that died leaves the group broken for all
            self._group = None
            raise
        receiving.result()


def _process_group(backend: str, host: str, port: int, size: int, name: str, seconds: float) -> Any:
    """A group beside the trainer's own, of which this process is rank 0. Every member must make it in the same way."""
    from torch.distributed import distributed_c10d as c10d

    timeout = timedelta(seconds=seconds)
    # Not by a tcp:// address: under torchrun that would look for the launcher's store.
    stores: Any = dist
    store = stores.TCPStore(host, port, size, is_master=True, timeout=timeout, wait_for_workers=False)
    store = stores.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, 0, [], c10d.Backend(backend), store, group_name=cast(Any, name), timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


def _own_address(url: str) -> str:
    """The address of this machine that a server at this URL can reach."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]


def _serialized(bucket: Bucket) -> str:
    """For a child of ours, which reads it with pickle: values of host memory, of a GPU handles to it."""
    if bucket[0][1].is_cuda:
        buffer = io.BytesIO()
        ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(bucket)
        return base64.b64encode(buffer.getbuffer()).decode()
    return base64.b64encode(pickle.dumps(bucket, pickle.HIGHEST_PROTOCOL)).decode()
