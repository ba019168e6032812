"""The two updates: fit the critic to outcomes, improve the policy along advantages; and the supervised one before them.

Each splits its batch into minibatches (one optimiser step each) and these into micro-batches (one backward each). Weights are
divided by counts over the whole minibatch, so the result depends neither on how rows were packed nor on how many ranks share them.
"""

# Shape letters: T = packed response tokens, S = sequences, TS = T + S values
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tempo_kernels import effective_sample_size, policy_loss, token_weights, value_head_loss
from tempo_kernels.policy_loss import KLKind, PolicyLossKind
from tempo_kernels.segments import segment_ids, segment_index, segment_sum
from tempo_kernels.value_head import ValueClip, ValueLossKind
from torch import Tensor

from tempo_engine import parallel
from tempo_engine.errors import NonFinite
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
    aggregate: Literal["token_mean", "sequence_mean", "fixed_denominator"] = "sequence_mean"
    denominator: float | None = None  # of fixed_denominator
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl: KLKind = "k3"
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0


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
    number of sequences of the whole minibatch. `batch` holds labelled rows only. A critic that reads its terminal value before the
    last token is not fitted after it: the mean is over T values.
    """
    metrics = Accumulator()
    bins_3B = torch.zeros(3, 1, device=return_S.device)
    old_value_TS = critic.values(batch, how.micro_batch_tokens) if how.clip != "none" else None
    generator = torch.Generator().manual_seed(seed)
    for rows in minibatches(len(batch), how.minibatches, how.epochs, generator):
        rows = rows.to(return_S.device)
        for micro in critic.policy.micro_batches(batch, rows, how.micro_batch_tokens):
            part = micro.of(batch)
            values_S = part.response_length_S + 1
            fitted_S = values_S if critic.terminal == "after_last_token" else part.response_length_S
            weight_N = (micro.counts / (len(rows) * fitted_S)).repeat_interleave(values_S)
            if critic.terminal == "last_prefix":
                weight_N[part.cu_values_S1[1:] - 1] = 0.0
            index = segment_index(batch.cu_values_S1, micro.rows)

            regress = partial(
                value_head_loss,
                return_N=return_S[micro.rows].repeat_interleave(values_S),
                weight_N=weight_N,
                head=critic.kind,
                loss=how.loss,
                clip=how.clip,
                clip_range=how.clip_range,
                old_value_N=None if old_value_TS is None else old_value_TS[index],
                cu_seqlens_S1=part.cu_values_S1,
                value_range=how.target_range,
            )
            parallel.will_sync(critic.scope, micro.is_last, critic.policy.sharding)
            losses = critic.read(part, regress)
            torch.stack([loss.total for loss in losses]).mean().backward()
            for loss in losses:
                metrics.add({name: x / len(losses) for name, x in loss.metrics.items()})
                bins_3B = bins_3B + loss.bins_3B / len(losses)
        norm = take_step(optimizer, "critic", batch.select(rows), return_S=return_S[rows])
        metrics.end_step({"critic/grad_norm": norm})
    critic.release()
    return critic_metrics(metrics.means(), parallel.add_up(bins_3B))


def take_step(optimizer: Optimizer, what: str, batch: PackedBatch, **more: Tensor) -> float:
    """One optimiser step on gradients of `batch`; returns their norm. Raises NonFinite when too many in a row were not finite."""
    norm = optimizer.step()
    if optimizer.skipped_in_a_row >= optimizer.max_skipped:
        raise NonFinite(what, optimizer.skipped_in_a_row, batch.tensors() | more)
    return norm


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
    ref_logprob_T: Tensor | None = None,
    seed: int,
) -> dict[str, float]:
    """M-step: one or more optimiser steps along the advantages. Counts up the policy's version once."""
    metrics = Accumulator()
    sampler_logprob_T = importance_denominator(batch, old_logprob_T, how.importance)
    generator = torch.Generator().manual_seed(seed)
    for rows in minibatches(len(batch), how.minibatches, how.epochs, generator):
        rows = rows.to(advantage_T.device)
        weights = token_weights(batch.select(rows).cu_responses_S1, how.aggregate, denominator=how.denominator)
        weight_T = weights.new_zeros(len(advantage_T))
        weight_T[segment_index(batch.cu_responses_S1, rows)] = weights
        for micro in policy.micro_batches(batch, rows, how.micro_batch_tokens):
            part = micro.of(batch)
            index = segment_index(batch.cu_responses_S1, micro.rows)
            parallel.will_sync(policy.scope, micro.is_last, policy.sharding)
            stats = policy.token_stats(part)
            loss = policy_loss(
                stats.logprob_T,
                old_logprob_T[index],
                advantage_T[index],
                weight_T[index] * micro.counts,
                part.cu_responses_S1,
                kind=how.loss,
                clip_low=how.clip_low,
                clip_high=how.clip_high,
                dual_clip=how.dual_clip,
                entropy_T=stats.entropy_T,
                entropy_coef=how.entropy_coef,
                ref_logprob_T=None if ref_logprob_T is None else ref_logprob_T[index],
                kl_coef=how.kl_coef,
                kl=how.kl,
                sampler_logprob_T=None if sampler_logprob_T is None else sampler_logprob_T[index],
                importance_cap=None if sampler_logprob_T is None else how.importance_cap,
            )
            loss.total.backward()
            metrics.add(loss.metrics)
        given = {"advantage_T": advantage_T, "old_logprob_T": old_logprob_T}
        index = segment_index(batch.cu_responses_S1, rows)
        norm = take_step(optimizer, "policy", batch.select(rows), **{name: x[index] for name, x in given.items()})
        metrics.end_step({"actor/grad_norm": norm})
    policy.version += 1
    means = metrics.means()
    ess = effective_sample_size(means)
    return {name: value for name, value in means.items() if not name.startswith("actor/ess_")} | {"actor/ess": ess}


def importance_denominator(
    batch: PackedBatch, old_logprob_T: Tensor, importance: Literal["none", "token", "sequence"]
) -> Tensor | None:
    """The log-probs l_T that make pi_old / exp(l_T) the importance ratio of each token, [T]; None without a correction.

    token: those of the sampler. sequence: every token's ratio is the product of its response's ratios.
    """
    if importance == "none":
        return None
    if importance == "token":
        return batch.sampler_logprob_T
    log_ratio_S = segment_sum(old_logprob_T - batch.sampler_logprob_T, batch.cu_responses_S1)
    return old_logprob_T - log_ratio_S[segment_ids(batch.cu_responses_S1)]


def imitate(policy: Policy, optimizer: Optimizer, batch: PackedBatch, *, micro_batch_tokens: int) -> dict[str, float]:
    """Supervised cold start: one optimiser step on the mean negative log-likelihood of the response tokens."""
    metrics = Accumulator()
    num_tokens = int(batch.cu_responses_S1[-1])
    for micro in policy.micro_batches(batch, None, micro_batch_tokens):
        parallel.will_sync(policy.scope, micro.is_last, policy.sharding)
        stats = policy.token_stats(micro.of(batch))
        share = micro.counts / num_tokens
        loss = -stats.logprob_T.sum() * share
        loss.backward()
        metrics.add({"sft/loss": loss.detach(), "sft/accuracy": stats.is_top1_T.sum() * share})
    metrics.end_step({"sft/grad_norm": take_step(optimizer, "policy", batch)})
    policy.version += 1
    return metrics.means()
