"""One whole iteration of every preset against its formulas, written once more: a sequence at a time, in float64, without packing,
micro-batches or kernels. The responses are random; gradients are compared before each optimiser step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tempo_em.build import build
from tempo_em.datasets import load_datasets
from tempo_em.loading import parse_setting, resolve
from tempo_em.presets import PRESETS
from tempo_em.schedule import EMLoop
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.tasks.answers import whole
from tempo_engine.verify import ExactMatch
from torch import Tensor

RECIPE: dict[str, Any] = {
    "micro_batch_tokens": 64,
    "model": {
        "dtype": "float64",
        "attention": "eager",
        "create": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
            "initializer_range": 0.3,
        },
    },
    "data": {
        "labelled": {"generator": "signs", "count": 64, "terms": [3], "largest": 4},
        "unlabelled": {"generator": "signs", "count": 16, "terms": [3], "largest": 4},
    },
    "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 8},
    "initialisation": {"critic_warmup": 1},
    "em": {"rollouts": 48},
    # Two steps on all rows: in the second the policy has moved, and clips matter.
    "estep": {"epochs": 2, "minibatches": 1},
    "mstep": {"epochs": 2, "minibatches": 1},
}  # fmt: skip


class Scripted:
    """A sampler of random tokens. Texts are among the right answer of the prompt, two wrong ones and none."""

    def __init__(self, right: dict[str, frozenset[str]], vocab: int) -> None:
        self.right, self.vocab = right, vocab

    def load(self, policy: Policy) -> None:
        pass

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        rollouts = []
        for number, prompt in enumerate(prompts):
            rng = Random(f"{key}/{number}")
            texts = [[min(self.right[prompt.id]), "x", "y", ""], ["x"]][number % 4 == 0]  # every fourth group agrees
            for _ in range(group_size):
                ids = [rng.randrange(self.vocab) for _ in range(rng.randint(1, 8))]
                rollouts.append(Rollout(prompt, ids, [-1.0] * len(ids), ((0, len(ids)),), False, rng.choice(texts)))
        return rollouts


@dataclass
class Steps:
    """Stands in for an optimiser's step: remembers weights and gradients, then moves along the gradient by a fixed distance."""

    optimizer: Optimizer
    parameters: list[tuple[str, torch.nn.Parameter]]
    distance: float
    weights: list[list[Tensor]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer.step = self  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def __call__(self) -> float:
        each = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for _, p in self.parameters]
        self.weights.append([p.clone() for _, p in self.parameters])
        self.gradients.append(torch.cat([g.flatten() for g in each]))
        for (_, p), g in zip(self.parameters, each, strict=True):
            p -= self.distance / (self.gradients[-1].norm() + 1e-12) * g
        self.optimizer.adamw.zero_grad()
        return 1.0

    @torch.no_grad()
    def go_back_to(self, step: int) -> None:
        for (_, p), saved in zip(self.parameters, self.weights[step], strict=True):
            p.copy_(saved)


# --- The definitions -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A response, its group, and what its own answer says."""

    rollout: Rollout
    group: int
    is_labelled: bool
    is_right: float
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # V(x, y_<1) ... V(x, y_<T), V(x, y_T)
    votes: list[str] = field(default_factory=list)  # the texts of its group

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.response_ids)


Outcome = Callable[[Row], float]
Advantages = Callable[[list[Row], Outcome], list[Tensor]]


def read_values(critic: Critic, rollout: Rollout) -> Tensor:
    ids = torch.tensor([*rollout.prompt.token_ids, *rollout.response_ids])
    hidden = critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return (hidden @ critic.head.weight + critic.head.bias)[len(rollout.prompt.token_ids) - 1 :]


def read_logprobs(policy: Policy, rollout: Rollout) -> Tensor:
    prompt = len(rollout.prompt.token_ids)
    ids = torch.tensor([*rollout.prompt.token_ids, *rollout.response_ids])
    logprobs = policy.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    return logprobs[range(prompt - 1, len(ids) - 1), ids[prompt:]]


def label(row: Row) -> float:
    return row.is_right


def signed_label(row: Row) -> float:
    return 2.0 * row.is_right - 1.0


def clamped_terminal(row: Row) -> float:
    """R = V(x, y_T) in [0, 1]; the label where there is one."""
    return row.is_right if row.is_labelled else min(max(float(row.values[-1]), 0.0), 1.0)


def released_terminal(row: Row) -> float:
    """R = V(x, y_<T), as it is; the label, -1 or 1, where there is one."""
    return signed_label(row) if row.is_labelled else float(row.values[-2])


def vote(row: Row) -> float:
    counts = {text: row.votes.count(text) for text in row.votes if text}
    most = max(counts.values(), default=0)
    return float(bool(counts) and row.rollout.text == min(text for text, n in counts.items() if n == most))


