"""A critic of one weight: it values a response by its length, or by its length times -1."""

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from tempo_em.train import Training
from tempo_em.transfer import MOST, Transfer, spread
from tempo_engine.rollout import Prompt, Rollout
from torch import Tensor


def responses(prompt: str, *lengths: int) -> list[Rollout]:
    return [Rollout(Prompt(prompt, prompt, (1,)), [2] * n, [0.0] * n, (), False, "") for n in lengths]


def test_a_judgement_that_turns_round_on_unlabelled_responses_alone_is_seen() -> None:
    sign = {"labelled": 1.0, "unlabelled": 1.0}

    def judge(rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([sign[r.prompt.id] * len(r.response_ids) for r in rollouts])

    look = Transfer(judge, responses("labelled", 1, 2, 4), responses("unlabelled", 3, 1, 5, 6))
    sign["unlabelled"] = -1.0
    assert look.metrics() == pytest.approx({"critic/kept_labelled": 1.0, "critic/kept_unlabelled": -1.0})


def test_values_that_are_all_the_same_have_no_correlation() -> None:
    look = Transfer(
        lambda rollouts: torch.zeros(len(rollouts)), responses("labelled", 1, 2), responses("unlabelled", 1)
    )
    assert all(math.isnan(value) for value in look.metrics().values())


def test_responses_are_looked_at_from_everywhere_and_not_too_many() -> None:
    assert list(spread([], MOST)) == []
    for count in (1, MOST - 1, MOST, MOST + 1, 5 * MOST):
        lengths = [len(r.response_ids) for r in spread(responses("labelled", *range(1, count + 1)), MOST)]
        assert len(lengths) <= MOST
        assert lengths[0] == 1
        assert lengths[-1] > count - -(-count // MOST)


def test_a_run_looks_at_every_e_step_and_trains_the_same_without_looking(prepare: Callable[..., Training]) -> None:
    runs = [prepare("em.iterations=2"), prepare("em.iterations=2", "alarms.transfer_gap=null")]
    rows = []
    for training in runs:
        training.run()
        lines = (training.run_dir / "metrics.jsonl").read_text().splitlines()
        rows.append([row for row in map(json.loads, lines) if row.get("stage")])
    kept = ("critic/kept_labelled", "critic/kept_unlabelled")
    assert [all(name in row for name in kept) for row in rows[0]] == [row["stage"] == "em" for row in rows[0]]
    assert not any(name in row for row in rows[1] for name in kept)
    weights = [dict(training.loop.policy.model.named_parameters()) for training in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
