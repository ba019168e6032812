"""The update of TEMPO's authors (their `em_token` estimator), written out plainly on padded batches of Hugging Face models.

What it is not: their code, which needs a fork of verl, Ray and GPUs. It differs from that in one place: a labelled row's weight in
the critic's loss is one over all labelled rows, where theirs depends on the rows that share its micro-batch (a bug).
"""

# Shape letters: B = rows, T = response tokens of the longest row
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from tempo_em.throughput.plain import Clipped, Rows, autocast, logprobs, padded, parts, sample
from tempo_em.throughput.turns import Facts, Turns
from tempo_em.throughput.work import CLIP_HIGH, CLIP_LOW, VALUE_CLIP, Case, label


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """Steps until the turns end; returns AdamW's first moments of both models by parameter."""
    policy: Any = case.load_model().to(case.device)  # pyright: ignore[reportArgumentType]
    critic = critic_of(policy, case)
    optimizers = {"policy": Clipped(policy), "critic": Clipped(critic)}
    tokenizer, is_labelled_B = case.tokenizer(), case.is_labelled_row.to(case.device)
    while turns.go():
        responses = sample(policy, case, turns, given=given)
        tokenizer.batch_decode(responses)
        rows, micros = padded(case, responses), parts(case)
        label_B = torch.tensor([label(ids) for ids in responses], device=case.device)
        with torch.no_grad(), autocast(case):
            old_logprob_BT = torch.cat([logprobs(policy, rows.part(part))[0] for part in micros])
            old_value_BT = torch.cat([values(critic, rows.part(part)) for part in micros])
        last_B1 = rows.response_BT.sum(1, keepdim=True) - 1
        outcome_B = torch.where(is_labelled_B, label_B, old_value_BT.gather(1, last_B1)[:, 0])
        advantage_BT = whitened(outcome_B[:, None] - old_value_BT, rows.response_BT)
        for part in micros:
            with autocast(case):
                value_BT = values(critic, rows.part(part))
            loss_B = value_loss(value_BT, old_value_BT[part], outcome_B[part, None], rows.part(part))
            ((loss_B * is_labelled_B[part]).sum() / is_labelled_B.sum()).backward()
        optimizers["critic"].step()
        loss = 0.0
        for part in micros:
            with autocast(case):
                logprob_BT, _ = logprobs(policy, rows.part(part), with_entropy=False)
            loss_B = policy_loss(logprob_BT, old_logprob_BT[part], advantage_BT[part], rows.part(part))
            total = loss_B.sum() / case.num_rows
            total.backward()
            loss += total.item()
        norm = optimizers["policy"].step()
        lengths, trained = list(map(len, responses)), rows.response_BT
        turns.done(
            lambda loss=loss, norm=norm, lengths=lengths, trained=trained: Facts(
                list(zip(case.row_prompts, lengths, strict=True)), sum(lengths), int(trained.sum()), 2, loss, norm
            )
        )
    return {f"{name}.{k}": x for name, one in optimizers.items() for k, x in one.moments().items()}


def critic_of(policy: PreTrainedModel, case: Case) -> Any:
    """A token classifier with one label on a copy of the policy's trunk."""
    policy.config.num_labels = 1
    critic: Any = AutoModelForTokenClassification.from_config(
        policy.config, attn_implementation="sdpa", dtype=torch.float32
    )
    critic.model.load_state_dict(policy.base_model.state_dict())
    with torch.no_grad():
        critic.score.weight.copy_(case.value_head)
        critic.score.bias.zero_()
    return critic.eval().to(case.device)


def values(critic: Any, rows: Rows) -> Tensor:
    """V(x, y_<t), read before each response token, [B, T]."""
    T = rows.response_BT.shape[1]
    logits = critic(input_ids=rows.ids_BL, attention_mask=rows.mask_BL, use_cache=False).logits
    return logits[:, -T - 1 : -1, 0].float()


def whitened(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) with both over all tokens of the batch, the variance unbiased."""
    count = mask_BT.sum()
    mean = (x_BT * mask_BT).sum() / count
    variance = ((x_BT - mean) ** 2 * mask_BT).sum() / (count - 1)
    return (x_BT - mean) / (variance + 1e-8).sqrt() * mask_BT


def value_loss(value_BT: Tensor, old_value_BT: Tensor, target_B1: Tensor, rows: Rows) -> Tensor:
    """Half of the larger squared error of each token, that of the value or that of the value moved back so far that the row's mean
    change is within the clip; mean over a row's tokens, [B]."""
    change_B1 = rows.mean(value_BT - old_value_BT)[:, None]
    clipped_BT = value_BT + change_B1.clamp(-VALUE_CLIP, VALUE_CLIP) - change_B1
    return 0.5 * rows.mean(torch.maximum((value_BT - target_B1) ** 2, (clipped_BT - target_B1) ** 2))


def policy_loss(logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, rows: Rows) -> Tensor:
    """GSPO: every token's ratio has the size of its row's, exp(mean log-ratio), and its own gradient; [B]."""
    log_ratio_B1 = rows.mean(logprob_BT - old_logprob_BT)[:, None]
    ratio_BT = (log_ratio_B1.detach() + logprob_BT - logprob_BT.detach()).clamp(max=10.0).exp()
    clipped_BT = ratio_BT.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return rows.mean(torch.maximum(-advantage_BT * ratio_BT, -advantage_BT * clipped_BT))
