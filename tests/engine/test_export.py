import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tempo_engine import checkpoint, export
from tempo_engine.adapters import Lora
from tempo_engine.blocks import BlockOptions
from tempo_engine.errors import UserError
from tempo_engine.export import Frozen
from tempo_engine.model import Critic, Policy
from tempo_engine.tokenizer import word_tokenizer
from tempo_engine.weights import create_causal_lm
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

MakePolicy = Callable[..., Policy]
IDS = torch.tensor([[3, 4, 5, 6]])
ARCHITECTURES = ("llama", "qwen3", "olmo3")
TOKENIZER = word_tokenizer(["a", "b"])


def small_policy(seed: int, **overrides: Any) -> Policy:
    """With sizes that two ranks cannot share evenly."""
    config = {
        "model_type": "llama", "vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 47, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2,
        "num_key_value_heads": 2, "head_dim": 16, **overrides,
    }  # fmt: skip
    return Policy(create_causal_lm(config, dtype=torch.float32, attention="sdpa", seed=seed))


def fitted_critic(policy: Policy, *, backbone: Any = "separate") -> Critic:
    """A critic that differs from its policy everywhere."""
    critic = Critic(policy, backbone=backbone, kind="linear")
    torch.manual_seed(0)
    critic.head.weight.data.normal_()
    critic.head.bias.data.fill_(-0.4)
    if backbone == "separate":
        for parameter in critic.trunk.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    return critic


def logits(policy: Policy) -> Tensor:
    return policy.model(input_ids=IDS).logits


def values(critic: Critic) -> Tensor:
    hidden = critic.trunk(input_ids=IDS).last_hidden_state.to(critic.head.weight.dtype)
    return hidden @ critic.head.weight + critic.head.bias


def exported_values(folder: Path) -> Tensor:
    """As a user reads them: with transformers and safetensors alone."""
    head = folder / "value_head.safetensors"
    if head.exists():
        trunk, tensors = AutoModel.from_pretrained(folder), load_file(head)
        return trunk(input_ids=IDS).last_hidden_state @ tensors["weight"] + tensors["bias"]
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    return model(input_ids=IDS).logits[..., 0]


def saved(folder: Path, policy: Policy, critic: Critic | None) -> Path:
    """A checkpoint as a run writes it, beside RUN/model."""
    owners = {"policy": policy.parameters(), "critic": critic.parameters() if critic else []}
    tensors = {f"{owner}/{name}": p.detach() for owner, named in owners.items() for name, p in named}
    export.save_skeleton(policy, TOKENIZER, folder / "model")
    return checkpoint.save(folder / "checkpoints", 1, tensors, {})


# --- From a live run ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_exported_policy_loads_in_transformers_with_the_same_logits(
    make_policy: MakePolicy, tmp_path: Path, model_type: str, tied: bool
) -> None:
    policy = make_policy(model_type, tie_word_embeddings=tied)
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded(input_ids=IDS).logits, logits(policy))
    assert ("lm_head.weight" in checkpoint.names(tmp_path / "policy")) is not tied


