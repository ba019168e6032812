from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tempo_engine.errors import UserError
from tempo_engine.model import Critic, Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.weights import create_causal_lm, load_causal_lm
from tempo_kernels import value_head

MakePolicy = Callable[..., Policy]
MakeRollouts = Callable[..., list[Rollout]]
LENGTHS = [(3, 4), (1, 1), (5, 9), (2, 6)]


def critic_of(policy: Policy, backbone: Any = "separate") -> Critic:
    critic = Critic(policy, backbone=backbone, kind="linear")
    torch.manual_seed(3)
    critic.head.weight.data.normal_()
    critic.head.bias.data.fill_(0.3)
    return critic


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3", "gemma2"])
@torch.no_grad()
def test_log_probs_are_those_of_the_models_own_forward(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, model_type: str
) -> None:
    policy, rollouts = make_policy(model_type), make_rollouts(LENGTHS)
    stats = policy.token_stats(pack(rollouts))
    expected = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.token_ids, *r.response_ids]])
        logprobs = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        first = len(r.prompt.token_ids) - 1
        expected += [float(logprobs[first + t, token]) for t, token in enumerate(r.response_ids)]
    assert torch.allclose(stats.logprob_T.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_the_temperature_divides_the_logits(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    policy, batch = make_policy(), pack(make_rollouts([(3, 1)]))
    policy.temperature = 0.5
    logits = policy.model(input_ids=batch.input_ids_N[None, :3]).logits[0, -1]
    expected = (logits / 0.5).log_softmax(-1)[batch.target_T[0]]
    assert torch.allclose(policy.token_stats(batch).logprob_T[0], expected, atol=1e-5)


def test_values_and_log_probs_do_not_depend_on_packing(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    policy, batch = make_policy(), pack(make_rollouts(LENGTHS))
    critic = critic_of(policy)
    together = critic.values(batch, max_tokens=10_000)
    alone = critic.values(batch, max_tokens=1)
    assert torch.allclose(together, alone, atol=1e-6)
    single = [policy.token_stats(batch.select(torch.tensor([row]))).logprob_T for row in range(len(batch))]
    assert torch.allclose(policy.token_stats(batch).logprob_T, torch.cat(single), atol=1e-5)


@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_value_depends_only_on_the_tokens_before_it(make_policy: MakePolicy, position: int) -> None:
    """I3: changing token t leaves V(x, y_<1..t) as they were and may change the later ones."""
    critic = critic_of(make_policy())
    response = [5, 6, 7, 8]
    changed = response.copy()
    changed[position] = 20
    prompt = Prompt("p", "", (3, 4))
    values = [critic.values(pack([Rollout(prompt, ids, [0.0] * 4, (), False, "")]), 100) for ids in (response, changed)]
    assert len(values[0]) == len(response) + 1
    assert torch.equal(values[0][: position + 1], values[1][: position + 1])
    assert not torch.equal(values[0][position + 1 :], values[1][position + 1 :])


def test_values_are_float32_even_for_a_bfloat16_model(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    policy = make_policy(dtype="bfloat16")
    critic = critic_of(policy)
    assert critic.head.weight.dtype == torch.float32
    assert critic.values(pack(make_rollouts(LENGTHS)), 10_000).dtype == torch.float32


def test_a_separate_critic_shares_no_memory_with_the_policy(make_policy: MakePolicy) -> None:
    policy = make_policy()
    critic = critic_of(policy)
    policy_memory = {p.data_ptr() for p in policy.model.parameters()}
    assert not policy_memory & {p.data_ptr() for _, p in critic.parameters()}


def test_an_ensembles_values_are_the_mean_of_its_heads_less_what_they_disagree(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    """Heads without weights and with biases 0, 1 and 5: mean 2, standard deviation sqrt 7."""
    policy, batch = make_policy(), pack(make_rollouts(LENGTHS))
    critic = Critic(policy, backbone="separate", kind="linear", heads=3)
    assert critic.head.weight[:32].count_nonzero() == 0, "the first begins as a single one would"
    assert critic.values(batch, 20, pessimism=1.0).std() > 0, "the others differ"
    critic.head.weight.data.zero_()
    critic.head.bias.data.copy_(torch.tensor([0.0, 1.0, 5.0]))
    assert torch.allclose(critic.values(batch, 20), torch.tensor(2.0))
    assert torch.allclose(critic.values(batch, 20, pessimism=0.5), torch.tensor(2.0 - 0.5 * 7**0.5))
    again = critic.frozen_copy()
    assert torch.equal(again.values(batch, 20, pessimism=0.5), critic.values(batch, 20, pessimism=0.5))


def test_a_shared_critic_trains_its_head_and_never_the_policys_trunk(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    policy = make_policy()
    critic = critic_of(policy, "shared")
    assert [name for name, _ in critic.parameters()] == ["head.weight", "head.bias"]
    (value_TS,) = critic.read(pack(make_rollouts(LENGTHS)), lambda *parts: value_head(*parts, head="linear"))
    value_TS.sum().backward()
    assert critic.head.weight.grad is not None
    assert all(p.grad is None for p in policy.model.parameters())


def test_a_model_directory_without_config_or_weights_is_refused(tmp_path: Path, make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")
    make_policy().model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")


def test_damaged_weights_are_refused_in_one_sentence(tmp_path: Path, make_policy: MakePolicy) -> None:
    make_policy().model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot load"):
        load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")


def test_a_directory_that_lacks_weights_is_not_filled_with_random_ones(tmp_path: Path, make_policy: MakePolicy) -> None:
    make_policy().model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks"):
        load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.create"):
        create_causal_lm({"model_type": "lama"}, dtype=torch.float32, attention="sdpa", seed=0)


def test_an_architecture_that_rescales_its_logits_unseen_is_refused() -> None:
    config = {"model_type": "cohere", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "logit_scale": 0.1}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0, "initializer_range": 0.5}
    model = create_causal_lm(config, dtype=torch.float32, attention="sdpa", seed=0)
    with pytest.raises(UserError, match="changes its logits"):
        Policy(model)


def test_the_seed_decides_the_fresh_weights(make_policy: MakePolicy) -> None:
    first, again, other = make_policy(seed=1), make_policy(seed=1), make_policy(seed=2)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
