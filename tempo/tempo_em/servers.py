"""`rollout.sglang` of the recipe -> how the engine starts or joins servers; and whether it could, before a run begins."""

import asyncio
import os
from collections.abc import Sequence

import torch
from tempo_engine import parallel
from tempo_engine.errors import UserError
from tempo_engine.model import Policy
from tempo_engine.samplers.sglang import SGLangOptions
from tempo_engine.sglang.client import Client
from tempo_engine.sglang.fleet import Patience
from tempo_engine.sglang.server import ServerOptions, check_answers, check_can_start, check_url
from tempo_engine.weight_sync import SyncPath

from tempo_em.recipe import Recipe

# SGLang pads other sizes on CPUs, and leaves the padding as it was.
CPU_MULTIPLE = 32
# Mixtures of experts are published expert by expert and computed with in one tensor: servers read only what is published.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def sglang_options(recipe: Recipe, policy: Policy) -> SGLangOptions:
    """Raises UserError for what cannot work with this model or on this machine."""
    rollout, how = recipe.rollout, recipe.rollout.sglang
    has_gpu, is_ours = torch.cuda.is_available(), how.servers == "auto"
    if any(getattr(policy.model.config, name, None) for name in EXPERTS):
        raise UserError(
            f"rollout.backend sglang cannot sync weights of mixtures of experts yet ({policy.model.config.model_type}); "
            "use rollout.backend local"
        )
    size = getattr(policy.model.config, "intermediate_size", CPU_MULTIPLE)
    if not has_gpu and is_ours and size % CPU_MULTIPLE:
        raise UserError(
            f"on a CPU SGLang computes with intermediate sizes that are multiples of {CPU_MULTIPLE}, the model's is {size}; choose "
            "another model, or rollout.backend local"
        )
    shares_gpus = has_gpu and is_ours and how.placement == "colocated"
    if shares_gpus and rollout.ahead:
        raise UserError(
            "rollout.ahead samples while the trainer trains; set rollout.sglang.placement to disaggregated, and gpus"
        )
    server = ServerOptions(
        dtype=recipe.model.dtype,
        max_running=rollout.max_running,
        context_length=rollout.max_prompt_tokens + rollout.max_new_tokens,
        deterministic=how.deterministic,
        tensor_parallel=how.tensor_parallel,
        data_parallel=how.data_parallel,
        max_total_tokens=how.max_total_tokens,
        memory_fraction=how.memory_fraction,
        saves_memory=shares_gpus,
        gpus=how.gpus or own_gpus(),
        threads=how.threads,
        port=how.port,
        arguments=how.arguments,
    )
    if has_gpu and is_ours and len(server.gpus) < how.replicas * server.num_gpus:
        raise UserError(
            f"{how.replicas} servers of {server.num_gpus} GPUs each need {how.replicas * server.num_gpus}, there are "
            f"{len(server.gpus)}; lower rollout.sglang.replicas or tensor_parallel"
        )
    patience = Patience(
        start=60 * how.start_minutes,
        health=how.health_seconds,
        generation=60 * how.generation_minutes,
        update=60 * how.update_minutes,
        restarts=how.restarts,
    )
    return SGLangOptions(
        server=server,
        patience=patience,
        replicas=how.replicas,
        urls=() if how.servers == "auto" else how.servers,
        key="" if how.servers == "auto" else os.environ.get(how.key_variable, ""),
        sync=_sync(recipe),
        sync_folder=how.sync_folder,
        verify=how.receipt,
        keeps_cache=how.keep_cache,
        interrupts=rollout.partial,
        naps=shares_gpus,
    )


def own_gpus() -> tuple[int | str, ...]:
    """The GPUs that this process sees, as another one must be told: not by their numbers in here."""
    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(names.split(",")[:count]) if names else tuple(range(count))


def _sync(recipe: Recipe) -> SyncPath:
    how = recipe.rollout.sglang
    if how.sync != "auto":
        return how.sync
    if recipe.rollout.ahead or how.data_parallel > 1:
        return "disk"
    if how.servers != "auto":
        return "distributed"
    if not torch.cuda.is_available():  # the fastest for large models, and at hand when a server is to be replaced
        return "disk"
    return "tensor" if how.placement == "colocated" else "distributed"


def check_servers(options: SGLangOptions, allowed_hosts: Sequence[str]) -> None:
    """Raises UserError when servers cannot be started here, or those of the recipe do not answer as they must."""
    if not options.urls:
        if parallel.world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", parallel.world_size())):
            raise UserError(
                "rollout.sglang.servers auto starts servers on one machine, this run has several; start SGLang on each and "
                "list their URLs"
            )
        check_can_start(options.replicas, options.server.port)
        return
    check_urls(options.urls, allowed_hosts, key=options.key, dtype=options.server.dtype)


def check_urls(urls: Sequence[str], allowed_hosts: Sequence[str], *, key: str, dtype: str) -> None:
    """Raises UserError for a URL that may not be used, and for a server that does not answer as it must."""
    for url in urls:
        check_url(url, allowed_hosts)

    async def ask() -> None:
        for url in urls:
            client = Client(url, key)
            try:
                await check_answers(client, dtype=dtype)
            finally:
                await client.close()

    asyncio.run(ask())
