"""The two updates: fit the critic to outcomes, improve the policy along advantages; and the supervised one before them.

Each splits its batch into minibatches (one optimiser step each) and these into micro-batches (one backward each). Weights are
divided by counts over the whole minibatch, so the result does not depend on how rows were packed.
"""

# Shape letters: T = packed response tokens, S = sequences, TS = T + S values
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from tempo_kernels import effective_sample_size, policy_loss, token_weights, value_head_loss
from tempo_kernels.policy_loss import PolicyLossKind
from tempo_kernels.segments import segment_index
from tempo_kernels.value_head import ValueClip, ValueLossKind
from torch import Tensor

from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch
from tempo_engine.tracking import Accumulator


@dataclass(frozen=True, kw_only=True)
class CriticUpdate:
    """How the critic is fitted."""

    epochs: int
    minibatches: int
    micro_batch_tokens: int
    loss: ValueLossKind = "mse"
    clip: ValueClip = "none"
    clip_range: float = 0.1
    target_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class PolicyUpdate:
    """How the policy is improved."""

    loss: PolicyLossKind
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    aggregate: Literal["token_mean", "sequence_mean"] = "sequence_mean"
    entropy_coef: float = 0.0


def minibatches(num_rows: int, parts: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each optimiser step: every epoch a fresh shuffle cut into `parts` nearly equal parts."""
    for _ in range(epochs):
        order = torch.randperm(num_rows, generator=generator)
        yield from (rows for rows in order.tensor_split(parts) if len(rows))


def fit_critic(
    critic: Critic, optimizer: Optimizer, batch: PackedBatch, return_S: Tensor, how: CriticUpdate, *, seed: int
) -> dict[str, float]:
    """E-step: regress every value of a sequence, T prefixes and the terminal one, on the sequence's outcome.

    The loss is the mean over sequences of the mean over their T + 1 values (TEMPO, arXiv 2604.19295, eq. 7), divided by the
    number of sequences of the whole minibatch. `batch` holds labelled rows only.
    """
    metrics = Accumulator()
    bins_3B = torch.zeros(3, 1, device=return_S.device)
    old_value_TS = critic.values(batch, how.micro_batch_tokens) if how.clip != "none" else None
    generator = torch.Generator().manual_seed(seed)
    for rows in minibatches(len(batch), how.minibatches, how.epochs, generator):
        rows = rows.to(return_S.device)
        for micro in batch.micro_batches(rows, how.micro_batch_tokens):
            part = batch.select(micro)
            values_per_sequence = part.response_length_S + 1
            loss = value_head_loss(
                critic.hidden(part),
                critic.weight,
                critic.bias,
                return_S[micro].repeat_interleave(values_per_sequence),
                (1.0 / (len(rows) * values_per_sequence)).repeat_interleave(values_per_sequence),
                head=critic.head,
                loss=how.loss,
                clip=how.clip,
                clip_range=how.clip_range,
                old_value_N=None if old_value_TS is None else old_value_TS[segment_index(batch.cu_values_S1, micro)],
                cu_seqlens_S1=part.cu_values_S1,
                value_range=how.target_range,
            )
            loss.total.backward()
            metrics.add(loss.metrics)
            bins_3B = bins_3B + loss.bins_3B
        metrics.end_step({"critic/grad_norm": optimizer.step()})
    return critic_metrics(metrics.means(), bins_3B)


def critic_metrics(means: dict[str, float], bins_3B: Tensor) -> dict[str, float]:
    """The sums that `value_head_loss` knows, read as what a person asks: how much of the outcomes' variance the values explain,
    and how far values are from outcomes among responses of like value (expected calibration error over ten bins)."""
    moments = {name: means.pop(f"critic/{name}") for name in ("weight", "return_square", "error_mean", "error_square")}
    weight = moments["weight"] or 1.0
    variance = moments["return_square"] / weight - (means["critic/return_mean"] / weight) ** 2
    error_variance = moments["error_square"] / weight - (moments["error_mean"] / weight) ** 2
    total_B, value_B, return_B = bins_3B.double()
    return means | {
        "critic/vf_explained_var": 1.0 - error_variance / variance if variance > 1e-12 else 0.0,
        "critic/calibration_error": float((value_B - return_B).abs().sum() / total_B.sum().clamp(min=1e-12)),
    }


def improve_policy(
    policy: Policy,
    optimizer: Optimizer,
    batch: PackedBatch,
    advantage_T: Tensor,
    how: PolicyUpdate,
    *,
    old_logprob_T: Tensor,
    seed: int,
) -> dict[str, float]:
    """M-step: one or more optimiser steps along the advantages. Counts up the policy's version once."""
    metrics = Accumulator()
    generator = torch.Generator().manual_seed(seed)
    for rows in minibatches(len(batch), how.minibatches, how.epochs, generator):
        rows = rows.to(advantage_T.device)
        weights = token_weights(batch.select(rows).cu_responses_S1, how.aggregate)
        weight_T = torch.zeros_like(advantage_T)
        weight_T[segment_index(batch.cu_responses_S1, rows)] = weights
        for micro in batch.micro_batches(rows, how.micro_batch_tokens):
            part = batch.select(micro)
            index = segment_index(batch.cu_responses_S1, micro)
            stats = policy.token_stats(part)
            loss = policy_loss(
                stats.logprob_T,
                old_logprob_T[index],
                advantage_T[index],
                weight_T[index],
                part.cu_responses_S1,
                kind=how.loss,
                clip_low=how.clip_low,
                clip_high=how.clip_high,
                dual_clip=how.dual_clip,
                entropy_T=stats.entropy_T,
                entropy_coef=how.entropy_coef,
            )
            loss.total.backward()
            metrics.add(loss.metrics)
        metrics.end_step({"actor/grad_norm": optimizer.step()})
    policy.version += 1
    means = metrics.means()
    ess = effective_sample_size(means)
    return {name: value for name, value in means.items() if not name.startswith("actor/ess_")} | {"actor/ess": ess}


def imitate(policy: Policy, optimizer: Optimizer, batch: PackedBatch, *, micro_batch_tokens: int) -> dict[str, float]:
    """Supervised cold start: one optimiser step on the mean negative log-likelihood of the response tokens."""
    metrics = Accumulator()
    num_tokens = int(batch.cu_responses_S1[-1])
    for micro in batch.micro_batches(torch.arange(len(batch), device=policy.device), micro_batch_tokens):
        stats = policy.token_stats(batch.select(micro))
        loss = -stats.logprob_T.sum() / num_tokens
        loss.backward()
        metrics.add({"sft/loss": loss.detach(), "sft/accuracy": stats.is_top1_T.sum() / num_tokens})
    metrics.end_step({"sft/grad_norm": optimizer.step()})
    policy.version += 1
    return metrics.means()


@torch.no_grad()
def token_logprobs(policy: Policy, batch: PackedBatch, max_tokens: int) -> Tensor:
    """Log-probs of all response tokens under the policy as it is, [T] float32, computed in micro-batches."""
    logprob_T = torch.empty_like(batch.sampler_logprob_T)
    for rows in batch.micro_batches(torch.arange(len(batch), device=policy.device), max_tokens):
        logprob_T[segment_index(batch.cu_responses_S1, rows)] = policy.token_stats(batch.select(rows)).logprob_T.float()
    return logprob_T
