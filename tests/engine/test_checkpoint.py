import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tempo_engine import checkpoint
from tempo_engine.errors import UserError
from tempo_engine.model import Critic, Policy, hidden_states
from tempo_engine.packing import pack
from tempo_engine.rollout import Rollout
from tempo_engine.tokenizer import word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

MakePolicy = Callable[..., Policy]
MakeRollouts = Callable[..., list[Rollout]]


def write(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, {"w": torch.full((3,), float(step))}, {"iteration": step}, keep=2)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "a/w": torch.randn(5, 3),
        "b/step": torch.tensor(7.0),
        "c": torch.arange(4),
        "d": torch.randn(2).bfloat16(),
    }
    checkpoint.save(tmp_path, 3, tensors, {"iteration": 3, "names": ["x"]})
    loaded, state, path = checkpoint.load_newest(tmp_path)
    assert path.name == "step-00000003"
    assert state == {"iteration": 3, "names": ["x"]}
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest"])
def test_a_damaged_newest_checkpoint_is_skipped_aloud(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    weights = newest / "tensors.safetensors"
    data = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(data[:-1])
    elif damage == "flip":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    said: list[str] = []
    tensors, state, _ = checkpoint.load_newest(tmp_path, said.append)
    assert state["iteration"] == 1
    assert tensors["w"].tolist() == [1.0, 1.0, 1.0]
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_without_a_usable_checkpoint_the_user_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_a_write_that_was_cut_off_leaves_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".writing-99").mkdir(parents=True)
    (tmp_path / ".writing-99" / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    write(tmp_path, 1)
    assert not list(tmp_path.glob(".writing-*"))


def test_the_manifest_lists_sizes_and_hashes(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest) == {"tensors.safetensors", "state.json"}
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in manifest.values())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3"])
def test_the_exported_policy_loads_in_transformers_with_the_same_logits(
    make_policy: MakePolicy, tmp_path: Path, model_type: str
) -> None:
    policy = make_policy(model_type)
    checkpoint.export_policy(policy, word_tokenizer(["a", "b"]), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def fitted_critic(policy: Policy) -> Critic:
    critic = Critic(policy, backbone="separate", head="linear")
    torch.manual_seed(0)
    critic.weight.data.normal_()
    critic.bias.data.fill_(-0.4)
    for parameter in critic.trunk.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    return critic


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3"])
def test_the_exported_critic_gives_the_same_values(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, tmp_path: Path, model_type: str
) -> None:
    critic, batch = fitted_critic(make_policy(model_type)), pack(make_rollouts([(3, 4), (2, 6)]))
    checkpoint.export_critic(critic, word_tokenizer(["a", "b"]), tmp_path)
    trunk, weight, bias = checkpoint.load_critic(tmp_path)
    values = hidden_states(trunk, batch, batch.value_index_TS) @ weight + bias
    assert torch.allclose(values, critic.values(batch, 1000), atol=1e-6)
    assert (tmp_path / "value_head.safetensors").exists() == (model_type == "olmo3")


@torch.no_grad()
def test_a_llama_critic_is_a_token_classification_model_with_one_label(make_policy: MakePolicy, tmp_path: Path) -> None:
    critic = fitted_critic(make_policy())
    checkpoint.export_critic(critic, word_tokenizer(["a", "b"]), tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1
    ids = torch.tensor([[3, 4, 5]])
    expected = critic.trunk(input_ids=ids).last_hidden_state @ critic.weight + critic.bias
    assert torch.allclose(model(input_ids=ids).logits[..., 0], expected, atol=1e-6)


def test_a_policys_directory_is_no_critic(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    checkpoint.export_policy(policy, word_tokenizer(["a", "b"]), tmp_path / "policy")
    with pytest.raises(UserError, match="lacks"):
        checkpoint.restore_critic(fitted_critic(policy), tmp_path / "policy")


def test_an_exported_critic_comes_back_into_one_like_it(make_policy: MakePolicy, tmp_path: Path) -> None:
    critic, other = fitted_critic(make_policy()), Critic(make_policy(seed=4), backbone="separate", head="linear")
    checkpoint.export_critic(critic, word_tokenizer(["a", "b"]), tmp_path / "critic")
    checkpoint.restore_critic(other, tmp_path / "critic")
    assert torch.equal(critic.weight, other.weight)
    assert all(torch.equal(a, b) for a, b in zip(critic.trunk.parameters(), other.trunk.parameters(), strict=True))


def test_an_export_replaces_an_earlier_one_in_one_piece(make_policy: MakePolicy, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    for seed in (0, 1):
        checkpoint.export_policy(make_policy(seed=seed), word_tokenizer(["a", "b"]), folder)
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, make_policy(seed=1).model(input_ids=ids).logits)


def test_a_skipped_damaged_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (1, 12):
        write(tmp_path, step)
    checkpoint.save(tmp_path, 11, {"w": torch.ones(1)}, {}, keep=1)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000011", "step-00000012"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint.save(tmp_path, 3, {"w": torch.ones(1)}, {"again": True})
    _, state, _ = checkpoint.load_newest(tmp_path)
    assert state == {"again": True}
    assert not list(tmp_path.glob(".writing-*"))
