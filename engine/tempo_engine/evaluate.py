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


def evaluate(
    sampler: Sampler,
    critic: Critic | None,
    target: tuple[float, float],
    evaluation_set: EvaluationSet,
    *,
    num_samples: int,
    micro_batch_tokens: int,
    key: str,
) -> tuple[dict[str, float], list[Rollout]]:
    """Sample `num_samples` responses to every prompt and score them; returns the metrics and the rollouts behind them.

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
    if critic is not None:
        probability_PK = terminal_probabilities(critic, target, rollouts, micro_batch_tokens).reshape(reward_PK.shape)
        metrics |= calibration(probability_PK, reward_PK)
    return metrics, rollouts


def terminal_probabilities(
    critic: Critic, target: tuple[float, float], rollouts: Sequence[Rollout], micro_batch_tokens: int
) -> np.ndarray:
    """The critic's terminal values as probabilities of being right, clamped to [0, 1], [N]."""
    batch = pack(rollouts, device=critic.device)
    terminal_S = critic.terminal_values(critic.values(batch, micro_batch_tokens), batch)
    low, high = target
    return ((terminal_S - low) / (high - low)).clamp(0, 1).cpu().double().numpy()


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