def frequency(row: Row) -> float:
    return row.votes.count(row.rollout.text) / len(row.votes) if row.rollout.text else 0.0


def whitened(parts: list[Tensor]) -> list[Tensor]:
    """(A - mean) / sqrt(var + 1e-8) over all tokens of these responses."""
    tokens = torch.cat(parts)
    return [(part - tokens.mean()) / (tokens.var() + 1e-8).sqrt() for part in parts]


def prefix_advantages(rows: list[Row], outcome: Outcome) -> list[Tensor]:
    """A_t = R - V(x, y_<t), whitened over all rows."""
    return whitened([outcome(row) - row.values[:-1] for row in rows])


def prefix_advantages_by_population(rows: list[Row], outcome: Outcome) -> list[Tensor]:
    parts = [[row for row in rows if row.is_labelled == is_labelled] for is_labelled in (False, True)]
    return [A for part in parts if part for A in prefix_advantages(part, outcome)]


def by_group(rows: list[Row], outcome: Outcome, formula: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found = []
    for group in dict.fromkeys((row.is_labelled, row.group) for row in rows):
        members = [row for row in rows if (row.is_labelled, row.group) == group]
        A = formula(torch.tensor([outcome(row) for row in members], dtype=torch.float64))
        found += [A[i].expand(row.num_tokens) for i, row in enumerate(members)]
    return found


def group_scores(rows: list[Row], outcome: Outcome) -> list[Tensor]:
    """(R - mean) / (std + 1e-6) in each group."""
    return by_group(rows, outcome, lambda R: (R - R.mean()) / (R.std() + 1e-6))


def exact_em_weights(rows: list[Row], outcome: Outcome) -> list[Tensor]:
    """n w_i - 1 with w_i = R_i / sum_j R_j; a group without any outcome teaches nothing."""
    return by_group(rows, outcome, lambda R: len(R) * R / R.sum() - 1 if R.sum() > 0 else torch.zeros_like(R))


def clipped(ratio: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - low, 1 + high))


def gspo(logprob: Tensor, old: Tensor, A: Tensor, low: float = 3e-4, high: float = 5e-4) -> Tensor:
    """One ratio a response, exp(mean log-ratio), whose gradient each token takes a part of."""
    ratio = (logprob - old).mean().detach().exp() * (logprob - logprob.detach()).exp()
    return clipped(ratio, A, low, high)


