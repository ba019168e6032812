"""Policy and critic: what a batch is worth under a Hugging Face model. Log-probs, entropies and values; no losses.

Both run inside a `Scope`: on many ranks their weights are shards, gathered while a function runs in it.
"""

# Shape letters: N = packed tokens, T = packed response tokens, TS = T + S values, D = hidden size
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from tempo_kernels import TokenStats, linear_logprob, split_values, value_head
from tempo_kernels.segments import segment_index
from tempo_kernels.value_head import HeadKind
from torch import Tensor, nn
from transformers import PreTrainedModel

from tempo_engine import parallel
from tempo_engine.adapters import start_adapters
from tempo_engine.blocks import BlockOptions, blocks_of, tune_blocks
from tempo_engine.errors import UserError
from tempo_engine.packing import MicroBatch, PackedBatch, micro_batches, pack
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.trees import can_plant, window_of
from tempo_engine.weights import blank_like, copy_weights, fill_from, is_blank, is_tied, make_room

R = TypeVar("R")
Terminal = Literal["after_last_token", "last_prefix"]

PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})


class Scope(nn.Module):
    """What FSDP wraps: a function called through it sees the whole weights, and its gradients come back as shards."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, function: Callable[..., R], *args: Any) -> R:
        """`function(*args)`. For gradients to find their way, its result must be made of tensors, tuples and dicts."""
        return function(*args)


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its LM head: the module whose last_hidden_state the head reads."""
    return cast(PreTrainedModel, model.base_model)


