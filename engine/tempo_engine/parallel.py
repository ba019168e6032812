"""Many processes as one. These few verbs are all that the rest of the engine knows of ranks; one process is the identity of each.

Every rank holds the same small things (rollouts, rewards, advantages) and walks through the same code; what is large is divided:
weights, gradients and optimiser states into shards (FSDP2), and rows of a batch into shares. Losses are divided by counts over the
whole minibatch before they are computed, so that ranks, like micro-batches, only add up.
"""

import functools
import heapq
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tempo_engine.errors import Halted, UserError

T = TypeVar("T")


def start(*, timeout_minutes: int = 30) -> torch.device:
    """Join the process group that torchrun set up for this process, if it did; returns the device of this rank.

    Raises UserError when a rank of this machine has no GPU of its own.
    """
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are visible; start fewer processes"
        )
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=timedelta(minutes=timeout_minutes))
    return device


def stop() -> None:
    """Leave the process group. Without it, a rank that ends first can take the others' last messages with it."""
    if dist.is_initialized():
        if world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()
        _mesh.cache_clear()


def leave(code: int = 0) -> NoReturn:
    """End this process with an exit code; after `stop`, if all went well. A rank ends without tearing its interpreter down.

    For gloo's threads outlive the group as long as a model holds it, and one that lets go of its last tensor during the tear-down
    aborts the process ("terminate called without an active exception", once in some hundred ends of busy ranks): torchrun then
    takes a finished run for a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _backend(device: torch.device) -> str:
    # Tensors of host memory (texts, decisions, checkpoints' plans) travel over gloo beside NCCL.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread is the only process: for work beside that of the other ranks, who do not take part in it."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _is_alone.get() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _is_alone.get() else 1


def is_main() -> bool:
    """Whether this rank is the one that writes files and speaks to the user."""
    return rank() == 0


# --- Dividing work -----------------------------------------------------------------------------------------------------------


def divide(costs: Sequence[int]) -> list[list[int]]:
    """Indices of the items each rank works on, [world size] lists in ascending order, nearly equal in cost.

    The costliest item first, each to the rank with least so far (Graham 1969, LPT: at most 4/3 of the best): costs 5, 4, 3, 2 for
    two ranks give [0, 3] and [1, 2].
    """
    shares: list[list[int]] = [[] for _ in range(world_size())]
    heap = [(0, r) for r in range(world_size())]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, r = heapq.heappop(heap)
        shares[r].append(index)
        heapq.heappush(heap, (load + costs[index], r))
    return [sorted(share) for share in shares]


def together(costs: Sequence[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Each rank does `work` on the indices of its share; every rank gets all results, one an index, in order.

    Results travel as JSON: what a rank sends is data, never code.
    """
    shares = divide(costs)
    mine = work(shares[rank()])
    if world_size() == 1:
        return mine
    results: list[Any] = [None] * len(costs)
    for share, part in zip(shares, _all_gather_json(mine), strict=True):
        for index, result in zip(share, part, strict=True):
            results[index] = result
    return results


