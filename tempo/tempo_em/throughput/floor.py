"""The least one writes by hand: transformers' generate on all rows, then one padded GRPO step. No trainer around it."""

import torch
from torch import Tensor

from tempo_em.throughput.plain import Clipped, autocast, logprobs, padded, parts, sample
from tempo_em.throughput.turns import Facts, Turns
from tempo_em.throughput.work import CLIP, GROUP_EPS, Case, reward


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """Steps until the turns end; returns AdamW's first moments by parameter."""
    model = case.load_model().to(case.device)  # pyright: ignore[reportArgumentType]
    optimizer, tokenizer = Clipped(model), case.tokenizer()
    while turns.go():
        responses = sample(model, case, turns, given=given)
        tokenizer.batch_decode(responses)
        reward_GN = torch.tensor([reward(ids) for ids in responses], device=case.device).view(case.num_prompts, -1)
        centred_GN = reward_GN - reward_GN.mean(1, keepdim=True)
        advantage_B1 = (centred_GN / (reward_GN.std(1, keepdim=True) + GROUP_EPS)).view(-1, 1)
        rows, loss = padded(case, responses), 0.0
        for part in parts(case):
            micro = rows.part(part)
            with autocast(case):
                logprob_BT, _ = logprobs(model, micro)
            ratio_BT = (logprob_BT - logprob_BT.detach()).exp()
            plain, clipped = (-advantage_B1[part] * r for r in (ratio_BT, ratio_BT.clamp(1 - CLIP, 1 + CLIP)))
            total = micro.mean(torch.maximum(plain, clipped)).sum() / case.num_rows
            total.backward()
            loss += total.item()
        norm = optimizer.step()
        lengths = list(map(len, responses))
        trained = rows.response_BT
        turns.done(
            lambda loss=loss, norm=norm, lengths=lengths, trained=trained: Facts(
                list(zip(case.row_prompts, lengths, strict=True)), sum(lengths), int(trained.sum()), 1, loss, norm
            )
        )
    return optimizer.moments()
