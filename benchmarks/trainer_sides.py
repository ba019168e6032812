"""One policy update and one critic update, done three ways: by the engine and by two plain Hugging Face trainers.

    engine   `improve_policy` and `fit_critic`
    padded   what one writes first: `model(input_ids, attention_mask)` on a fixed number of rows in the order they come, padded to
             their longest; `log_softmax` and `gather` over that rectangle
    sorted   what one tunes it to: rows sorted by length, as many in a micro-batch as the engine takes, logits of response positions

Each does one optimiser step on one minibatch: the same weights and rows, the same loss (PPO-clip with old log-probs given and the
entropy as a metric; squared error of T + 1 values), dtype, clipping of the gradient's norm and fused AdamW.
"""

# Shape letters: B = rows, L = tokens of the longest of them, V = vocabulary, T = response tokens, D = hidden size
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from tempo_engine import parallel
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import pack
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.updates import CriticUpdate, PolicyUpdate, fit_critic, improve_policy
from tempo_engine.weights import DTYPES, create_causal_lm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForTokenClassification, PreTrainedModel

Side = Literal["engine", "padded", "sorted"]
Update = Literal["policy", "critic"]
SIDES: tuple[Side, ...] = ("engine", "padded", "sorted")
UPDATES: tuple[Update, ...] = ("policy", "critic")
CLIP, LEARNING_RATE, MAX_GRAD_NORM = 0.2, 1e-6, 1.0


@dataclass(frozen=True)
class Work:
    """One minibatch and the model that learns from it. All is drawn from seeds, so that every process has the same.

    `lengths` count the tokens of whole sequences; the first quarter of each is its prompt. Lists of tensors hold one [L] a row.
    """

    config: dict[str, Any]
    lengths: list[int]
    micro_batch_tokens: int
    dtype: str = "float32"

    def prompt_length(self, row: int) -> int:
        return self.lengths[row] // 4

    def response_of(self, rows: list[Tensor]) -> Tensor:
        """The response part of every row, end to end, [T]."""
        return torch.cat([x_L[self.prompt_length(row) :] for row, x_L in enumerate(rows)])

    def model(self) -> PreTrainedModel:
        """Weights are float32, whatever the dtype of the computation. No dropout."""
        return create_causal_lm(self.config, dtype=torch.float32, attention="sdpa", seed=0).eval()

    @cached_property
    def ids(self) -> list[Tensor]:
        rng = random.Random(1)
        return [torch.tensor([rng.randrange(self.config["vocab_size"]) for _ in range(n)]) for n in self.lengths]

    @cached_property
    def advantages(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(length, generator=generator) for length in self.lengths]

    @cached_property
    @torch.no_grad()
    def old_logprobs(self) -> list[Tensor]:
        """The model's own plus noise of 0.1, so that a few tokens are clipped, as after some steps of an epoch."""
        model, generator = self.model(), torch.Generator().manual_seed(3)
        rows = []
        for ids_L in self.ids:
            logits = model(input_ids=ids_L[None, :-1], use_cache=False).logits[0]
            logprobs = -F.cross_entropy(logits, ids_L[1:], reduction="none")
            rows.append(F.pad(logprobs, (1, 0)) + 0.1 * torch.randn(len(ids_L), generator=generator))
        return rows

    @cached_property
    def outcomes(self) -> Tensor:
        """Right or wrong, 1 or 0, for each row."""
        return (torch.rand(len(self.lengths), generator=torch.Generator().manual_seed(4)) > 0.5).float()

    @cached_property
    def value_head_D(self) -> Tensor:
        """Not zero, as it is at first: no gradient would reach the trunk."""
        size = self.config["hidden_size"]
        return torch.randn(size, generator=torch.Generator().manual_seed(5)) / size**0.5

    def rollouts(self) -> list[Rollout]:
        rows = [(ids_L.tolist(), self.prompt_length(row)) for row, ids_L in enumerate(self.ids)]
        return [
            Rollout(Prompt("", "", tuple(ids[:start])), ids[start:], [0.0] * (len(ids) - start), (), False, "")
            for ids, start in rows
        ]


class Trainer(NamedTuple):
    """`update` does one optimiser step and returns loss, grad_norm and, of a policy, entropy. `moments` are the optimiser's first
    ones by parameter: after the first update a tenth of the clipped gradient."""

    update: Callable[[], dict[str, float]]
    moments: Callable[[], dict[str, Tensor]]


def trainer(side: Side, update: Update, work: Work) -> Trainer:
    """A fresh model and its optimiser."""
    if side == "engine":
        return engine_policy(work) if update == "policy" else engine_critic(work)
    return plain_policy(work, side) if update == "policy" else plain_critic(work, side)


# --- The engine --------------------------------------------------------------------------------------------------------------


