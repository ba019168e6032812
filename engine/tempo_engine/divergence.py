"""Where sampler and trainer part: the first token whose log-probs differ, and the first layer whose outputs do."""

# Shape letters: N = positions of one sequence (prompt and response), T = packed response tokens, D = hidden size, V = vocabulary,
# R = sequences that decode together
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from tempo_kernels.segments import segment_ids
from torch import Tensor, nn

from tempo_engine import parallel
from tempo_engine.model import Policy, arranged
from tempo_engine.packing import PackedBatch
from tempo_engine.rollout import Rollout
from tempo_engine.samplers.local import _Running

# By module name: its outputs at the positions of one sequence, [N, D], in order of execution.
Outputs = dict[str, Tensor]
TRUNK, HEAD = "final hidden state", "LM head"


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What rounding explains. Of an iteration: the largest |d|, its mean, the k3 estimate of KL. `token`: the |d| from which one
    stands out. `layer`: the difference of a module's output at a position, relative to its length."""

    largest: float
    mean: float
    kl: float
    token: float
    layer: float


# By the dtype of the computation. Log-probs of samplers arrive in float32, whatever they compute in. In bfloat16 a single token may
# be far off by rounding alone, so that mean and kl decide.
TOLERANCES = {
    torch.float64: Tolerance(largest=1e-5, mean=1e-5, kl=1e-9, token=1e-5, layer=1e-6),
    torch.float32: Tolerance(largest=1e-4, mean=1e-4, kl=1e-8, token=1e-4, layer=1e-4),
    torch.bfloat16: Tolerance(largest=math.inf, mean=0.05, kl=0.01, token=0.5, layer=0.1),
}


@dataclass(frozen=True)
class Token:
    """A response token that sampler and trainer disagree on. `row` of the batch, `position` in its response."""

    row: int
    position: int
    id: int
    sampler_logprob: float
    trainer_logprob: float


def first_diverging_token(batch: PackedBatch, trainer_logprob_T: Tensor, tolerance: Tolerance) -> Token:
    """The token earliest in its response with |d| above the tolerance (of several, the one of the first row); if none is above, the
    one with the largest |d|."""
    d_T = (trainer_logprob_T - batch.sampler_logprob_T).abs().nan_to_num(nan=torch.inf)
    row_T = segment_ids(batch.cu_responses_S1)
    position_T = torch.arange(len(d_T), device=d_T.device) - batch.cu_responses_S1[row_T]
    beyond = (d_T > tolerance.token).nonzero()[:, 0]
    index = int(beyond[position_T[beyond].argmin()]) if len(beyond) else int(d_T.argmax())
    return Token(
        int(row_T[index]),
        int(position_T[index]),
        int(batch.target_T[index]),
        float(batch.sampler_logprob_T[index]),
        float(trainer_logprob_T[index]),
    )


# --- Layers ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A module's output in both programs: the largest relative difference ||a - b|| / ||b|| of a position, and where that is.

    `block` is the transformer block that it belongs to, None before the first and after the last.
    """

    name: str
    block: int | None
    difference: float
    position: int

    def __str__(self) -> str:
        place = "" if self.block is None else f" (block {self.block})"
        return f"{self.name}{place}, relative difference {self.difference:.3g} at position {self.position}"


def compare_layers(policy: Policy, trainer: Outputs, sampler: Outputs) -> list[Layer]:
    """Every module that both computed, in the trainer's order of execution. Of the LM head only the last position is known."""
    blocks = {name: number for number, name in enumerate(_block_names(policy))}
    num_positions = max(len(x) for x in trainer.values())
    layers = []
    for name, ours_ND in trainer.items():
        theirs_ND = sampler.get(name)
        if theirs_ND is None or theirs_ND.shape != ours_ND.shape:
            continue
        ours_ND, theirs_ND = ours_ND.double(), theirs_ND.double()
        length_N = ours_ND.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        difference_N = ((theirs_ND - ours_ND).norm(dim=-1) / length_N).nan_to_num(nan=torch.inf)
        worst = int(difference_N.argmax())
        block = next((number for b, number in blocks.items() if f"{name}.".startswith(f"{b}.")), None)
        layers.append(Layer(name, block, float(difference_N[worst]), num_positions - len(ours_ND) + worst))
    return layers


def first_diverging_layer(layers: Sequence[Layer], tolerance: Tolerance) -> Layer | None:
    return next((layer for layer in layers if not layer.difference <= tolerance.layer), None)


