"""What a policy and a critic are worth on a set of prompts: mean@k, pass@k, maj@k, diversity, calibration."""

# Shape letters: P = prompts, K = samples of a prompt
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_engine.metrics import (
    auroc,
    auroc_within,
    brier,
    distinct_answers,
    expected_calibration_error,
    majority_at_k,
    pass_at_k,
    reliability,
)
from tempo_engine.model import Critic
from tempo_engine.packing import pack
from tempo_engine.rollout import Labelled, Rollout
from tempo_engine.samplers import Sampler
from tempo_engine.verify import Verifier, verify


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts with answers that only evaluation sees. For unlabelled questions this is the audit: hidden answers, metrics only."""

    name: str
    items: Sequence[Labelled]
    verifier: Verifier


@dataclass(frozen=True)
class Judged:
    """What was found of each response: Judged([True], values=[[0.4, 0.6, 0.9]], terminal=[0.9], reliability=[(1, 0.9, 1.0)]).

    `values` are the critic's T + 1 values as probabilities of being right, clamped to [0, 1]; T of them for a critic that never
    sees the last token. `terminal` is the one that counts as outcome. `values`, `terminal` and `reliability` are empty without a
    critic.
    """

    is_right: list[bool]
    values: list[np.ndarray]
    terminal: list[float]
    reliability: list[tuple[int, float, float]]


def evaluate(
    sampler: Sampler,
    critic: Critic | None,
    target: tuple[float, float],
    evaluation_set: EvaluationSet,
    *,
    num_samples: int,
    micro_batch_tokens: int,
    key: str,
) -> tuple[dict[str, float], list[Rollout], Judged]:
    """Sample `num_samples` responses to every prompt and score them; returns the metrics, and the rollouts behind them as judged.

    `target` is what the critic regresses a wrong and a right response on, (0, 1) or (-1, 1): its terminal values are mapped to
    probabilities by it. Critic metrics exist only with a critic, pass@k for the powers of two up to `num_samples`. Where rewards
    are fractions, mean@k is their mean, and what counts right responses counts those above one half.
    """
    items = evaluation_set.items
    rollouts = sampler.sample([item.prompt for item in items], num_samples, key=f"{key}/{evaluation_set.name}")
    groups = [rollouts[i : i + num_samples] for i in range(0, len(rollouts), num_samples)]
    verifier = evaluation_set.verifier
    answers = [[verifier.extract(r.text) for r in group] for group in groups]
    rewards = verify(verifier, rollouts, [item for item in items for _ in range(num_samples)])
    reward_PK = np.array(rewards, dtype=float).reshape(len(items), num_samples)
    correct_PK = (reward_PK > 0.5).astype(float)
    right = [
        frozenset(a for a, is_right in zip(group, correct_K, strict=True) if is_right and a is not None)
        for group, correct_K in zip(answers, correct_PK, strict=True)
    ]
    metrics = {
        f"mean@{num_samples}": float(reward_PK.mean()),
        **{f"pass@{k}": pass_at_k(correct_PK, k) for k in _powers_of_two(num_samples)},
        f"maj@{num_samples}": majority_at_k(answers, right),
        "distinct_answers": distinct_answers(answers),
        "no_answer": float(np.mean([a is None for group in answers for a in group])),
        "entropy": float(-np.mean([p for r in rollouts for p in r.logprobs])),
        "response_length/mean": float(np.mean([len(r.response_ids) for r in rollouts])),
        "response_length/clip_ratio": float(np.mean([r.is_truncated for r in rollouts])),
    }
    is_right = [bool(c) for c in correct_PK.ravel()]
    if critic is None:
        return metrics, rollouts, Judged(is_right, [], [], [])
    values, terminal_N = probabilities(critic, target, rollouts, micro_batch_tokens)
    metrics |= calibration(terminal_N.reshape(reward_PK.shape), reward_PK)
    bins = reliability(terminal_N, reward_PK.ravel())
    return metrics, rollouts, Judged(is_right, values, terminal_N.tolist(), bins)


def probabilities(
    critic: Critic, target: tuple[float, float], rollouts: Sequence[Rollout], micro_batch_tokens: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The critic's values as probabilities of being right, clamped to [0, 1]: of each response before and after each token, up to
    the terminal one, and the terminal ones, [N]."""
    batch = pack(rollouts, device=critic.device)
    low, high = target
    value_TS = critic.values(batch, micro_batch_tokens)
    terminal_S = critic.terminal_values(value_TS, batch)
    value, terminal = (((x - low) / (high - low)).clamp(0, 1).cpu().double().numpy() for x in (value_TS, terminal_S))
    each = np.split(value, batch.cu_values_S1.cpu().numpy()[1:-1])
    return [v if critic.terminal == "after_last_token" else v[:-1] for v in each], terminal


def calibration(probability_PK: np.ndarray, correct_PK: np.ndarray) -> dict[str, float]:
    """How well terminal values tell right from wrong, and by how much they promise too much."""
    p, c = probability_PK.ravel(), correct_PK.ravel()
    return {
        "critic/auroc": auroc(p, c),
        "critic/auroc_within_prompt": auroc_within(probability_PK, correct_PK),
        "critic/brier": brier(p, c),
        "critic/ece": expected_calibration_error(p, c),
        "critic/value_mean": float(p.mean()),
        "critic/overvaluation": float(p.mean() - c.mean()),
    }


def _powers_of_two(limit: int) -> list[int]:
    return [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= limit]