def test_an_export_has_the_generation_config_and_the_tokenizer(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model.generation_config.eos_token_id = [1, 7]
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert loaded.generation_config.eos_token_id == [1, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").get_vocab() == TOKENIZER.get_vocab()


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["separate", "shared"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_exported_critic_gives_the_same_values(
    make_policy: MakePolicy, tmp_path: Path, model_type: str, backbone: str
) -> None:
    critic = fitted_critic(make_policy(model_type), backbone=backbone)
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    assert torch.allclose(exported_values(tmp_path / "critic"), values(critic), atol=1e-6)
    assert (tmp_path / "critic" / "value_head.safetensors").exists() == (model_type == "olmo3")


def test_a_policy_that_computes_in_bfloat16_is_exported_in_it_but_its_critics_head_in_float32(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy(dtype="bfloat16")
    critic = fitted_critic(policy)
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    assert {t.dtype for t in load_file(tmp_path / "policy" / "model.safetensors").values()} == {torch.bfloat16}
    dtypes = {name: t.dtype for name, t in load_file(tmp_path / "critic" / "model.safetensors").items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"score.weight", "score.bias"}
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_large_model_is_cut_into_files(
    make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "20KB")
    policy = make_policy()
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    files = list((tmp_path / "policy").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 30_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded(input_ids=IDS).logits, logits(policy))


def test_an_export_replaces_an_earlier_one_in_one_piece(make_policy: MakePolicy, tmp_path: Path) -> None:
    for seed in (0, 1):
        export.export_policy(make_policy(seed=seed), TOKENIZER, tmp_path / "policy")
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded(input_ids=IDS).logits, logits(make_policy(seed=1)))


# --- A critic comes back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_exported_critic_comes_back_into_one_like_it(
    make_policy: MakePolicy, tmp_path: Path, model_type: str
) -> None:
    critic = fitted_critic(make_policy(model_type))
    other = Critic(make_policy(model_type, seed=4), backbone="separate", kind="linear")
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    export.restore_critic(other, tmp_path / "critic")
    theirs = dict(other.parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in critic.parameters())


def test_a_mixture_of_experts_is_exported_as_published_and_its_critic_comes_back(tmp_path: Path) -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    policy, other = small_policy(0, **experts), small_policy(1, **experts)
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in checkpoint.names(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded(input_ids=IDS).logits, logits(policy))
    critic, restored = fitted_critic(policy), Critic(other, backbone="separate", kind="linear")
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    assert torch.allclose(exported_values(tmp_path / "critic"), values(critic), atol=1e-6)
    export.restore_critic(restored, tmp_path / "critic")
    theirs = dict(restored.parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in critic.parameters())


def test_a_critic_on_the_policys_trunk_gets_its_head_back_and_leaves_the_policy_alone(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    critic, policy = fitted_critic(make_policy()), make_policy(seed=4)
    before = logits(policy)
    other = Critic(policy, backbone="shared", kind="linear")
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    export.restore_critic(other, tmp_path / "critic")
    assert torch.equal(other.head.weight, critic.head.weight)
    assert torch.equal(logits(policy), before)


@torch.no_grad()
def test_several_heads_are_exported_as_their_mean_by_the_run_and_from_its_checkpoint(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()
    critic = Critic(policy, backbone="separate", kind="linear", heads=3)
    torch.manual_seed(0)
    for parameter in critic.head.parameters():
        parameter.normal_()
    hidden = critic.trunk(input_ids=IDS).last_hidden_state
    mean = torch.stack(
        [hidden @ w + b for w, b in zip(critic.head.weight.view(3, -1), critic.head.bias, strict=True)]
    ).mean(0)
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    assert torch.allclose(exported_values(tmp_path / "critic"), mean, atol=1e-5)
    path = saved(tmp_path, policy, critic)
    export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(exported_values(tmp_path / "out" / "critic"), mean, atol=1e-5)


def test_a_policys_directory_is_no_critic(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    with pytest.raises(UserError, match="lacks a value head"):
        export.restore_critic(fitted_critic(policy), tmp_path / "policy")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 3}, "it has model.layers.2"),
        ({"num_hidden_layers": 1}, "it lacks model.layers.1"),
        ({"intermediate_size": 64}, r"holds model.layers.0.mlp.\w+.weight with shape"),
    ],
)
def test_a_critic_of_another_architecture_is_refused(
    make_policy: MakePolicy, tmp_path: Path, overrides: dict[str, int], message: str
) -> None:
    export.export_critic(fitted_critic(make_policy(**overrides)), TOKENIZER, tmp_path / "critic")
    with pytest.raises(UserError, match=message):
        export.restore_critic(fitted_critic(make_policy()), tmp_path / "critic")


# --- From a checkpoint -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["separate", "shared"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_checkpoint_is_exported_as_the_run_would_have(
    make_policy: MakePolicy, tmp_path: Path, model_type: str, backbone: str
) -> None:
    policy = make_policy(model_type)
    critic = fitted_critic(policy, backbone=backbone)
    path = saved(tmp_path, policy, critic)
    folders = export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32)
    assert [folder.name for folder in folders] == ["policy", "critic"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folders[0])(input_ids=IDS).logits, logits(policy))
    assert torch.allclose(exported_values(folders[1]), values(critic), atol=1e-6)
    assert AutoTokenizer.from_pretrained(folders[1]).get_vocab() == TOKENIZER.get_vocab()


def test_a_checkpoint_without_a_critic_gives_a_policy_only(make_policy: MakePolicy, tmp_path: Path) -> None:
    path = saved(tmp_path, make_policy(), None)
    export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32)
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"policy"}


