"""benchmarks/rollouts.py: that unequal work would be noticed. What it measures needs a server and minutes: not here."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tempo_em.loading import resolve
from tempo_engine.rollout import Prompt, Rollout

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    spec = importlib.util.spec_from_file_location("rollouts_benchmark", BENCHMARKS / "rollouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rollout(*ids: int) -> Rollout:
    return Rollout(Prompt("a", "", (1,)), list(ids), [-0.5] * len(ids), ((0, len(ids)),), True, "")


def answer(*ids: int, logprob: float = -0.5) -> dict[str, Any]:
    return {"output_ids": list(ids), "meta_info": {"output_token_logprobs": [[logprob, i, None] for i in ids]}}


def test_other_tokens_or_log_probs_of_the_server_are_noticed(bench: Any) -> None:
    ours = [rollout(3, 4), rollout(5, 6)]
    theirs = [answer(3, 4), answer(5, 6, logprob=-0.75)]
    assert bench.difference(ours, theirs, same_tokens=True) == 0.25
    assert bench.difference(ours, [answer(3, 4), answer(5, 7)], same_tokens=True) == math.inf
    assert bench.difference(ours, [answer(3, 4), answer(5, 7)], same_tokens=False) == 0
    assert bench.difference(ours, [answer(3, 4), answer(5)], same_tokens=False) == math.inf


def test_the_ratio_is_that_of_the_medians(bench: Any) -> None:
    row = bench.compared([2.0, 3.0, 4.0], [1.0, 2.0, 9.0])
    assert (row["ours"], row["theirs"], row["ratio"]) == (3.0, 2.0, 1.5)
    assert row["quartiles"] == [[2.5, 3.5], [1.5, 5.5]]


def test_a_run_is_the_mean_of_its_iterations_and_stale_or_unequal_ones_fail(bench: Any) -> None:
    def run(seconds: list[float], sampling: float, staleness: list[float], tokens: int = 100) -> list[dict[str, float]]:
        times = zip(seconds, staleness, strict=True)
        return [
            {"timing_s/step": s, "timing_s/rollout": sampling, "rollout/staleness_max": old, "tokens/generated": tokens}
            for s, old in times
        ]

    in_turn = [run([5.0, 5.0], 3.0, [0, 0])]
    row = bench.ahead_row([run([5.0, 3.0], 1.0, [0, 1])], in_turn)
    assert (row["ours"], row["theirs"], row["ratio"], row["best_ratio"]) == (4.0, 5.0, 0.8, 0.6)
    assert row["staleness"] == 0.5
    assert row["checked"]
    assert not bench.ahead_row([run([5.0, 3.0], 1.0, [0, 2])], in_turn)["checked"]
    assert not bench.ahead_row([run([5.0, 3.0], 1.0, [0, 1], tokens=97)], in_turn)["checked"]


@pytest.mark.parametrize("depth", [0, 1])
def test_the_recipe_of_the_case_ahead_is_a_recipe(bench: Any, depth: int) -> None:
    recipe = resolve("ahead", bench.AHEAD, [("rollout.ahead", depth)]).recipe
    assert recipe.rollout.ahead == depth
    assert recipe.groups(recipe.em.labelled_share) == (8, 2)


def test_every_weight_changes_before_a_sync_so_that_old_ones_would_be_noticed(bench: Any) -> None:
    policy = bench.policy_of(bench.qwen3(64, 1, 64), "float32")
    before = {name: x.detach().clone() for name, x in policy.parameters()}
    bench.change(policy)
    assert policy.version == 1
    assert all(torch.equal(x, -before[name]) for name, x in policy.parameters())
