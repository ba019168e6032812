"""Operations, bytes and seconds of an iteration. Each phase is as slow as its slowest part: products, memory, links.

Counted are matrix products (2 M N K operations), attention scores and sums over the tokens looked back at, the LM head at response
positions. A backward pass is two forward passes; checkpointing adds what it computes again.
"""

import math
from dataclasses import dataclass

from tempo_em.plan.layout import Layout, Network, Pass
from tempo_em.plan.memory import activations
from tempo_em.plan.sampling import Sampling

# Each activation is written and read in the forward pass, read in the backward one, and its gradient is written.
ACTIVATION_TRIPS = 4
# AdamW reads weight, gradient and both moments, and writes all but the gradient.
ADAMW_TRIPS = 7


@dataclass(frozen=True)
class PhaseTime:
    """Seconds that each part would need alone on one rank, and the operations of all ranks."""

    name: str
    flops: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])


def forward_flops(layout: Layout) -> float:
    """Operations of a forward pass over one longest row, without the LM head."""
    shape, tokens = layout.shape, layout.row_tokens
    return 2.0 * shape.num_layers * shape.active_block * tokens + attention_flops(layout, 0, tokens)


def head_flops(layout: Layout) -> float:
    """Operations of the LM head at the response positions of one longest row."""
    return 2.0 * layout.shape.embedding * layout.response_tokens


def attention_flops(layout: Layout, first: int, last: int) -> float:
    """Scores and weighted sums of the tokens at positions first..last: 4 operations for each of them, token looked at and query
    number."""
    pairs = sum(_looked_at(last, window) - _looked_at(first, window) for window in layout.shape.windows)
    return 4.0 * layout.shape.query_size * pairs


def _looked_at(tokens: int, window: int | None) -> float:
    """Sum over positions before `tokens` of how many tokens they look at."""
    near = min(tokens, window or tokens)
    return near * near / 2 + (tokens - near) * near


def times(layout: Layout, sampling: Sampling) -> list[PhaseTime]:
    """Every phase of one iteration, in order."""
    found = [rollout_time(layout, sampling)]
    if layout.critic:
        if (
            layout.recalibrates
        ):  # before the fit, fresh labelled rows are read once more: how far has the critic drifted?
            found.append(forward_time(layout, "drift", layout.critic, layout.forward(layout.labelled_rows), False))
            found.append(update_time(layout, "critic update", layout.critic, layout.critic_update(), False))
        found.append(forward_time(layout, "values", layout.critic, layout.forward(layout.policy_rows), False))
    logprobs = layout.forward(layout.policy_rows)
    if layout.recipe.mstep.old_logprob == "trainer":
        found.append(forward_time(layout, "log-probs", layout.policy, logprobs, True))
    if layout.has_reference:
        found.append(forward_time(layout, "reference log-probs", layout.policy, logprobs, True))
    return [*found, update_time(layout, "policy update", layout.policy, layout.policy_update(), True)]


def rollout_time(layout: Layout, sampling: Sampling) -> PhaseTime:
    """Prompts once a group; then tokens one by one, for which weights and cache are read each time."""
    machine, shape, tp = layout.machine, layout.shape, sampling.tensor_parallel
    prompts = sum(layout.recipe.groups(layout.recipe.em.labelled_share))
    one_prompt = 2.0 * shape.num_layers * shape.active_block * layout.prompt_tokens
    prefill = prompts * (one_prompt + attention_flops(layout, 0, layout.prompt_tokens))
    response = 2.0 * shape.num_layers * shape.active_block * layout.response_tokens + head_flops(layout)
    response += attention_flops(layout, layout.prompt_tokens, layout.row_tokens)
    flops = prefill + layout.sampled_rows * response
    rows = math.ceil(layout.sampled_rows / sampling.servers)
    together = min(rows, sampling.running)
    steps = max(1.0, rows / sampling.running) * layout.response_tokens
    cached = together * (layout.prompt_tokens + layout.response_tokens / 2) * sampling.kv_bytes_per_token
    seconds = {
        "compute": flops / layout.sampled_rows * rows / tp / machine.product_rate(layout.compute),
        "memory": steps * (sampling.weight_bytes + cached) / tp / machine.memory_rate,
    }
    if tp > 1:  # two results of a block, [R, D] each, are added up over the server's GPUs
        reduced = 2 * shape.num_layers * 2 * (tp - 1) / tp * together * shape.hidden_size * layout.compute
        seconds["links"] = steps * reduced / (machine.link * machine.link_share)
    return PhaseTime("rollout", flops, seconds)


