"""What the stacks that use transformers' own `generate` share: planned lengths, padded rows, a clipped AdamW step."""

# Shape letters: B = rows, L = tokens of a padded row, T = response tokens of the longest row, V = vocabulary
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tempo_em.throughput.turns import Turns
from tempo_em.throughput.work import LEARNING_RATE, MAX_GRAD_NORM, Case


class Planned(LogitsProcessor):
    """Forbids the end of sequence before a row's planned length and forces it there. In place: copies of logits cost."""

    def __init__(self, case: Case) -> None:
        self.eos_id, self.start = case.eos_id, case.prompt_tokens
        self.length_B = torch.tensor(case.lengths, device=case.device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        ends_B = self.length_B == input_ids.shape[1] - self.start + 1
        scores[:, self.eos_id] = -torch.inf
        scores[ends_B] = -torch.inf
        scores[ends_B, self.eos_id] = 0.0
        return scores


def processors(case: Case) -> LogitsProcessorList:
    return LogitsProcessorList([Planned(case)])


def rectangle(rows: list[list[int]], case: Case) -> Tensor:
    tensors = [torch.tensor(row, device=case.device) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=case.pad_id)


def autocast(case: Case) -> torch.autocast:
    return torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")


@torch.no_grad()
def sample(model: PreTrainedModel, case: Case, turns: Turns, *, given: bool) -> list[list[int]]:
    """A response to every row, by `generate` on all rows at once; or those given."""
    if given:
        return case.given
    ids_BL = rectangle(case.row_prompts, case)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.longest,
        eos_token_id=case.eos_id, pad_token_id=case.pad_id,
    )  # fmt: skip
    with turns.generation(), autocast(case):
        rows_BL: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=config, logits_processor=processors(case)
        )
    responses = rows_BL[:, case.prompt_tokens :].tolist()
    return [row[: row.index(case.eos_id) + 1] for row in responses]


class Rows(NamedTuple):
    """Rows padded on the right to the longest. `mask_BL`: 1 for every token; `response_BT`: 1 for every response token."""

    ids_BL: Tensor
    mask_BL: Tensor
    response_BT: Tensor

    def part(self, rows: slice) -> "Rows":
        return Rows(*(x[rows] for x in self))

    def mean(self, x_BT: Tensor) -> Tensor:
        """Of each row over its response tokens, [B]."""
        return (x_BT * self.response_BT).sum(1) / self.response_BT.sum(1)


def padded(case: Case, responses: list[list[int]]) -> Rows:
    ids_BL = rectangle([p + r for p, r in zip(case.row_prompts, responses, strict=True)], case)
    length_B1 = torch.tensor([[len(response)] for response in responses], device=case.device)
    response_BT = (torch.arange(ids_BL.shape[1] - case.prompt_tokens, device=case.device) < length_B1).long()
    mask_BL = torch.cat([torch.ones_like(ids_BL[:, : case.prompt_tokens]), response_BT], dim=1)
    return Rows(ids_BL, mask_BL, response_BT)


def parts(case: Case) -> list[slice]:
    size = case.rows_of_a_part
    return [slice(start, start + size) for start in range(0, case.num_rows, size)]


def logprobs(model: Any, rows: Rows, *, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy of each response token, [B, T] each, from the logits of response positions; float32."""
    T = rows.response_BT.shape[1]
    logits = model(
        input_ids=rows.ids_BL, attention_mask=rows.mask_BL, use_cache=False, logits_to_keep=T + 1
    ).logits[:, :-1]  # fmt: skip
    logprobs_BTV = logits.float().log_softmax(-1)
    del logits
    entropy_BT = None
    if with_entropy:
        with torch.no_grad():
            entropy_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
    return logprobs_BTV.gather(-1, rows.ids_BL[:, -T:, None])[..., 0], entropy_BT


class Clipped:
    """AdamW over a model's parameters, the gradient's norm clipped before each step."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(model.named_parameters())
        self.adamw = torch.optim.AdamW(self.named.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), MAX_GRAD_NORM)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm.item()

    def moments(self) -> dict[str, Tensor]:
        return {name: self.adamw.state[p]["exp_avg"] for name, p in self.named.items()}