def hidden_states(trunk: PreTrainedModel, batch: PackedBatch, index: Tensor) -> Tensor:
    """Last hidden states at the chosen packed positions, [len(index), D]."""
    inputs, place_N = arranged(trunk, batch)
    hidden = trunk(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[place_N[index]]


def arranged(trunk: PreTrainedModel, batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
    """What the trunk reads, and where each packed token lies in its output without the batch's dimension, [N].

    FlashAttention reads the packed row as it is; elsewhere the sequences, or trees of them, are padded on the right, which causal
    attention cannot see.
    """
    if batch.cu_trees is not None:
        trees = batch.trees()
        return trees.inputs(trunk.config._attn_implementation or "", trunk.dtype), trees.index_N
    if not reads_packed(trunk):
        ids_BL, index_N = batch.padded()
        return {"input_ids": ids_BL}, index_N
    # With the boundaries given, no layer has to find them in position_ids, for which the host would wait each time.
    cu_seqlens_S1, longest = batch.cu_seqlens_S1.to(torch.int32), int(batch.length_S.max())
    inputs = {
        "input_ids": batch.input_ids_N[None], "position_ids": batch.position_N[None],
        "cu_seq_lens_q": cu_seqlens_S1, "cu_seq_lens_k": cu_seqlens_S1, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
    return inputs, torch.arange(len(batch.input_ids_N), device=batch.input_ids_N.device)


def reads_packed(trunk: PreTrainedModel) -> bool:
    """Whether sequences go through the trunk end to end (FlashAttention's varlen kernels) or padded to a rectangle.

    Convolutions and recurrent layers would carry their state from one sequence into the next, so models with those are padded.
    """
    has_attention_only = not getattr(trunk, "_is_stateful", False) and PACKED_LAYERS.issuperset(
        getattr(trunk.config, "layer_types", None) or ()
    )
    return trunk.config._attn_implementation == "flash_attention_2" and has_attention_only


class Policy:
    """A causal language model that is being improved. `version` counts its updates.

    Args:
        model: with its weights in `sharding.storage`, or on the meta device and then filled from `weights`.
        weights: Hugging Face directory that a model on the meta device is filled from, shard by shard.
        share_prompts: compute a prompt once for its responses where that pays and the architecture allows it (trees.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        version: int = 0,
        sharding: Sharding | None = None,
        blocks: BlockOptions | None = None,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        share_prompts: bool = False,
    ) -> None:
        self.sharding = sharding or Sharding(compute=model.dtype)
        self.blocks = blocks or BlockOptions()
        self.model = cast(
            PreTrainedModel, nn.Module.to(model.eval(), self.sharding.storage)
        )  # dropout has no place in a ratio of probabilities
        self.trunk = trunk_of(model)
        self.temperature = temperature
        self.version = version
        self.device = torch.device(device)
        self.precision = self.sharding.storage  # of log-probs and values: float32, or float64 for a float64 model
        self.head = cast(nn.Linear, model.get_output_embeddings())
        self.vocab_size, self.hidden_size = self.head.weight.shape
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.shares_prompts = share_prompts and can_plant(model.config)
        was_blank = is_blank(model)
        tune_blocks(model, self.blocks)
        self.scope = Scope(model=model)
        parallel.shard(self.scope, _groups(model), self.sharding, self.device)
        if was_blank:
            make_room(model, self.device, self.sharding)
        if self.blocks.lora is not None:
            start_adapters(model, self.blocks.lora)
        if weights is not None:
            fill_from(model, weights)
        if weights is not None or not was_blank:
            self.check_head()
            if self.shares_prompts:
                self.check_trees()

    @torch.no_grad()
    def check_head(self) -> None:
        """Raises UserError when the LM head does not reproduce the model's own logits: some architectures scale them.

        Also the first forward through the scope, which FSDP takes for the root of all: later ones may begin at a block.
        """
        ids = torch.arange(4, device=self.device)[None] % self.vocab_size
        hidden: list[Tensor] = []
        catch = self.trunk.register_forward_hook(
            lambda module, args, output: hidden.append(output.last_hidden_state[0])
        )

        def both() -> tuple[Tensor, Tensor]:
            own = self.model(input_ids=ids, use_cache=False).logits[0].to(self.precision)
            return own, self.logits(hidden[0])

        own, ours = self.scope(both)
        catch.remove()
        parallel.release(self.scope)
        tolerance = 1e-3 if self.sharding.compute == self.precision else 3e-2
        if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the LM head in a way this engine does not know "
                f"(largest difference {float((own - ours).abs().max()):.3g}); use another architecture"
            )

    @torch.no_grad()
    def check_trees(self) -> None:
        """No more sharing of prompts where the architecture does not follow the mask and the positions of a tree."""
        rollouts = [
            Rollout(Prompt("", "", (0, 1, 2)), ids, [0.0] * len(ids), (), False, "") for ids in ([3, 2], [1], [2, 0, 3])
        ]
        batch = pack(rollouts, self.device)
        grown = batch.select(torch.arange(3, device=self.device), torch.tensor([0, 3], device=self.device))

        def both() -> tuple[Tensor, ...]:
            return tuple(hidden_states(self.trunk, part, part.value_index_TS) for part in (batch, grown))

        plain, tree = self.scope(both)
        parallel.release(self.scope)
        tolerance = 1e-3 if self.sharding.compute == self.precision else 3e-2
        self.shares_prompts = torch.allclose(plain, tree, rtol=tolerance, atol=tolerance * float(plain.abs().max()))

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head on hidden states, at least float32, before the temperature. Inside the scope, or `parallel.gathered`, only."""
        logits = self.head(hidden).to(self.precision)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def token_stats(self, batch: PackedBatch) -> TokenStats:
        """Log-prob, entropy and more of each response token at the sampling temperature, [T] each."""
        return self.scope(self._token_stats, batch)

    def _token_stats(self, batch: PackedBatch) -> TokenStats:
        return linear_logprob(
            hidden_states(self.trunk, batch, batch.logprob_index_T),
            self.head.weight,
            batch.target_T,
            bias=self.head.bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )

    @torch.no_grad()
    def token_logprobs(self, batch: PackedBatch, max_tokens: int) -> Tensor:
        """Log-probs of all response tokens under the policy as it is, [T], computed in micro-batches."""
        logprob_T = torch.zeros(len(batch.sampler_logprob_T), dtype=self.precision, device=self.device)
        for micro in self.micro_batches(batch, None, max_tokens):
            part = self.token_stats(micro.of(batch)).logprob_T
            if micro.counts:
                logprob_T[segment_index(batch.cu_responses_S1, micro.rows)] = part
        parallel.release(self.scope)
        return parallel.add_up(logprob_T)

    def micro_batches(self, batch: PackedBatch, rows: Tensor | None, max_tokens: int) -> list[MicroBatch]:
        """This rank's micro-batches of the chosen rows, or of all."""
        plants = self.shares_prompts and int(batch.length_S.max()) <= window_of(self.trunk.config)
        width = self.hidden_size if plants else None
        return micro_batches(batch, rows, max_tokens, is_packed=reads_packed(self.trunk), tree_width=width)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that are trained."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def frozen_copy(self) -> "Policy":
        """A policy with the same weights that nobody trains: the reference of a KL."""
        copied = Policy(
            blank_like(self.model, self.sharding.storage).requires_grad_(False),
            temperature=self.temperature,
            sharding=self.sharding,
            blocks=BlockOptions(lora=self.blocks.lora),
            device=self.device,
        )
        copied.shares_prompts = self.shares_prompts
        copy_weights(copied.model, self.model)
        return copied


def _groups(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that FSDP gathers one at a time; what is left (norm, LM head, tied embedding) is gathered as one."""
    return [*blocks_of(model), *([] if is_tied(model) else [cast(nn.Module, model.get_input_embeddings())])]


class ValueHead(nn.Module):
    """Weight [D] and bias [1] that start at zero, so that every value starts at 0 (linear) or 1/2 (sigmoid).

    Of `count` heads, weight [count D] and bias [count], the others start at random: fitted alike, they agree on what they have seen
    and less on what they have not.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device, count: int = 1) -> None:
        super().__init__()
        weight = torch.zeros(count, hidden_size, dtype=dtype)
        weight[1:].normal_(std=hidden_size**-0.5, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.flatten().to(device))
        self.bias = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))

    def forward(self, hidden: Tensor, read: Callable[[Tensor, Tensor, Tensor], R]) -> tuple[R, ...]:
        """`read(hidden, weight, bias)` of each head, with a scalar bias."""
        weight_KD = self.weight.view(len(self.bias), -1)
        return tuple(read(hidden, weight, bias) for weight, bias in zip(weight_KD, self.bias, strict=True))


class Critic:
    """A token-level value function V(x, y_<t), read before each response token and after the last.

    `separate`: a trunk of its own, a copy of the policy's. `shared`: a value head on the policy's trunk, which the critic then
    never trains: an E-step must not move the policy.

    `terminal`: where a whole response's value is read. With last_prefix the critic never sees the last token: neither there nor
    when it is fitted. `heads`: more than one are an ensemble, of which values are the mean.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        backbone: Literal["separate", "shared"],
        kind: HeadKind,
        terminal: Terminal = "after_last_token",
        heads: int = 1,
    ) -> None:
        self.policy = policy
        self.backbone: Literal["separate", "shared"] = backbone
        self.terminal: Terminal = terminal
        self.kind: HeadKind = kind
        self.device = policy.device
        # The head is at least float32 whatever the trunk is: a difference of two values near 1 would drown in bf16 spacing.
        self.num_heads = heads
        self.head = ValueHead(policy.hidden_size, policy.precision, policy.device, heads)
        self.trunk = policy.trunk
        parts: dict[str, nn.Module] = {"head": self.head}
        groups: list[nn.Module] = []
        if backbone == "separate":
            self.trunk = blank_like(policy.trunk, policy.sharding.storage)
            parts["trunk"], groups = self.trunk, _groups(self.trunk)
            tune_blocks(self.trunk, policy.blocks)
        self.scope = Scope(**parts)
        parallel.shard(self.scope, groups, policy.sharding, policy.device, precise=[self.head])
        if backbone == "separate":
            make_room(self.trunk, policy.device, policy.sharding)
        self.copy_trunk()

    def copy_trunk(self) -> None:
        """Take over the policy's trunk as it is now: a critic begins with what the policy has learned."""
        if self.backbone == "separate":
            copy_weights(self.trunk, self.policy.trunk)

    def frozen_copy(self) -> "Critic":
        """A critic with a trunk of its own and the same weights, that nobody trains."""
        how: dict[str, Any] = {"kind": self.kind, "terminal": self.terminal, "heads": self.num_heads}
        copied = Critic(self.policy, backbone="separate", **how)
        copied.copy_from(self)
        return copied

    def copy_from(self, other: "Critic") -> None:
        """The other's trunk and head."""
        copy_weights(self.trunk, other.trunk)
        copy_weights(self.head, other.head)

    def terminal_values(self, value_TS: Tensor, batch: PackedBatch) -> Tensor:
        """The value of each whole response, [S], among the T + 1 of each."""
        baseline_T, terminal_S = split_values(value_TS, batch.cu_responses_S1)
        return terminal_S if self.terminal == "after_last_token" else baseline_T[batch.cu_responses_S1[1:] - 1]

    def read(self, batch: PackedBatch, function: Callable[[Tensor, Tensor, Tensor], R]) -> tuple[R, ...]:
        """`function(hidden [TS, D], head weight [D], bias [])` of each head: a value, or a loss. No gradient reaches the policy's
        trunk."""
        return self.scope(lambda: self.head(self._hidden(batch), function))

    def _hidden(self, batch: PackedBatch) -> Tensor:
        if self.backbone == "separate":
            return hidden_states(self.trunk, batch, batch.value_index_TS)
        with torch.no_grad():
            return self.policy.scope(hidden_states, self.trunk, batch, batch.value_index_TS)

    @torch.no_grad()
    def values(self, batch: PackedBatch, max_tokens: int, *, pessimism: float = 0.0) -> Tensor:
        """T + 1 values per sequence, [TS], computed in micro-batches of at most `max_tokens`: of several heads the mean, less
        `pessimism` times their standard deviation."""
        value_TS = torch.zeros(len(batch.value_index_TS), dtype=self.policy.precision, device=self.device)
        for micro in self.policy.micro_batches(batch, None, max_tokens):
            each = self.read(micro.of(batch), lambda *parts: value_head(*parts, head=self.kind))
            part = each[0]
            if len(each) > 1:
                part_KN = torch.stack(each)
                part = part_KN.mean(0) - pessimism * part_KN.std(0)
            if micro.counts:
                value_TS[segment_index(batch.cu_values_S1, micro.rows)] = part
        self.release()
        return parallel.add_up(value_TS)

    def release(self) -> None:
        """Back to shards after forwards without a backward, those of a shared trunk included."""
        parallel.release(self.scope)
        parallel.release(self.policy.scope)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that are trained."""
        return [(name, p) for name, p in self.scope.named_parameters() if p.requires_grad]
