from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tempo_engine.evaluate import EvaluationSet, calibration, evaluate, probabilities
from tempo_engine.model import Critic, Policy
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import whole
from tempo_engine.verify import ExactMatch

MakePolicy = Callable[..., Policy]
MakeRollouts = Callable[..., list[Rollout]]


class Recorded:
    """A sampler that answers from a list: what it says is known, so the metrics can be checked by hand."""

    num_responses = num_tokens = 0

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts = texts

    def open(self, folder: Path, policy: Policy) -> None:
        pass

    def close(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def load(self, policy: Policy) -> None:
        pass

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        return [
            Rollout(prompt, [2] * (len(text) + 1), [-0.5] * (len(text) + 1), (), text == "cut", text)
            for prompt, group in zip(prompts, self.texts, strict=True)
            for text in group
        ]


def evaluation_set(*answers: str) -> EvaluationSet:
    items = [Labelled(Prompt(str(i), "", (2, 3)), frozenset({a})) for i, a in enumerate(answers)]
    return EvaluationSet("test", items, ExactMatch(whole))


def test_accuracy_and_diversity_by_hand() -> None:
    sampler = Recorded([["7", "7", "8", "9"], ["1", "2", "2", "cut"]])
    metrics, rollouts, judged = evaluate(
        sampler, None, (0.0, 1.0), evaluation_set("7", "1"), num_samples=4, micro_batch_tokens=64, key="k"
    )
    assert metrics["mean@4"] == pytest.approx(3 / 8)
    assert metrics["pass@1"] == pytest.approx(3 / 8)
    assert metrics["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert metrics["pass@4"] == 1.0
    assert metrics["maj@4"] == 0.5
    assert metrics["distinct_answers"] == 3.0
    assert metrics["response_length/clip_ratio"] == 1 / 8
    assert metrics["entropy"] == pytest.approx(0.5)
    assert len(rollouts) == 8
    assert judged.is_right == [True, True, False, False, True, False, False, False]
    assert judged.values == judged.terminal == judged.reliability == []
    assert not any(name.startswith("critic/") for name in metrics)


def test_terminal_values_become_probabilities_on_either_scale(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    critic = Critic(make_policy(), backbone="separate", kind="linear")
    critic.head.bias.data.fill_(0.5)
    rollouts = make_rollouts([(2, 3), (4, 1)])
    assert probabilities(critic, (0.0, 1.0), rollouts, 64)[1].tolist() == [0.5, 0.5]
    assert probabilities(critic, (-1.0, 1.0), rollouts, 64)[1].tolist() == [0.75, 0.75]
    critic.head.bias.data.fill_(-3.0)
    assert probabilities(critic, (0.0, 1.0), rollouts, 64)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("terminal", ["after_last_token", "last_prefix"])
def test_values_lead_to_the_terminal_one(make_policy: MakePolicy, make_rollouts: MakeRollouts, terminal: Any) -> None:
    """T + 1 values of T tokens; a critic that never sees the last token has none after it."""
    critic = Critic(make_policy(), backbone="separate", kind="linear", terminal=terminal)
    torch.nn.init.normal_(critic.head.weight)
    values, terminal_N = probabilities(critic, (0.0, 1.0), make_rollouts([(2, 3), (4, 1)]), 64)
    assert [len(v) for v in values] == ([4, 2] if terminal == "after_last_token" else [3, 1])
    assert [v[-1] for v in values] == terminal_N.tolist()


def test_a_critic_that_promises_too_much_is_over_valued() -> None:
    metrics = calibration(np.array([[0.9, 0.8], [0.7, 0.6]]), np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert metrics["critic/overvaluation"] == pytest.approx(0.5)
    assert metrics["critic/auroc"] == 1.0
    assert metrics["critic/auroc_within_prompt"] == 1.0
    assert metrics["critic/brier"] == pytest.approx((0.01 + 0.64 + 0.49 + 0.36) / 4)


def test_evaluation_changes_no_weight(make_policy: MakePolicy) -> None:
    policy = make_policy()
    critic = Critic(policy, backbone="separate", kind="linear")
    before = [p.detach().clone() for _, p in [*policy.parameters(), *critic.parameters()]]
    sampler = Recorded([["7"] * 2])
    evaluate(sampler, critic, (0.0, 1.0), evaluation_set("7"), num_samples=2, micro_batch_tokens=64, key="k")
    after = [p for _, p in [*policy.parameters(), *critic.parameters()]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
