"""The rollout's memory: the engine's own sampler on a CPU; on GPUs SGLang servers that share them with the trainer.

Colocated servers give weights and cache back while the trainer works, and the trainer's shards stay. Each server spans the
fewest GPUs (tensor parallelism) on which a whole group of longest responses can decode beside them.
"""

# Shape letters: R = sequences that decode together, L = tokens of one, V = vocabulary, M = longest response
import math
from dataclasses import dataclass

from tempo_em.plan.activations import block_activations
from tempo_em.plan.layout import Layout
from tempo_em.plan.machine import GIB
from tempo_em.plan.memory import Moment, PhaseMemory, resident

# Served weights and cache are bfloat16.
SERVED_BYTES = 2
# CUDA graphs and activations of one server on one GPU.
SERVER_WORKSPACE = 2 * GIB
# The local sampler for each logit of each row: the logits, scaled, log-softmax; then probabilities and running sum in float64.
LOGIT_BYTES = 4 + 4 + 4 + 8 + 8
# For each row and possible token: its id, log-prob and random number; and random numbers for rows that wait.
TOKEN_BYTES, WAITING_BYTES = 8 + 4 + 8, 8


@dataclass(frozen=True)
class Sampling:
    """Who samples, and with what. `running` sequences decode at a time on each of `servers` (local: ranks), which span
    `tensor_parallel` processes each."""

    memory: PhaseMemory
    is_local: bool
    tensor_parallel: int
    servers: int
    running: int
    kv_bytes_per_token: float
    weight_bytes: float

    @property
    def description(self) -> str:
        if self.is_local:
            return f"the engine's own sampler, {self.running} sequences at a time on each process"
        size = "one GPU" if self.tensor_parallel == 1 else f"{self.tensor_parallel} GPUs"
        servers = "one server" if self.servers == 1 else f"{self.servers} servers"
        return f"SGLang on the same GPUs, {servers} of {size}, {self.running} sequences of the longest length on each"


def sampling(layout: Layout) -> Sampling:
    return _served(layout) if layout.machine.is_gpu else _local(layout)


def most_running(layout: Layout) -> int:
    """How many sequences the engine's own sampler can decode at a time in what is usable: whole groups, 0 when not even one."""
    room = layout.machine.usable
    group, most = layout.recipe.em.samples, _waiting(layout)
    fitting = [R for R in range(group, most + group, group) if _local_memory(layout, R).peak.total <= room]
    return max(fitting, default=0)


def _waiting(layout: Layout) -> int:
    """Responses of one rank in the larger of the two calls, on labelled and on unlabelled prompts; whole groups."""
    em = layout.recipe.em
    calls = [(layout.labelled_rows, em.labelled_group_size), (layout.voting_rows, em.samples)]
    return max(math.ceil(rows / group / layout.world) * group for rows, group in calls)


def _local(layout: Layout) -> Sampling:
    R = max(min(max(layout.recipe.rollout.max_running, layout.recipe.em.samples), _waiting(layout)), 1)
    per_token = 2.0 * layout.compute * layout.shape.kv_size * layout.shape.num_layers
    weights = float(layout.compute * layout.policy.size)
    return Sampling(_local_memory(layout, R), True, 1, layout.world, R, per_token, weights)


def _local_memory(layout: Layout, R: int) -> PhaseMemory:
    """The cache is padded to the longest; one layer of it exists twice while a token is appended, and its keys and values once for
    each query head where they are shared."""
    recipe, shape, c = layout.recipe, layout.shape, layout.compute
    L, M, V = layout.row_tokens, layout.response_tokens, shape.vocab_size
    cached = sum(min(window or L, L) for window in shape.windows)
    repeated = 2 * shape.query_size if shape.num_kv_heads < shape.num_heads else 0
    prefill = block_activations(
        shape, compute=c, attention=recipe.model.attention, checkpointing="off", row_tokens=layout.prompt_tokens
    ).forward
    always = resident(layout) | {"sampler": float(R * M * TOKEN_BYTES + max(R, _waiting(layout)) * M * WAITING_BYTES)}
    if layout.is_sharded:
        always |= {"gathered weights": float(c * layout.policy.size)}
    prompts = prefill * math.ceil(R / recipe.em.samples) * layout.prompt_tokens
    kv = 2.0 * c * shape.kv_size * R
    decoding = kv * cached + R * L * c * (shape.kv_size + repeated)
    return PhaseMemory(
        "rollout",
        (
            Moment(
                "prefill", always | {"activations": prompts, "KV cache": kv * shape.num_layers * layout.prompt_tokens}
            ),
            Moment("decode", always | {"KV cache": decoding, "logits": float(R * V * LOGIT_BYTES)}),
        ),
    )


def _served(layout: Layout) -> Sampling:
    shape, group = layout.shape, layout.recipe.em.samples
    weights = SERVED_BYTES * shape.total
    # Sliding windows are not counted on: whether a server frees what lies behind them depends on its version.
    per_token = 2.0 * SERVED_BYTES * shape.kv_size * shape.num_layers
    always = resident(layout) | {"server's workspace": float(SERVER_WORKSPACE)}
    sizes = [n for n in range(1, layout.per_node + 1) if layout.per_node % n == 0 and shape.num_heads % n == 0]
    fits, tensor_parallel = 0, sizes[-1]
    for n in sizes:
        room = layout.machine.usable - sum(always.values()) - weights / n
        fits = max(0, int(room // (per_token / min(n, shape.num_kv_heads) * layout.row_tokens)))
        tensor_parallel = n
        if fits >= group:
            break
    servers = layout.world // tensor_parallel
    wanted = math.ceil(layout.sampled_rows / servers)
    kv = per_token / min(tensor_parallel, shape.num_kv_heads) * layout.row_tokens * min(max(fits, 1), group)
    moment = Moment("decode", always | {"served weights": weights / tensor_parallel, "KV cache": kv})
    return Sampling(
        PhaseMemory("rollout", (moment,)), False, tensor_parallel, servers,
        max(1, min(fits, wanted)), per_token, float(weights),
    )  # fmt: skip