def ppo(logprob: Tensor, old: Tensor, A: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return clipped((logprob - old).exp(), A, low, high)


def ppo_clip_higher(logprob: Tensor, old: Tensor, A: Tensor) -> Tensor:
    return ppo(logprob, old, A, 0.2, 0.28)


def mean_of_sequences(losses: list[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).mean()


def mean_of_tokens(losses: list[Tensor]) -> Tensor:
    return torch.cat(losses).mean()


@dataclass(frozen=True)
class Fit:
    """The critic's loss: 1/2 (V - R)^2, its mean over a response's values and over responses."""

    target: Outcome = label
    after_last_token: bool = True
    clip: float | None = None  # how far a response's mean value may move

    def __call__(self, values: Tensor, old: Tensor, row: Row) -> Tensor:
        if not self.after_last_token:
            values, old = values[:-1], old[:-1]
        loss = 0.5 * (values - self.target(row)) ** 2
        if self.clip is not None:
            move = (values - old).mean()
            held = values + move.clamp(-self.clip, self.clip) - move
            loss = torch.maximum(loss, 0.5 * (held - self.target(row)) ** 2)
        return loss.mean()


@dataclass(frozen=True)
class Definition:
    outcome: Outcome
    advantages: Advantages
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = gspo
    mean: Callable[[list[Tensor]], Tensor] = mean_of_sequences
    fit: Fit | None = None
    reads_values_after_the_fit: bool = True
    populations: tuple[bool, ...] = (False, True)  # unlabelled rows, labelled rows


DEFINITIONS = {
    "tempo": Definition(clamped_terminal, prefix_advantages_by_population, fit=Fit()),
    "tempo_pure": Definition(clamped_terminal, prefix_advantages_by_population, fit=Fit(), populations=(False,)),
    "tempo_released": Definition(
        released_terminal,
        prefix_advantages,
        fit=Fit(signed_label, after_last_token=False, clip=0.1),
        reads_values_after_the_fit=False,
    ),
    "tempo_seq": Definition(clamped_terminal, group_scores, fit=Fit()),
    "exact_em": Definition(clamped_terminal, exact_em_weights, fit=Fit()),
    "frozen_critic": Definition(clamped_terminal, prefix_advantages_by_population),
    "rlvr": Definition(label, prefix_advantages, ppo, mean_of_tokens, fit=Fit(), populations=(True,)),
    "supervised_continuation": Definition(label, prefix_advantages, fit=Fit(), populations=(True,)),
    "grpo": Definition(label, group_scores, ppo, populations=(True,)),
    "dapo": Definition(label, group_scores, ppo_clip_higher, mean_of_tokens, populations=(True,)),
    "ttrl": Definition(vote, group_scores, populations=(False,)),
    "empo": Definition(frequency, group_scores, populations=(False,)),
    "empo_band": Definition(frequency, group_scores, populations=(False,)),
    "oracle": Definition(label, prefix_advantages_by_population, fit=Fit()),
}


# --- The comparison ------------------------------------------------------------------------------------------------------------


def make_loop(*settings: str) -> tuple[EMLoop, Any]:
    """A loop with a critic that already has opinions, and its EM stage."""
    recipe = resolve("test", RECIPE, [parse_setting(setting) for setting in settings], Path()).recipe
    parts = build(recipe)
    loop, datasets = parts.loop, load_datasets(recipe)
    right = {q.id: q.answers for name in ("labelled", "unlabelled") for q in datasets[name].questions}
    loop.sampler = Scripted(right, len(parts.tokenizer))  # pyright: ignore[reportAttributeAccessIssue]
    loop.verifier, loop.extract_unlabelled = ExactMatch(whole), whole
    if loop.oracle:
        loop.oracle = replace(loop.oracle, verifier=ExactMatch(whole))
    if loop.critic:
        generator = torch.Generator().manual_seed(5)
        for _, p in loop.critic.parameters():
            p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return loop, parts.stages[-1]


def rows_of(loop: EMLoop, sampled: Any, populations: tuple[bool, ...]) -> list[Row]:
    em, rows = loop.recipe.em, []
    assert isinstance(loop.sampler, Scripted)
    for is_labelled, rollouts, size in (
        (False, sampled.unlabelled, em.group_size), (True, sampled.labelled, em.labelled_group_size)
    ):  # fmt: skip
        for i, rollout in enumerate(rollouts if is_labelled in populations else []):
            is_right = float(rollout.text in loop.sampler.right[rollout.prompt.id])
            votes = [r.text for r in rollouts[i // size * size : i // size * size + size]]
            rows.append(Row(rollout, i // size, is_labelled, is_right, votes=votes))
    return rows


def gradient(parameters: list[tuple[str, torch.nn.Parameter]], loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for (_, p), g in zip(parameters, found, strict=True)]
    )


def assert_same(ours: Tensor, defined: Tensor) -> None:
    assert defined.norm() > 1e-4
    assert float((ours - defined).norm() / defined.norm()) < 1e-5


def test_every_preset_has_a_definition() -> None:
    assert DEFINITIONS.keys() == PRESETS.keys()


@pytest.mark.parametrize("method", PRESETS)
def test_an_iteration_follows_the_methods_formulas(method: str) -> None:
    how = DEFINITIONS[method]
    loop, em = make_loop(f"method={method}")
    policy_steps = Steps(loop.policy_optimizer, loop.policy.parameters(), 0.3)
    critic_steps = None
    if loop.critic and loop.critic_optimizer:
        critic_steps = Steps(loop.critic_optimizer, loop.critic.parameters(), 0.3)
    sampled = loop.fresh(em, 0)
    metrics = loop.iterate(em, 0)

    assert len(policy_steps.weights) == 2
    assert metrics["actor/pg_clipfrac"] > 0, "the clip must have had a say"
    assert (critic_steps is not None and len(critic_steps.weights) == 2) == (how.fit is not None)
    rows = rows_of(loop, sampled, how.populations)
    if loop.critic:
        if critic_steps and not how.reads_values_after_the_fit:
            critic_steps.go_back_to(0)
        with torch.no_grad():
            for row in rows:
                row.values = read_values(loop.critic, row.rollout)
    if how.fit and loop.critic and critic_steps:
        compare_fit(how.fit, loop.critic, critic_steps, rows_of(loop, sampled, (True,)), metrics)
    compare_policy(how, loop.policy, policy_steps, rows)


def compare_fit(fit: Fit, critic: Critic, steps: Steps, rows: list[Row], metrics: dict[str, float]) -> None:
    steps.go_back_to(0)
    with torch.no_grad():
        old = [read_values(critic, row.rollout) for row in rows]
    for step, ours in enumerate(steps.gradients):
        steps.go_back_to(step)
        values = [read_values(critic, row.rollout) for row in rows]
        losses = [fit(now, before, row) for now, before, row in zip(values, old, rows, strict=True)]
        assert_same(ours, gradient(steps.parameters, torch.stack(losses).mean()))
    assert (metrics["critic/vf_clipfrac"] > 0) == (fit.clip is not None)


def compare_policy(how: Definition, policy: Policy, steps: Steps, rows: list[Row]) -> None:
    advantages = how.advantages(rows, how.outcome)
    steps.go_back_to(0)
    with torch.no_grad():
        old = [read_logprobs(policy, row.rollout) for row in rows]
    for step, ours in enumerate(steps.gradients):
        steps.go_back_to(step)
        now = [read_logprobs(policy, row.rollout) for row in rows]
        losses = [how.loss(n, o, A) for n, o, A in zip(now, old, advantages, strict=True)]
        assert_same(ours, gradient(steps.parameters, how.mean(losses)))


def test_both_steps_correct_for_labels_that_lie() -> None:
    """With a rate of 0.2 right and wrong count 4/3 and -1/3."""

    def corrected(row: Row) -> float:
        return (4 * row.is_right - (1 - row.is_right)) / 3

    loop, em = make_loop("method=supervised_continuation", "em.noise_rate=0.2", "mstep.normalise=none")
    policy_steps = Steps(loop.policy_optimizer, loop.policy.parameters(), 0.3)
    assert loop.critic is not None
    assert loop.critic_optimizer is not None
    critic_steps = Steps(loop.critic_optimizer, loop.critic.parameters(), 0.3)
    sampled = loop.fresh(em, 0)
    metrics = loop.iterate(em, 0)
    rows = rows_of(loop, sampled, (True,))
    with torch.no_grad():
        for row in rows:
            row.values = read_values(loop.critic, row.rollout)
    compare_fit(Fit(corrected), loop.critic, critic_steps, rows, metrics)
    how = Definition(corrected, lambda rows, R: [R(row) - row.values[:-1] for row in rows], populations=(True,))
    compare_policy(how, loop.policy, policy_steps, rows)


def test_a_pessimistic_outcome_is_lower_by_what_the_heads_disagree() -> None:
    """R = mean - 2 std of the heads' terminal values; the baseline is their mean."""
    loop, em = make_loop(
        "method=tempo_pure", "critic.heads=3", "critic.pessimism=2", "mstep.normalise=none", "estep.every=0"
    )
    assert loop.critic is not None
    head = loop.critic.head
    steps = Steps(loop.policy_optimizer, loop.policy.parameters(), 0.3)
    sampled = loop.fresh(em, 0)
    loop.iterate(em, 0)
    rows = rows_of(loop, sampled, (False,))
    advantages = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([*row.rollout.prompt.token_ids, *row.rollout.response_ids])
            hidden = loop.critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            values_K = (hidden @ head.weight.view(3, -1).T + head.bias)[len(row.rollout.prompt.token_ids) - 1 :]
            outcome = (values_K[-1].mean() - 2 * values_K[-1].std()).clamp(0, 1)
            advantages.append(outcome - values_K[:-1].mean(1))
    compare_policy(Definition(label, lambda rows, outcome: advantages), loop.policy, steps, rows)


def groups_of(rollouts: Sequence[Rollout], size: int) -> list[list[str]]:
    return [[r.text for r in rollouts[i : i + size]] for i in range(0, len(rollouts), size)]


@pytest.mark.parametrize("method", ["tempo_released", "dapo"])
def test_labelled_groups_without_signal_are_replaced(method: str) -> None:
    loop, em = make_loop(f"method={method}")
    sampled = loop.fresh(em, 0)
    rewards = [sampled.rewards[i : i + 8] for i in range(0, len(sampled.rewards), 8)]
    assert len(rewards) == loop.recipe.groups(em.labelled_share)[0]
    assert all(len(set(group)) == 2 for group in rewards)
    assert sampled.num_responses > len(sampled.labelled) + len(sampled.unlabelled), "an eighth and more was replaced"


def test_the_band_leaves_out_the_groups_that_agree() -> None:
    """Of six groups the first and the fifth agree."""
    loop, em = make_loop("method=empo")
    assert [len(set(group)) > 1 for group in groups_of(loop.fresh(em, 0).unlabelled, 8)] == [
        False,
        *[True] * 3,
        False,
        True,
    ]
    loop, em = make_loop("method=empo_band")
    assert [len(set(group)) > 1 for group in groups_of(loop.fresh(em, 0).unlabelled, 8)] == [True] * 4


def test_a_fixed_denominator_divides_every_token_alike() -> None:
    """mstep.aggregate fixed_denominator: sums of tokens over the number of responses times the longest response."""
    how = Definition(
        label, group_scores, ppo, lambda losses: torch.cat(losses).sum() / (8 * len(losses)), populations=(True,)
    )
    loop, em = make_loop("method=grpo", "mstep.aggregate=fixed_denominator")
    steps = Steps(loop.policy_optimizer, loop.policy.parameters(), 0.3)
    sampled = loop.fresh(em, 0)
    loop.iterate(em, 0)
    compare_policy(how, loop.policy, steps, rows_of(loop, sampled, (True,)))
