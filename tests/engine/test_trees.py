"""Responses behind one prompt, computed once: positions, who sees whom, and the same numbers as without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine import trees
from tempo_engine.model import Critic, Policy
from tempo_engine.packing import PackedBatch, micro_batches, pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.trees import group_rows, tree_size, window_of
from tempo_engine.weights import create_causal_lm
from torch import Tensor
from transformers import MistralConfig, Olmo3Config, Qwen3Config

MakePolicy = Callable[..., Policy]


def batch_of(groups: list[tuple[tuple[int, ...], list[list[int]]]]) -> PackedBatch:
    """Of (prompt, its responses) in order."""
    return pack([
        Rollout(Prompt("", "", prompt), ids, [-1.0] * len(ids), (), False, "") for prompt, group in groups for ids in group
    ])  # fmt: skip


def as_trees(batch: PackedBatch, boundaries: list[int]) -> PackedBatch:
    return batch.select(torch.arange(len(batch)), torch.tensor(boundaries))


def test_the_prompt_stands_once_and_positions_go_on_from_it_in_each_response() -> None:
    tree = as_trees(batch_of([((5, 9), [[7, 2], [3]])]), [0, 2]).trees()
    assert tree.ids_BL.tolist() == [[5, 9, 7, 2, 3]]
    assert tree.position_BL.tolist() == [[0, 1, 2, 3, 2]]
    assert tree.index_N.tolist() == [0, 1, 2, 3, 0, 1, 4]


def test_a_response_sees_the_prompt_and_itself_and_nobody_sees_padding() -> None:
    grown = as_trees(batch_of([((5, 9), [[7, 2], [3]]), ((4,), [[8, 6]])]), [0, 2, 3]).trees()
    first, second = grown.sees_BLL.int().tolist()
    assert first == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert grown.ids_BL[1].tolist() == [4, 8, 6, 0, 0]
    assert [row[3:] for row in second[:3]] == [[0, 0]] * 3
    assert all(row[0] for row in second), "a row that sees nothing would be NaN"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_log_probs_and_gradients_are_those_of_separate_sequences(model_type: str, attention: Any) -> None:
    config = {
        "model_type": model_type, "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    model = create_causal_lm(config, dtype=torch.float64, attention=attention, seed=0)
    policy = Policy(model)
    batch = batch_of([((5, 9, 3), [[7, 2], [3], [30, 31, 32, 33]]), ((4,), [[8, 6], [9]])])
    found = []
    for part in (batch, as_trees(batch, [0, 3, 5])):
        policy.model.zero_grad()
        logprob_T = policy.token_stats(part).logprob_T
        (logprob_T * torch.arange(1, len(logprob_T) + 1)).sum().backward()
        found.append((logprob_T.detach(), [p.grad for _, p in policy.parameters()]))
    (plain, gradients), (shared, ours) = found
    assert torch.allclose(shared, plain, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(ours, gradients, strict=True):
        assert isinstance(gradient, Tensor)
        assert isinstance(other, Tensor)
        assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backbone", ["separate", "shared"])
def test_values_are_those_of_separate_sequences(
    make_policy: MakePolicy, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "SHORTEST_PROMPT", 1)
    policy = make_policy()
    critic = Critic(policy, backbone=backbone, kind="linear")
    critic.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = batch_of([((5, 9, 3, 4), [[7, 2], [3], [30, 31]]), ((4, 4, 4), [[8, 6], [9]])])
    plain = critic.values(batch, max_tokens=1000)
    policy.shares_prompts = True
    assert any(micro.cu_trees is not None for micro in policy.micro_batches(batch, None, 1000))
    assert torch.allclose(critic.values(batch, max_tokens=1000), plain, atol=1e-6)
    assert torch.allclose(critic.values(batch, max_tokens=8), plain, atol=1e-6)


@settings(deadline=None)
@given(
    responses=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=30),
    prompts=st.lists(st.integers(1, 400), min_size=4, max_size=4),
    max_tokens=st.integers(1, 1500),
    width=st.sampled_from([32, 512, 4096]),
)
def test_rows_are_in_one_tree_each_with_rows_of_their_prompt_within_the_budget(
    responses: list[tuple[int, int]], prompts: list[int], max_tokens: int, width: int
) -> None:
    prompt, length = [p for p, _ in responses], [prompts[p] + r for p, r in responses]
    shared = [prompts[p] for p in prompt]
    found = group_rows(prompt, shared, length, max_tokens, width)
    assert sorted(row for tree in found for row in tree) == list(range(len(responses)))
    for tree in found:
        assert len({prompt[row] for row in tree}) == 1
        longest = max(length[row] for row in tree) - shared[tree[0]]
        assert len(tree) == 1 or shared[tree[0]] >= trees.SHORTEST_PROMPT
        # Parts of a group are dealt in turn, from the longest: none is larger than the mean by more than its longest response.
        assert len(tree) == 1 or tree_size(tree, shared, length) <= max_tokens + longest


def test_long_prompts_are_shared_by_all_and_long_responses_by_none() -> None:
    # Prompts of 512 and 16 responses of 64: one tree of 1,536 tokens instead of 9,216.
    assert group_rows([0] * 16, [512] * 16, [576] * 16, 4096, 256) == [list(range(16))]
    # Responses of 4,096 behind 128: a tree's mask would cost more than what it saves.
    assert len(group_rows([0] * 16, [128] * 16, [4224] * 16, 10**6, 256)) == 16
    assert group_rows([0, 0], [63, 63], [70, 70], 4096, 256) == [[0], [1]]


def test_micro_batches_are_cut_between_trees() -> None:
    batch = batch_of([(tuple(range(100)), [[1, 2, 3]] * 4), (tuple(range(70)), [[1, 2]] * 2)])
    micros = micro_batches(batch, None, 150, is_packed=False, tree_width=256)
    assert [micro.rows.tolist() for micro in micros] == [[0, 1, 2, 3], [4, 5]]
    assert [micro.cu_trees.tolist() for micro in micros if micro.cu_trees is not None] == [[0, 4], [0, 2]]
    assert {micro.cu_trees for micro in micro_batches(batch, None, 150, is_packed=False)} == {None}


def test_models_that_look_back_only_so_far_share_prompts_of_rows_within_that() -> None:
    assert window_of(Qwen3Config()) == float("inf")
    assert window_of(MistralConfig(sliding_window=8)) == 8
    assert window_of(Olmo3Config(sliding_window=16)) == 16


@pytest.mark.parametrize(("response", "shares"), [(3, True), (4, False)])
def test_a_row_that_is_longer_than_the_window_is_in_no_tree(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, response: int, shares: bool
) -> None:
    monkeypatch.setattr(trees, "SHORTEST_PROMPT", 1)
    policy = make_policy("olmo3")  # with a window of 8
    policy.shares_prompts = True
    batch = batch_of([((5, 9, 3, 4, 6), [[7] * response, [3]])])
    assert [micro.cu_trees is not None for micro in policy.micro_batches(batch, None, 100)] == [shares]


def test_an_architecture_that_does_not_heed_the_mask_shares_nothing(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    policy.shares_prompts = True
    policy.check_trees()
    assert policy.shares_prompts
    forward = policy.trunk.forward
    monkeypatch.setattr(policy.trunk, "forward", lambda **inputs: forward(**{**inputs, "attention_mask": None}))
    policy.check_trees()
    assert not policy.shares_prompts