@dataclass(frozen=True)
class Traffic:
    """Bytes over links for one rank: weights gathered and gradients added up, in whole; how often shards come from the host."""

    gathered: float
    reduced: float
    fetches: int


def forward_time(layout: Layout, name: str, network: Network, work: Pass, reads_logits: bool) -> PhaseTime:
    machine, read = layout.machine, layout.trunk_of(network)
    row_flops = forward_flops(layout) + reads_logits * head_flops(layout)
    activation_bytes = work.rank_rows * layout.row_tokens * layout.shape.num_layers * 2 * activations(layout).forward
    weights = work.micro_batches * layout.compute * read.size
    seconds = {
        "compute": work.rank_rows * row_flops / machine.product_rate(layout.compute),
        "memory": (activation_bytes + weights) / machine.memory_rate,
    }
    links = _links(layout, read, Traffic(weights, 0.0, work.micro_batches))
    return PhaseTime(name, work.num_rows * row_flops, seconds | links)


def update_time(layout: Layout, name: str, network: Network, work: Pass, reads_logits: bool) -> PhaseTime:
    machine, per_token, recipe = layout.machine, activations(layout), layout.recipe
    again = recipe.model.activation_checkpointing == "full"
    weight_gradients = recipe.model.lora is None
    passes = (
        (2 + weight_gradients + again) if network.num_blocks else 1
    )  # a critic on the policy's trunk goes forward only
    # linear_logprob computes its logits again in the backward pass, unless all of them fit its budget.
    row_flops = passes * forward_flops(layout) + reads_logits * (3 + weight_gradients) * head_flops(layout)
    kept = per_token.kept + per_token.again
    activation_bytes = work.rank_rows * layout.row_tokens * layout.shape.num_layers * ACTIVATION_TRIPS * kept
    micro_batches, read = work.num_steps * work.micro_batches, layout.trunk_of(network)
    weights = micro_batches * passes * layout.compute * read.size
    # With offload AdamW runs on the host, whose memory is about as fast as the link to it.
    adamw_rate = machine.memory_share * (machine.host_link if layout.offloads else machine.bandwidth)
    adamw = work.num_steps * ADAMW_TRIPS * layout.storage * network.trained / layout.num_shards
    seconds = {
        "compute": work.rank_rows * row_flops / machine.product_rate(layout.compute),
        "memory": (activation_bytes + weights) / machine.memory_rate + adamw / adamw_rate,
    }
    gathers = micro_batches * (2 if recipe.parallel.reshard_after_forward and network.num_blocks else 1)
    reduces = work.num_steps if recipe.parallel.accumulate == "whole" else micro_batches
    traffic = Traffic(
        gathers * layout.compute * read.size, reduces * layout.storage * network.trained, gathers + work.num_steps
    )
    return PhaseTime(name, work.num_rows * row_flops, seconds | _links(layout, read, traffic))


def _links(layout: Layout, network: Network, traffic: Traffic) -> dict[str, float]:
    """Seconds of the links inside a node, between nodes and to the host.

    A ring over the ranks of n nodes brings (n - 1) / n of the bytes through each node's adapters, which work in parallel; replicas
    add up their shards of the gradients in a ring of their own.
    """
    machine, shards, replicas = layout.machine, layout.num_shards, layout.recipe.parallel.replicas
    share, moved = machine.link_share, traffic.gathered + traffic.reduced
    seconds = {}
    if shards > 1:
        seconds["links"] = moved * (shards - 1) / shards / (machine.link * share)
    shards_of_node = min(shards, layout.per_node)
    crossing = moved * (1 - shards_of_node / shards)
    if layout.is_sharded:
        crossing += 2 * (1 - 1 / replicas) * traffic.reduced / shards * shards_of_node
    if layout.nodes > 1 and crossing:
        seconds["network"] = crossing / (machine.network * layout.per_node * share)
    if layout.offloads:
        fetched = traffic.fetches * layout.storage * network.size / shards
        seconds["host link"] = fetched / (machine.host_link * share)
    return seconds