def engine_policy(work: Work) -> Trainer:
    policy = Policy(work.model(), sharding=Sharding(compute=DTYPES[work.dtype]))
    optimizer = Optimizer(policy.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    how = PolicyUpdate(
        loss="ppo", epochs=1, minibatches=1, micro_batch_tokens=work.micro_batch_tokens, clip_low=CLIP, clip_high=CLIP
    )
    update = partial(
        improve_policy, policy, optimizer, pack(work.rollouts()), work.response_of(work.advantages), how,
        old_logprob_T=work.response_of(work.old_logprobs), seed=0,
    )  # fmt: skip
    names = {"loss": "actor/pg_loss", "entropy": "actor/entropy", "grad_norm": "actor/grad_norm"}
    return Trainer(lambda: _renamed(update(), names), lambda: _moments(optimizer))


def engine_critic(work: Work) -> Trainer:
    critic = Critic(
        Policy(work.model(), sharding=Sharding(compute=DTYPES[work.dtype])), backbone="separate", kind="linear"
    )
    parallel.assign(critic.head.weight.detach(), work.value_head_D)
    optimizer = Optimizer(critic.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    how = CriticUpdate(epochs=1, minibatches=1, micro_batch_tokens=work.micro_batch_tokens)
    update = partial(fit_critic, critic, optimizer, pack(work.rollouts()), work.outcomes, how, seed=0)
    names = {"loss": "critic/vf_loss", "grad_norm": "critic/grad_norm"}
    return Trainer(lambda: _renamed(update(), names), lambda: _moments(optimizer))


def _renamed(metrics: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    return {ours: metrics[theirs] for ours, theirs in names.items()}


def _moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """Under the names of the plain trainers' parameters."""
    moments = {name: parallel.whole(optimizer.adamw.state[p]["exp_avg"]) for name, p in optimizer.named.items()}
    critic_parts = {"trunk": "model", "head": "score"}
    return {
        ".".join([critic_parts.get(first, first), *rest]): moment
        for (first, *rest), moment in ((name.split("."), moment) for name, moment in moments.items())
    }


# --- Plain Hugging Face ------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """The rows of a micro-batch, padded on the right to their longest, [B, L] each; zero where there is no response token."""

    ids: Tensor
    mask: Tensor  # 1 for every token that is not padding
    is_response: Tensor
    weight: Tensor  # adds up to 1 over the tokens of the minibatch, equally among rows
    advantage: Tensor
    old_logprob: Tensor
    outcome: Tensor  # [B, 1]


Loss = Callable[[Part], tuple[Tensor, dict[str, Tensor]]]


def micro_batches(work: Work, side: Side) -> list[list[int]]:
    """padded: as many rows as always fit the engine's number of tokens, in the order they come. sorted: as many as fit."""
    rows = list(range(len(work.lengths)))
    if side == "padded":
        size = max(work.micro_batch_tokens // max(work.lengths), 1)
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -work.lengths[row]):
        if not parts or (len(parts[-1]) + 1) * work.lengths[parts[-1][0]] > work.micro_batch_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def padded(work: Work, rows: list[int]) -> Part:
    def rectangle(values: list[Tensor]) -> Tensor:
        return pad_sequence(values, batch_first=True)

    ids_BL = rectangle([work.ids[row] for row in rows])
    length_B1 = torch.tensor([[work.lengths[row]] for row in rows])
    prompt_B1 = torch.tensor([[work.prompt_length(row)] for row in rows])
    position_L = torch.arange(ids_BL.shape[1])
    mask_BL = position_L < length_B1
    is_response_BL = mask_BL & (position_L >= prompt_B1)
    return Part(
        ids_BL,
        mask_BL.long(),
        is_response_BL,
        is_response_BL / (length_B1 - prompt_B1) / len(work.lengths),
        rectangle([work.advantages[row] for row in rows]),
        rectangle([work.old_logprobs[row] for row in rows]),
        work.outcomes[rows, None],
    )


def plain_policy(work: Work, side: Side) -> Trainer:
    model: Any = work.model()

    def loss_of(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """-min(r A, clip(r) A) with r = pi / pi_old, over the rectangle, or where it is a response."""
        given = [x[:, 1:] for x in (part.ids, part.weight, part.advantage, part.old_logprob)]
        if side == "padded":
            logits = model(input_ids=part.ids, attention_mask=part.mask, use_cache=False).logits[:, :-1]
        else:
            is_response = part.is_response[:, 1:]
            trunk = model.model(input_ids=part.ids, attention_mask=part.mask, use_cache=False)
            logits = model.lm_head(trunk.last_hidden_state[:, :-1][is_response])
            given = [x[is_response] for x in given]
        target, weight, advantage, old_logprob = given
        logprobs_V = logits.float().log_softmax(-1)
        del logits
        with torch.no_grad():
            entropy = -(logprobs_V.exp() * logprobs_V).sum(-1)
        logprob = logprobs_V.gather(-1, target[..., None])[..., 0]
        ratio = (logprob - old_logprob).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
        return (weight * loss).sum(), {"entropy": (weight * entropy).sum()}

    return plain_trainer(work, side, model, loss_of)


def plain_critic(work: Work, side: Side) -> Trainer:
    causal = work.model()
    causal.config.num_labels = 1
    model: Any = AutoModelForTokenClassification.from_config(causal.config).eval()
    model.model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(work.value_head_D)
        model.score.bias.zero_()

    def loss_of(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the mean of (V - R)^2 over the T + 1 positions before and after each response token."""
        value_BL = model(input_ids=part.ids, attention_mask=part.mask, use_cache=False).logits[..., 0].float()
        is_value_BL = part.is_response | F.pad(part.is_response[:, 1:], (0, 1))
        weight_BL = is_value_BL / is_value_BL.sum(1, keepdim=True) / len(work.lengths)
        return (weight_BL * 0.5 * (value_BL - part.outcome) ** 2).sum(), {}

    return plain_trainer(work, side, model, loss_of)


def plain_trainer(work: Work, side: Side, model: PreTrainedModel, loss_of: Loss) -> Trainer:
    parameters = dict(model.named_parameters())
    adamw = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for rows in micro_batches(work, side):
            with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
                loss, more = loss_of(padded(work, rows))
            loss.backward()
            for name, value in {"loss": loss, **more}.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return metrics | {"grad_norm": norm.item()}

    return Trainer(update, lambda: {name: adamw.state[p]["exp_avg"] for name, p in parameters.items()})