def test_a_checkpoint_of_a_run_in_bfloat16_holds_float32_and_is_exported_as_by_the_run(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy(dtype="bfloat16")
    critic = fitted_critic(policy)
    path = saved(tmp_path, policy, critic)
    assert {t.dtype for file in path.glob("*.safetensors") for t in load_file(file).values()} == {torch.float32}
    export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.bfloat16)
    export.export_policy(policy, TOKENIZER, tmp_path / "live" / "policy")
    export.export_critic(critic, TOKENIZER, tmp_path / "live" / "critic")
    for name in ("policy", "critic"):
        ours, theirs = (load_file(tmp_path / where / name / "model.safetensors") for where in ("out", "live"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_a_checkpoint_that_lacks_weights_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    path = saved(tmp_path, make_policy(num_hidden_layers=1), None)
    export.save_skeleton(make_policy(), TOKENIZER, tmp_path / "model")
    with pytest.raises(UserError, match=r"lacks \d+ weights of the run's model, policy/model.layers.1"):
        export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32)


# --- Adapters ----------------------------------------------------------------------------------------------------------------

LORA = Lora(rank=2, alpha=6)


def adapted(make_policy: MakePolicy) -> tuple[Policy, Critic]:
    """A policy and a critic whose adapters do something."""
    policy = Policy(make_policy().model, blocks=BlockOptions(lora=LORA))
    critic = Critic(policy, backbone="separate", kind="linear")
    torch.manual_seed(1)
    for _, parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.data.normal_(std=0.3)
    return policy, critic


@torch.no_grad()
def test_adapters_are_merged(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, critic = adapted(make_policy)
    assert not torch.allclose(logits(policy), logits(make_policy()), atol=0.1)
    export.export_policy(policy, TOKENIZER, tmp_path / "policy")
    export.export_critic(critic, TOKENIZER, tmp_path / "critic")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.allclose(loaded(input_ids=IDS).logits, logits(policy), atol=1e-5)
    assert torch.allclose(exported_values(tmp_path / "critic"), values(critic), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("origin", ["directory", "seed"])
def test_a_checkpoint_of_adapters_is_merged_with_what_they_adapt(
    make_policy: MakePolicy, tmp_path: Path, origin: str
) -> None:
    policy, critic = adapted(make_policy)
    path = saved(tmp_path, policy, critic)
    assert not any("base_layer" in name for name in checkpoint.names(path))
    export.export_policy(make_policy(), TOKENIZER, tmp_path / "base")
    base = tmp_path / "base" if origin == "directory" else None
    frozen = Frozen(lora=LORA, policy=base, critic=None, seed=0)
    export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32, frozen=frozen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy")
    assert torch.allclose(loaded(input_ids=IDS).logits, logits(policy), atol=1e-5)
    assert torch.allclose(exported_values(tmp_path / "out" / "critic"), values(critic), atol=1e-5)


@torch.no_grad()
def test_adapters_of_a_critic_that_began_with_an_exported_one_are_merged_with_that(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    export.export_policy(make_policy(), TOKENIZER, tmp_path / "base")
    export.export_critic(fitted_critic(make_policy(seed=4)), TOKENIZER, tmp_path / "earlier")
    policy, critic = adapted(make_policy)
    export.restore_critic(critic, tmp_path / "earlier")
    path = saved(tmp_path, policy, critic)
    frozen = Frozen(lora=LORA, policy=tmp_path / "base", critic=tmp_path / "earlier", seed=0)
    export.export_checkpoint(path, tmp_path / "model", tmp_path / "out", dtype=torch.float32, frozen=frozen)
    assert torch.allclose(exported_values(tmp_path / "out" / "critic"), values(critic), atol=1e-5)


# --- On two ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks exported into. See ranks/export.py."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed in (0, 1):
        export.export_policy(small_policy(seed), TOKENIZER, folder / f"seed{seed}")
    script = Path(__file__).parent / "ranks" / "export.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder


@torch.no_grad()
@pytest.mark.parametrize("source", ["live", "checkpoint"])
def test_models_exported_from_two_ranks_are_whole(two_ranks: Path, source: str) -> None:
    """The policy is that of seed 0; the critic has the trunk of seed 1 and the weights 0, 1/32, 2/32, ... and bias -0.4."""
    out = two_ranks / source
    if source == "checkpoint":
        path = checkpoint.newest(two_ranks / "checkpoints", pytest.fail)
        export.export_checkpoint(path, two_ranks / "model", out, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(out / "policy")
    assert torch.equal(loaded(input_ids=IDS).logits, logits(small_policy(0)))
    critic = Critic(small_policy(1), backbone="separate", kind="linear")
    critic.head.weight.copy_(torch.arange(32) / 32)
    critic.head.bias.fill_(-0.4)
    assert torch.allclose(exported_values(out / "critic"), values(critic), atol=1e-6)


def test_an_exported_critic_comes_back_into_shards(two_ranks: Path) -> None:
    assert [json.loads((two_ranks / f"result-{rank}.json").read_text()) for rank in (0, 1)] == [[], []]
