"""A model that is made without memory and then filled must be the model that transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tempo_engine.errors import UserError
from tempo_engine.model import Critic, Policy, reads_packed, trunk_of
from tempo_engine.weights import blank_causal_lm, create_causal_lm, is_blank, load_causal_lm, named_weights

CONFIG: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "olmo3", "tie_word_embeddings": False, "sliding_window": 8},
    "buffers in the file": {"model_type": "apertus"},
    "experts, cut otherwise in files": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    create_causal_lm(CONFIG | MODELS[request.param], dtype=torch.float32, attention="sdpa", seed=3).save_pretrained(
        tmp_path
    )
    return tmp_path


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.arange(2, 12)[None]).logits


def test_a_filled_model_has_the_logits_of_a_loaded_one(folder: Path) -> None:
    loaded = Policy(load_causal_lm(folder, dtype=torch.float32, attention="sdpa"))
    blank = blank_causal_lm(folder, dtype=torch.float32, attention="sdpa")
    assert is_blank(blank)
    filled = Policy(blank, weights=folder)
    assert not is_blank(filled.model)
    assert torch.equal(logits(filled), logits(loaded))
    assert named_weights(filled.model).keys() == named_weights(loaded.model).keys()


def test_a_critic_and_a_reference_begin_as_exact_copies(folder: Path) -> None:
    policy = Policy(load_causal_lm(folder, dtype=torch.float32, attention="sdpa"))
    critic, reference = Critic(policy, backbone="separate", kind="linear"), policy.frozen_copy()
    assert torch.equal(logits(reference), logits(policy))
    trunk = dict(critic.trunk.named_buffers()) | dict(critic.trunk.named_parameters())
    ours = dict(policy.trunk.named_buffers()) | dict(policy.trunk.named_parameters())
    assert trunk.keys() == ours.keys()
    assert all(torch.equal(trunk[name], ours[name]) for name in ours)
    assert not any(module.training for module in (*critic.trunk.modules(), *reference.model.modules()))


def test_a_directory_that_lacks_weights_fills_no_model(tmp_path: Path) -> None:
    create_causal_lm(CONFIG | MODELS["tied"], dtype=torch.float32, attention="sdpa", seed=0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 9 weights of a LlamaForCausalLM"):
        Policy(blank_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa"), weights=tmp_path)


@pytest.mark.parametrize(
    ("model", "packed"),
    [
        ({"model_type": "qwen3"}, True),
        ({"model_type": "olmo3"}, True),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, False),
    ],
)
def test_only_models_made_of_attention_read_sequences_end_to_end(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], packed: bool
) -> None:
    created = create_causal_lm(CONFIG | model, dtype=torch.float32, attention="sdpa", seed=0)
    trunk = trunk_of(created)
    assert not reads_packed(trunk)
    monkeypatch.setattr(trunk.config, "_attn_implementation", "flash_attention_2")
    assert reads_packed(trunk) == packed
