"""Which token and which layer differ first: numbers a person can check, and blocks that are disturbed on purpose."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tempo_engine.blocks import BlockOptions
from tempo_engine.divergence import (
    HEAD,
    TOLERANCES,
    Layer,
    Outputs,
    cached_layers,
    compare_layers,
    first_diverging_layer,
    first_diverging_token,
    same_wave,
    trainer_layers,
)
from tempo_engine.model import Policy
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Rollout
from tempo_engine.sglang.dump import _forced, read_dump
from torch import nn

FLOAT32 = TOLERANCES[torch.float32]
MakePolicy = Callable[..., Policy]
MakeRollouts = Callable[..., list[Rollout]]


def two_responses() -> PackedBatch:
    """Responses (11, 12, 13) and (21, 22), every log-prob of the sampler -1."""
    cu_seqlens = torch.tensor([0, 4, 7])
    ids, cu_responses = torch.tensor([1, 11, 12, 13, 1, 21, 22]), torch.tensor([0, 3, 5])
    return PackedBatch(ids, cu_seqlens, cu_responses, torch.full((5,), -1.0), prompt_S=torch.tensor([0, 0]))


def test_the_first_token_is_the_one_earliest_in_its_response() -> None:
    trainer = torch.tensor([-1.0, -1.0, -5.0, -1.0, -1.01])
    token = first_diverging_token(two_responses(), trainer, FLOAT32)
    assert (token.row, token.position, token.id) == (1, 1, 22)
    assert token.sampler_logprob == -1.0
    assert token.trainer_logprob == pytest.approx(-1.01)


def test_among_tokens_within_the_tolerance_the_worst_is_named() -> None:
    trainer = torch.tensor([-1.0, -1.1, -1.3, -1.0, -1.2])
    token = first_diverging_token(two_responses(), trainer, TOLERANCES[torch.bfloat16])
    assert (token.row, token.position, token.id) == (0, 2, 13)


def test_a_log_prob_that_is_not_a_number_diverges() -> None:
    token = first_diverging_token(two_responses(), torch.tensor([-1.0, -1.0, -1.0, math.nan, -1.0]), FLOAT32)
    assert (token.row, token.position) == (1, 0)


def test_a_layer_s_difference_is_relative_and_of_the_worst_position(make_policy: MakePolicy) -> None:
    """(3, 4) has length 5, (3, 4.5) is 0.5 away: 0.1."""
    name = "model.layers.1.mlp.down_proj"
    ours, theirs = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.5]])
    (layer,) = compare_layers(make_policy(), {name: ours, "only ours": ours}, {name: theirs})
    assert (layer.name, layer.block, layer.position) == (name, 1, 1)
    assert layer.difference == pytest.approx(0.1)
    assert str(layer) == f"{name} (block 1), relative difference 0.1 at position 1"


def both(policy: Policy, rollouts: list[Rollout], row: int, num_tokens: int) -> tuple[Outputs, Outputs]:
    """The trainer's and the cached path's outputs of a row, which shares its batch with all others."""
    num_positions = len(rollouts[row].prompt.token_ids) + num_tokens
    trainer = trainer_layers(policy, pack(rollouts), row, num_positions, max_tokens=1000)
    return trainer, cached_layers(policy, rollouts, 1, row, num_tokens)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3", "gemma2"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_undisturbed_every_layer_agrees_whatever_the_padding(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, model_type: str, row: int
) -> None:
    policy = make_policy(model_type)
    trainer, sampler = both(policy, make_rollouts([(3, 9), (7, 6), (5, 2)]), row, num_tokens=1)
    layers = compare_layers(policy, trainer, sampler)
    assert layers[-1].name == HEAD
    assert {layer.block for layer in layers} == {None, 0, 1}
    assert all(layer.difference < 1e-5 for layer in layers)
    assert first_diverging_layer(layers, FLOAT32) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_a_block_disturbed_while_decoding_is_the_first_layer(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, dtype: str, checkpointing: Any
) -> None:
    policy = make_policy(dtype=dtype, blocks=BlockOptions(activation_checkpointing=checkpointing), num_hidden_layers=3)

    def disturb(module: nn.Module, args: Any, kwargs: Any) -> Any:
        is_decoding = kwargs.get("past_key_values") is not None and args[0].shape[1] == 1
        return ((args[0] * 1.5 + 1, *args[1:]) if is_decoding else args), kwargs

    policy.model.get_submodule("model.layers.1").register_forward_pre_hook(disturb, with_kwargs=True)
    trainer, sampler = both(policy, make_rollouts([(3, 9), (7, 6), (5, 2)]), 0, num_tokens=4)
    layer = first_diverging_layer(compare_layers(policy, trainer, sampler), TOLERANCES[getattr(torch, dtype)])
    assert layer is not None
    assert layer.name.startswith("model.layers.1.")
    assert layer.block == 1
    assert layer.position >= 3, "the prompt was not disturbed"


def test_rows_that_decode_together_come_from_prompts_of_neighbouring_length(make_rollouts: MakeRollouts) -> None:
    """Four groups of two with prompts of 3, 9, 5 and 7 tokens, four sequences at a time: 9 and 7 begin, 5 and 3 follow."""
    rollouts = make_rollouts([(3, 1), (3, 1), (9, 1), (9, 1), (5, 1), (5, 1), (7, 1), (7, 1)])
    wave, place = same_wave(rollouts, 2, 5, max_running=4)
    assert wave == [rollouts[4], rollouts[5], rollouts[0], rollouts[1]]
    assert place == 1
    assert same_wave(rollouts, 2, 6, max_running=1) == ([rollouts[6], rollouts[7]], 0)


# --- Dumps of servers ---------------------------------------------------------------------------------------------------------


def dumped(folder: Path, number: int, ids: list[int], first: int, **tensors: Any) -> None:
    batch = {"input_ids": torch.tensor(ids), "positions": torch.arange(first, first + len(ids))}
    about = {f"model.forward_batch_info.{name}": x for name, x in batch.items()}
    rank = folder / "TP0_PP0_Rank0_pid7"
    rank.mkdir(exist_ok=True)
    torch.save(about | {name.replace("__", "."): x for name, x in tensors.items()}, rank / f"Pass{number:05d}.pt")


def test_passes_of_a_sequence_are_joined_and_those_of_others_left_out(tmp_path: Path) -> None:
    dumped(tmp_path, 0, [0], 0, model__norm=torch.full((1, 2), 9.0))
    dumped(tmp_path, 1, [5, 6, 7], 0, model__norm=torch.ones(3, 2), logits_processor=torch.ones(1, 4))
    dumped(tmp_path, 2, [0], 0, model__norm=torch.full((1, 2), 9.0))
    dumped(tmp_path, 3, [8], 3, model__norm=torch.full((1, 2), 2.0), logits_processor=torch.ones(1, 4))
    found = read_dump(tmp_path, [5, 6, 7, 8])
    assert found["model.norm"].tolist() == [[1, 1], [1, 1], [1, 1], [2, 2]]


def test_the_residual_at_a_block_s_norm_is_the_block_before(tmp_path: Path) -> None:
    normed, residual = torch.ones(2, 2), torch.full((2, 2), 3.0)
    dumped(tmp_path, 0, [5, 6], 0, **{"model.layers.1.input_layernorm": [normed, residual]})
    found = read_dump(tmp_path, [5, 6])
    assert torch.equal(found["model.layers.1.input_layernorm"], normed)
    assert torch.equal(found["model.layers.0"], residual)


def test_a_sequence_that_was_not_dumped_is_an_error(tmp_path: Path) -> None:
    dumped(tmp_path, 0, [5, 6], 0)
    with pytest.raises(RuntimeError, match="no pass with these 3 tokens"):
        read_dump(tmp_path, [5, 6, 7])


def test_a_dump_with_anything_but_tensors_in_it_is_not_run(tmp_path: Path) -> None:
    dumped(tmp_path, 0, [5], 0, evil=Layer("", 0, 0.0, 0))
    with pytest.raises(RuntimeError, match=r"Pass00000\.pt holds more than tensors"):
        read_dump(tmp_path, [5])


def test_a_server_must_choose_the_last_token_of_a_response_itself() -> None:
    assert _forced([5, 6], [])["input_ids"] == [5, 6]
    asked = _forced([5, 6], [7, 8])
    assert asked["input_ids"] == [5, 6, 7]
    assert asked["sampling_params"]["logit_bias"] == {"8": 1e4}
    assert asked["sampling_params"]["max_new_tokens"] == 2


def test_no_layer_of_ours_is_compared_with_one_of_another_shape(make_policy: MakePolicy) -> None:
    assert compare_layers(make_policy(), {"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}) == []
