"""The other ops against the same formula in eager PyTorch, which computes what ours returns: result, gradients and metrics."""

# Shape letters: T = packed tokens, S = sequences, N = value positions, D = hidden size, V = vocabulary, B = bins
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tempo_kernels.advantage import advantage
from tempo_kernels.bench.heads import LOGIT_STD
from tempo_kernels.bench.measure import Comparison, Side, Tensors, Truth, error_of
from tempo_kernels.logprob import gather_logprob
from tempo_kernels.policy_loss import policy_loss
from tempo_kernels.value_head import value_head_loss

NUM_BINS = 10


def against_formula(
    op: str, case: str, inputs: Sequence[Tensor], ours: Callable[..., Tensors], formula: Callable[..., Tensors],
    note: str = "",
) -> Comparison:  # fmt: skip
    """Our op against eager PyTorch of the same formula, which in float64 is the truth."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    want, got = formula(*exact), formula(*inputs)
    truth = Truth(want, {name: error_of(name, got[name], want[name]) for name in want})
    side = Side("default", lambda: partial(ours, *inputs))
    peer = Side(f"eager formula, torch {torch.__version__}", lambda: partial(formula, *inputs))
    return Comparison(op, case, str(inputs[0].dtype).removeprefix("torch."), side, peer, truth, note=note)


def random_boundaries(num_tokens: int, num_sequences: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """cu_seqlens [S + 1] of sequences of random lengths, none of them empty."""
    cuts = torch.randperm(num_tokens - 1, generator=generator, device=device)[: num_sequences - 1] + 1
    ends = torch.tensor([0, num_tokens], device=device)
    return torch.cat([ends[:1], cuts.sort().values, ends[1:]])


def advantage_comparison(num_tokens: int, num_sequences: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    cu_seqlens_S1 = random_boundaries(num_tokens, num_sequences, generator, device)
    outcome_S = torch.rand(num_sequences, generator=generator, device=device)
    value_TS = torch.rand(num_tokens + num_sequences, generator=generator, device=device)

    def ours(outcome_S: Tensor, value_TS: Tensor, cu_seqlens_S1: Tensor) -> Tensors:
        return {"advantage": advantage(outcome_S, value_TS, cu_seqlens_S1)}

    def formula(outcome_S: Tensor, value_TS: Tensor, cu_seqlens_S1: Tensor) -> Tensors:
        is_baseline_TS = torch.ones_like(value_TS, dtype=torch.bool)
        is_baseline_TS[cu_seqlens_S1[1:] + torch.arange(len(outcome_S), device=outcome_S.device)] = False
        return {"advantage": outcome_S.repeat_interleave(cu_seqlens_S1.diff()) - value_TS[is_baseline_TS]}

    case = f"T={num_tokens} S={num_sequences}, no gradient"
    note = "ours also checks its arguments"
    yield against_formula("advantage", case, [outcome_S, value_TS, cu_seqlens_S1], ours, formula, note)


def policy_loss_comparison(num_tokens: int, num_sequences: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, num_tokens, generator=generator, device=device)
    old_logprob_T, advantage_T = -draw().abs(), draw()
    logprob_T = (old_logprob_T + 0.2 * draw()).requires_grad_()
    weight_T = torch.full_like(advantage_T, 1 / num_tokens)
    cu_seqlens_S1 = random_boundaries(num_tokens, num_sequences, generator, device)

    def results(total: Tensor, metrics: Tensors, logprob_T: Tensor) -> Tensors:
        return {"total": total.detach(), **metrics, "d_logprob": torch.autograd.grad(total, logprob_T)[0]}

    def ours(logprob_T: Tensor, *others: Tensor) -> Tensors:
        return results(*policy_loss(logprob_T, *others, kind="ppo"), logprob_T)

    def formula(
        logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, weight_T: Tensor, _: Tensor
    ) -> Tensors:  # fmt: skip
        log_ratio_T = logprob_T - old_logprob_T
        ratio_T = log_ratio_T.exp()
        plain_T, clipped_T = -advantage_T * ratio_T, -advantage_T * ratio_T.clamp(0.8, 1.2)
        pg_T = torch.maximum(plain_T, clipped_T)
        total = (weight_T * pg_T).sum()
        with torch.no_grad():
            is_clipped_T = clipped_T > plain_T
            per_token = {
                "actor/pg_loss": pg_T,
                "actor/pg_clipfrac": is_clipped_T,
                "actor/clipfrac_low": is_clipped_T & (advantage_T < 0),
                "actor/clipfrac_high": is_clipped_T & (advantage_T > 0),
                "actor/ppo_kl": -log_ratio_T,
                "actor/ess_ratio": ratio_T,
                "actor/ess_ratio_squared": ratio_T**2,
            }
            metrics = {name: (weight_T * x_T).sum() for name, x_T in per_token.items()}
            metrics["actor/ess_weight"] = weight_T.sum()
            metrics["actor/log_ratio_max"], metrics["actor/ratio_max"] = log_ratio_T.abs().max(), ratio_T.max()
        return results(total, metrics, logprob_T)

    inputs = [logprob_T, old_logprob_T, advantage_T, weight_T, cu_seqlens_S1]
    note = "ours also checks its arguments, bounds the exponent and looks for dual clips"
    yield against_formula("policy_loss", f"ppo T={num_tokens} S={num_sequences}", inputs, ours, formula, note)


def value_head_comparison(num_rows: int, hidden_size: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden_ND = draw(num_rows, hidden_size).bfloat16().requires_grad_()
    weight_D = (draw(hidden_size) / hidden_size**0.5).requires_grad_()
    bias = torch.zeros(1, device=device, requires_grad=True)
    return_N = torch.rand(num_rows, generator=generator, device=device)
    weight_N = torch.full_like(return_N, 1 / num_rows)

    def results(total: Tensor, metrics: Tensors, value_N: Tensor, bins_3B: Tensor, *parameters: Tensor) -> Tensors:
        gradients = dict(zip(("d_hidden", "d_weight", "d_bias"), torch.autograd.grad(total, parameters), strict=True))
        return {"total": total.detach(), **metrics, "value": value_N.detach(), "bins": bins_3B, **gradients}

    def ours(*inputs: Tensor) -> Tensors:
        return results(*value_head_loss(*inputs, num_bins=NUM_BINS), *inputs[:3])

    def formula(hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, return_N: Tensor, weight_N: Tensor) -> Tensors:
        value_N = hidden_ND.to(weight_D.dtype) @ weight_D + bias
        error_N = value_N - return_N
        loss_N = 0.5 * error_N**2
        total = (weight_N * loss_N).sum()
        with torch.no_grad():
            per_row = {
                "critic/vf_loss": loss_N,
                "critic/vpred_mean": value_N,
                "critic/abs_error": error_N.abs(),
                "critic/return_mean": return_N,
                "critic/return_square": return_N**2,
                "critic/error_mean": -error_N,
                "critic/error_square": error_N**2,
            }
            metrics = {name: (weight_N * x_N).sum() for name, x_N in per_row.items()}
            metrics["critic/weight"] = weight_N.sum()
            clamped_N = value_N.clamp(0, 1)
            bin_N = (clamped_N * NUM_BINS).long().clamp(max=NUM_BINS - 1)
            columns_3N = torch.stack([weight_N, weight_N * clamped_N, weight_N * return_N])
            bins_3B = columns_3N.new_zeros(3, NUM_BINS).index_add_(1, bin_N, columns_3N)
        return results(total, metrics, value_N, bins_3B, hidden_ND, weight_D, bias)

    inputs = [hidden_ND, weight_D, bias, return_N, weight_N]
    note = "ours also checks its arguments, looks for clipped values and leaves out rows of weight 0"
    yield against_formula("value_head_loss", f"mse N={num_rows} D={hidden_size}", inputs, ours, formula, note)


def gather_logprob_comparison(num_tokens: int, vocab_size: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    logits_TV = (LOGIT_STD * draw(num_tokens, vocab_size)).bfloat16().requires_grad_()
    target_T = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    upstream = [draw(num_tokens), draw(num_tokens)]

    def results(logits_TV: Tensor, logprob_T: Tensor, entropy_T: Tensor) -> Tensors:
        grads = [g.to(logprob_T.dtype) for g in upstream]
        (d_logits,) = torch.autograd.grad([logprob_T, entropy_T], [logits_TV], grads)
        return {"logprob": logprob_T.detach(), "entropy": entropy_T.detach(), "d_logits": d_logits}

    def ours(logits_TV: Tensor, target_T: Tensor) -> Tensors:
        stats = gather_logprob(logits_TV, target_T)
        return results(logits_TV, stats.logprob_T, stats.entropy_T)

    def formula(logits_TV: Tensor, target_T: Tensor) -> Tensors:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        logp_TV = logits_TV.to(wide).log_softmax(-1)
        logprob_T = logp_TV.gather(-1, target_T[:, None])[:, 0]
        return results(logits_TV, logprob_T, -(logp_TV.exp() * logp_TV).sum(-1))

    note = "ours also returns logsumexp and whether the target is the most likely token"
    yield against_formula(
        "gather_logprob", f"T={num_tokens} V={vocab_size}", [logits_TV, target_T], ours, formula, note
    )