def trainer_layers(policy: Policy, batch: PackedBatch, row: int, num_positions: int, max_tokens: int) -> Outputs:
    """Of the batch's `row`, its first `num_positions`, computed in the micro-batch in which its log-probs were."""
    micro = next(m for m in policy.micro_batches(batch, None, max_tokens) if bool((m.rows == row).any()))
    part, index = micro.of(batch), int((micro.rows == row).nonzero()[0])
    start = int(part.cu_seqlens_S1[index])
    place_N = arranged(policy.trunk, part)[1][start : start + num_positions]
    with torch.no_grad(), _Watch(policy) as watch:
        watch.take = lambda x: x.flatten(0, 1)[place_N]
        policy.token_stats(part)
    parallel.release(policy.scope)
    found = watch.outputs()
    with torch.no_grad(), parallel.gathered(policy.scope, policy.sharding):
        found[HEAD] = policy.logits(found[TRUNK][-1:].to(policy.device)).cpu()
    return found


def cached_layers(policy: Policy, rollouts: Sequence[Rollout], group_size: int, row: int, num_tokens: int) -> Outputs:
    """Of one of the rollouts, as the local sampler computes it: prompts once a group, then token by token from the cache.

    Covers its prompt and its first `num_tokens` response tokens. The others, whole groups of `group_size`, decode along.
    """
    prompts = [rollout.prompt for rollout in rollouts[::group_size]]
    rows, device = len(rollouts), policy.device
    running = _Running(policy, torch.empty(0, dtype=torch.int64, device=device), num_tokens + 1)
    with torch.no_grad(), parallel.gathered(policy.scope, policy.sharding), _Watch(policy) as watch:
        length = len(rollouts[row].prompt.token_ids)
        watch.take = lambda x: x[row // group_size, -length:]
        running.join(prompts, group_size, list(range(rows)), torch.zeros(rows, num_tokens + 1), [num_tokens + 1] * rows)
        watch.take = lambda x: x[row]
        for column in range(num_tokens):
            # Responses that ended earlier decode along, unread, as they do while sampling.
            token_R = torch.tensor([r.response_ids[min(column, len(r.response_ids) - 1)] for r in rollouts])
            running.append(token_R.to(device), running.logprob_RM.new_zeros(rows))
            running.decode()
    return watch.outputs() | {HEAD: running.logits_RV[row : row + 1].cpu()}


def same_wave(rollouts: Sequence[Rollout], group_size: int, row: int, max_running: int) -> tuple[list[Rollout], int]:
    """The groups that the local sampler decodes together with the one of `row`, and the row's place among them."""
    starts = range(0, len(rollouts), group_size)
    order = sorted(starts, key=lambda start: -len(rollouts[start].prompt.token_ids))
    count = max(1, max_running // group_size)
    place = order.index(row - row % group_size)
    first = place - place % count
    wave = [rollouts[i] for start in order[first : first + count] for i in range(start, start + group_size)]
    return wave, (place - first) * group_size + row % group_size


class _Watch:
    """While it is open: what blocks, norms and layers give out in the model's width. `take` cuts one sequence's positions, [n, D],
    out of a module's output, [B, L, D]."""

    def __init__(self, policy: Policy) -> None:
        self.take: Callable[[Tensor], Tensor] = lambda x: x[0]
        self._width = policy.hidden_size
        self._found: dict[str, list[Tensor]] = {}
        self._modules = _watched(policy)
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        self._hooks = [m.register_forward_hook(self._keeps(name)) for name, m in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keeps(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            if isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] == self._width:
                # A copy: what sharded weights computed may lie in memory that is used again.
                self._found.setdefault(name, []).append(self.take(x).to("cpu", copy=True))

        return keep

    def outputs(self) -> Outputs:
        return {name: torch.cat(parts) for name, parts in self._found.items()}


def _watched(policy: Policy) -> Mapping[str, nn.Module]:
    """Blocks, modules without children that have weights of their own, and the whole trunk; nothing inside compiled blocks."""
    blocks = _block_names(policy)
    modules = {
        name: module
        for name, module in policy.model.named_modules()
        if name in blocks
        or (
            next(module.children(), None) is None
            and next(module.parameters(recurse=False), None) is not None
            and not (policy.blocks.compile and any(name.startswith(f"{block}.") for block in blocks))
        )
    }
    return modules | {TRUNK: policy.trunk}


def _block_names(policy: Policy) -> list[str]:
    kinds = set(policy.model._no_split_modules or ())  # FSDP puts its name before that of the class
    return [name for name, m in policy.model.named_modules() if type(m).__name__.removeprefix("FSDP") in kinds]