def from_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main rank, on every rank; the others do not call it. It must be JSON.

    Raises UserError or Halted everywhere when it does so on the main rank.
    """
    if world_size() == 1:
        return decide()
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": decide()}
        except (UserError, Halted) as error:
            outcome = {"error": str(error), "is_halted": isinstance(error, Halted)}
    outcome = _all_gather_json(outcome)[0]
    if "error" in outcome:
        raise (Halted if outcome["is_halted"] else UserError)(outcome["error"])
    return outcome["value"]


def _all_gather_json(value: Any) -> list[Any]:
    """Every rank's value, in order of rank."""
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size())]
    dist.all_gather(parts, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [json.loads(part[: int(size)].numpy().tobytes().decode()) for part, size in zip(parts, sizes, strict=True)]


# --- Adding up ---------------------------------------------------------------------------------------------------------------


def add_up(x: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def largest(value: float) -> float:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    x = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


# --- Shards ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model is spread: see `parallel` in the recipe. `compute` is the dtype of the computation, weights are kept wider."""

    compute: torch.dtype = torch.float32
    replicas: int = 1
    reshard_after_forward: bool = True
    accumulate: Literal["whole", "sharded"] = "whole"
    offload: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether FSDP is: with one process only for what it does for any number of them, mixed precision and offload."""
        is_mixed = self.compute in (torch.bfloat16, torch.float16)
        return world_size() > 1 or is_mixed or self.offload or self.replicas > 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype that weights are kept and moved in: a step of 1e-6 would vanish in bfloat16."""
        return torch.promote_types(self.compute, torch.float32)


def shard(
    root: nn.Module,
    parts: Sequence[nn.Module],
    how: Sharding,
    device: torch.device,
    *,
    precise: Sequence[nn.Module] = (),
) -> None:
    """Spread `root` over the ranks, in place: one group of weights for each of `parts` and `precise`, one for the rest.

    Each group is gathered when its module's forward begins, in the dtype of the computation, that of `precise` parts as it is.
    Gradients are added up over ranks, not averaged, in the dtype that weights are kept in.
    """
    if not how.is_needed:
        return
    precision = MixedPrecisionPolicy(param_dtype=how.compute, reduce_dtype=how.storage)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if how.offload else OffloadPolicy()
    mesh = _mesh(device, how.replicas)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=_reshards(how))
    for part in precise:
        as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=as_it_is, offload_policy=offload, reshard_after_forward=False)
    fully_shard(root, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum; else a product by 1 that gloo does not know


def _reshards(how: Sharding) -> bool:
    return how.reshard_after_forward and world_size() > 1


@functools.cache  # models share their groups, and with them NCCL's communicators
def _mesh(device: torch.device, replicas: int) -> DeviceMesh:
    if not dist.is_initialized():  # mixed precision in a single process: a group of one, without a port
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
    if world_size() % replicas:
        raise UserError(
            f"parallel.replicas is {replicas}, which does not divide the {world_size()} processes of this run"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))


def will_sync(root: nn.Module, is_last: bool, how: Sharding) -> None:
    """Say before each backward whether it is the step's last one: until then gradients need not travel.

    `whole` keeps a whole gradient on every rank and adds up once. `sharded` keeps shards, and for that adds up within the shards of
    a replica each time; between replicas once.
    """
    if isinstance(root, FSDPModule):
        if how.accumulate == "whole":
            root.set_requires_gradient_sync(is_last)
        else:
            root.set_requires_all_reduce(is_last)


def release(root: nn.Module) -> None:
    """Back to shards. After a forward without a backward the root's own group stays gathered, in the dtype of the computation."""
    for group in root.modules():
        if isinstance(group, FSDPModule):
            group.reshard()


@contextmanager
def gathered(root: nn.Module, how: Sharding) -> Iterator[None]:
    """Whole weights on every rank: inside, ranks may run any number of forwards without waiting for each other. No gradients."""
    groups = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(_reshards(how) and group is not root, recurse=False)
            group.reshard()


def whole(x: Tensor) -> Tensor:
    """The whole tensor of a shard. All ranks must ask."""
    return cast(Tensor, x.full_tensor()) if isinstance(x, DTensor) else x


def assign(x: Tensor, value: Tensor) -> None:
    """Write a whole tensor, which all ranks hold alike, into a tensor or a shard."""
    if isinstance(x, DTensor):
        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
    local(x).copy_(local(value))


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_metrics(sums: Mapping[str, Tensor | float], maxima: Mapping[str, Tensor | float]) -> tuple[dict, dict]:
    """Metrics added up over ranks, and those of which the largest counts. Ranks hold the same names."""
    add = dict(zip(sums, _reduced(sums, dist.ReduceOp.SUM), strict=True))
    return add, dict(zip(maxima, _reduced(maxima, dist.ReduceOp.MAX), strict=True))


def _reduced(values: Mapping[str, Tensor | float], op: Any) -> list[float]:
    numbers = [float(value) for value in values.values()]
    if world_size() == 1 or not numbers:
        return numbers
    x = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(x, op)
    return x.tolist()
