import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tempo_engine.errors import NonFinite
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.updates import (
    CriticUpdate,
    PolicyUpdate,
    fit_critic,
    imitate,
    importance_denominator,
    improve_policy,
)
from tempo_kernels import advantage, whiten

MakePolicy = Callable[..., Policy]
MakeRollouts = Callable[..., list[Rollout]]
LENGTHS = [(3, 4), (1, 1), (5, 9), (2, 6), (4, 2)]


def policy_update(**settings: Any) -> PolicyUpdate:
    defaults = {
        "loss": "ppo",
        "epochs": 1,
        "minibatches": 1,
        "micro_batch_tokens": 10_000,
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    return PolicyUpdate(**{**defaults, **settings})


def critic_update(**settings: Any) -> CriticUpdate:
    return CriticUpdate(**{"epochs": 1, "minibatches": 1, "micro_batch_tokens": 10_000, **settings})


def step_of_policy(policy: Policy, batch: PackedBatch, how: PolicyUpdate, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights after an update with plain gradient descent's analogue: AdamW with a known learning rate."""
    advantage_T = torch.linspace(-1, 1, int(batch.cu_responses_S1[-1]))
    old_logprob_T = policy.token_logprobs(batch, 10_000)
    optimizer = Optimizer(policy.parameters(), lr=1e-3)
    improve_policy(policy, optimizer, batch, advantage_T, how, old_logprob_T=old_logprob_T, seed=seed)
    return {name: p.detach().clone() for name, p in policy.parameters()}


def gradients(parameters: list[tuple[str, torch.nn.Parameter]], update: Callable[[Optimizer], object]) -> torch.Tensor:
    """The gradient an update hands to the optimiser, flattened; the step itself is not taken."""
    optimizer = Optimizer(parameters, lr=0.0)
    caught: list[torch.Tensor] = []

    def catch() -> float:
        caught.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for _, p in parameters])
        )
        optimizer.adamw.zero_grad()
        return 0.0

    optimizer.step = catch  # pyright: ignore[reportAttributeAccessIssue]
    update(optimizer)
    assert len(caught) == 1
    return caught[0].clone()


@pytest.mark.parametrize("loss", ["ppo", "gspo", "reinforce"])
@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_policy_gradients_do_not_depend_on_micro_batches(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, loss: str, aggregate: str
) -> None:
    batch = pack(make_rollouts(LENGTHS))
    advantage_T = torch.linspace(-1, 1, int(batch.cu_responses_S1[-1]))
    found = []
    for tokens in (10_000, 20, 1):
        policy = make_policy()
        how = policy_update(loss=loss, aggregate=aggregate, micro_batch_tokens=tokens, entropy_coef=0.01)
        found.append(
            gradients(
                policy.parameters(),
                lambda o, p=policy, h=how: improve_policy(
                    p, o, batch, advantage_T, h, old_logprob_T=batch.sampler_logprob_T, seed=0
                ),
            )
        )
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
def test_critic_gradients_do_not_depend_on_micro_batches(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, heads: int
) -> None:
    """I4: the release divides by the rows of a micro-batch; here only the minibatch's counts matter."""
    batch, return_S = pack(make_rollouts(LENGTHS)), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    found = []
    for tokens in (10_000, 20, 1):
        critic = Critic(make_policy(), backbone="separate", kind="linear", heads=heads)
        how = critic_update(micro_batch_tokens=tokens)
        found.append(
            gradients(critic.parameters(), lambda o, c=critic, h=how: fit_critic(c, o, batch, return_S, h, seed=0))
        )
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-4, atol=1e-6)


def test_the_critics_loss_is_the_mean_over_sequences_of_their_means(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    """With a zero head every value is 0, so the loss is half the mean of the squared outcomes, whatever the lengths."""
    batch = pack(make_rollouts(LENGTHS))
    critic = Critic(make_policy(), backbone="separate", kind="linear")
    optimizer = Optimizer(critic.parameters(), lr=0.0)
    metrics = fit_critic(critic, optimizer, batch, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), critic_update(), seed=0)
    assert metrics["critic/vf_loss"] == pytest.approx(0.5 * 2 / 5)


def test_heads_fitted_alike_come_to_agree_on_what_they_were_fitted_to(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    batch, other = pack(make_rollouts(LENGTHS)), pack(make_rollouts(LENGTHS, seed=1))
    critic = Critic(make_policy(), backbone="separate", kind="linear", heads=4)
    return_S = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])

    def disagreement(batch: PackedBatch) -> float:
        return float((critic.values(batch, 100) - critic.values(batch, 100, pessimism=1.0)).mean())

    before = disagreement(batch)
    metrics = fit_critic(
        critic, Optimizer(critic.parameters(), lr=1e-2), batch, return_S, critic_update(epochs=60), seed=0
    )
    assert before > 0.5
    assert disagreement(batch) < 0.3 * before
    assert disagreement(batch) < 0.5 * disagreement(other)
    assert metrics["critic/return_mean"] == pytest.approx(0.6)


@pytest.mark.parametrize(("head", "loss"), [("linear", "mse"), ("sigmoid", "mse"), ("sigmoid", "bce")])
def test_a_fitted_critic_tells_right_from_wrong(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, head: Any, loss: str
) -> None:
    batch, return_S = pack(make_rollouts(LENGTHS)), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    critic = Critic(make_policy(), backbone="separate", kind=head)
    optimizer = Optimizer(critic.parameters(), lr=1e-2)
    fit_critic(critic, optimizer, batch, return_S, critic_update(epochs=60, loss=loss), seed=0)
    value_TS = critic.values(batch, 10_000)
    terminal_S = value_TS[batch.cu_values_S1[1:] - 1]
    assert terminal_S[return_S == 1].min() > terminal_S[return_S == 0].max()


def test_rewarded_tokens_become_likelier_and_punished_ones_rarer(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    policy, batch = make_policy(), pack(make_rollouts([(3, 4), (2, 4)]))
    advantage_T = torch.tensor([1.0] * 4 + [-1.0] * 4)
    before = policy.token_logprobs(batch, 10_000)
    optimizer = Optimizer(policy.parameters(), lr=1e-3)
    metrics = improve_policy(policy, optimizer, batch, advantage_T, policy_update(), old_logprob_T=before, seed=0)
    change = policy.token_logprobs(batch, 10_000) - before
    assert change[:4].sum() > 0 > change[4:].sum()
    assert policy.version == 1
    assert metrics["actor/pg_clipfrac"] == 0
    assert metrics["actor/grad_norm"] > 0


def test_a_fit_reports_explained_variance_and_calibration(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    """Every value is 0 and three of five outcomes are 1: values explain nothing, and are off by 0.6 on average."""
    batch = pack(make_rollouts(LENGTHS))
    critic = Critic(make_policy(), backbone="separate", kind="linear")
    optimizer = Optimizer(critic.parameters(), lr=0.0)
    how = critic_update(micro_batch_tokens=20, epochs=2)
    metrics = fit_critic(critic, optimizer, batch, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), how, seed=0)
    assert metrics["critic/vf_explained_var"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["critic/calibration_error"] == pytest.approx(0.6)
    assert "critic/error_square" not in metrics


def test_an_on_policy_update_uses_every_token_fully(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    policy, batch = make_policy(), pack(make_rollouts([(3, 4), (2, 4)]))
    before = policy.token_logprobs(batch, 10_000)
    optimizer = Optimizer(policy.parameters(), lr=1e-3)
    metrics = improve_policy(policy, optimizer, batch, torch.ones(8), policy_update(), old_logprob_T=before, seed=0)
    assert metrics["actor/ess"] == pytest.approx(1.0)
    assert metrics["actor/entropy"] > 0


def trained(policy: Policy, rollouts: list[Rollout], how: dict[str, Any]) -> list[torch.Tensor]:
    """All weights of policy and critic after two E-steps and two M-steps."""
    batch, return_S = pack(rollouts), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    critic = Critic(policy, backbone="separate", kind="linear")
    policy_optimizer, critic_optimizer = (Optimizer(x.parameters(), lr=1e-3) for x in (policy, critic))
    for seed in range(2):
        fit_critic(
            critic, critic_optimizer, batch, return_S, critic_update(clip=how["value_clip"], epochs=2), seed=seed
        )
        value_TS = critic.values(batch, 30)
        advantage_T = whiten(advantage(return_S, value_TS, batch.cu_responses_S1), torch.zeros(22, dtype=torch.int64))
        old_logprob_T = policy.token_logprobs(batch, 30)
        update = policy_update(loss=how["loss"], minibatches=2, micro_batch_tokens=30, entropy_coef=0.01)
        improve_policy(policy, policy_optimizer, batch, advantage_T, update, old_logprob_T=old_logprob_T, seed=seed)
    return [p.detach().clone() for _, p in [*policy.parameters(), *critic.parameters()]]


@pytest.mark.parametrize(
    "how",
    [
        {"loss": "gspo", "value_clip": "sequence_mean"},
        {"loss": "ppo", "value_clip": "token"},
        {"loss": "reinforce", "value_clip": "none"},
    ],
    ids=lambda how: how["loss"],
)
def test_training_through_triton_ends_at_the_same_weights(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, found, launched = make_rollouts(LENGTHS), {}, []
    GridExecutor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    execute = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: (launched.append(self.fn), execute(self, *a, **k))
    )
    for kernels in ("torch", "triton"):
        assert not launched
        monkeypatch.setenv("TEMPO_KERNELS", kernels)
        found[kernels] = trained(make_policy(), rollouts, how)
    names = {f"{kernel.__module__}.{kernel.__name__}" for kernel in launched}
    for op in ("linear_logprob", "value_head", "policy_loss", "advantage"):
        assert any(f"tempo_kernels.{op}" in name for name in names), f"{op} did not run in Triton"
    start = [p.detach() for _, p in make_policy().parameters()]
    assert max(float((x - y).abs().max()) for x, y in zip(start, found["torch"], strict=False)) > 1e-3
    for one, other in zip(found["torch"], found["triton"], strict=True):
        # a step of AdamW is about 1e-3 whatever the gradient's size, so rounding shows only where a gradient is nearly zero
        assert torch.allclose(one, other, atol=2e-5)


def test_the_same_update_gives_the_same_bits(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    batch, how = pack(make_rollouts(LENGTHS)), policy_update(minibatches=2, epochs=2, micro_batch_tokens=20)
    first = step_of_policy(make_policy(), batch, how)
    again = step_of_policy(make_policy(), batch, how)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_imitation_learns_its_traces(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    policy, batch = make_policy(), pack(make_rollouts([(3, 4), (2, 5)]))
    optimizer = Optimizer(policy.parameters(), lr=1e-2)
    losses = [imitate(policy, optimizer, batch, micro_batch_tokens=8)["sft/loss"] for _ in range(40)]
    assert losses[-1] < 0.1 < losses[0]


def test_a_non_finite_advantage_skips_the_step_and_keeps_the_weights(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    policy, batch = make_policy(), pack(make_rollouts([(3, 4)]))
    before = [p.detach().clone() for _, p in policy.parameters()]
    optimizer = Optimizer(policy.parameters(), lr=1e-2)
    advantage_T = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    improve_policy(
        policy, optimizer, batch, advantage_T, policy_update(), old_logprob_T=batch.sampler_logprob_T, seed=0
    )
    assert optimizer.num_skipped == 1
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.parameters(), strict=True))


def test_too_many_non_finite_steps_in_a_row_stop_and_hand_over_their_batch(
    make_policy: MakePolicy, make_rollouts: MakeRollouts
) -> None:
    policy, batch = make_policy(), pack(make_rollouts(LENGTHS))
    before = {name: p.detach().clone() for name, p in policy.parameters()}
    advantage_T = torch.full((int(batch.cu_responses_S1[-1]),), torch.nan)
    optimizer = Optimizer(policy.parameters(), lr=1e-3, max_skipped=2)
    how, old_T = policy_update(epochs=3), policy.token_logprobs(batch, 10_000)
    with pytest.raises(NonFinite, match="gradient of the policy was not finite in 2 steps in a row") as stop:
        improve_policy(policy, optimizer, batch, advantage_T, how, old_logprob_T=old_T, seed=0)
    assert stop.value.code == 3
    assert sorted(stop.value.batch["input_ids_N"].tolist()) == sorted(batch.input_ids_N.tolist())
    assert stop.value.batch["advantage_T"].isnan().all()
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters())


def test_importance_ratios_of_tokens_and_of_sequences_by_hand() -> None:
    """Two responses, of two tokens and of one: old log-probs minus the sampler's are 0.5, -0.2 and 0.1."""
    rollouts = [
        Rollout(Prompt("a", "", (3,)), [5, 6], [-1.0, -2.0], (), False, ""),
        Rollout(Prompt("b", "", (3,)), [7], [-3.0], (), False, ""),
    ]
    batch, old_T = pack(rollouts), torch.tensor([-0.5, -2.2, -2.9])
    assert importance_denominator(batch, old_T, "none") is None
    of_tokens = importance_denominator(batch, old_T, "token")
    of_sequences = importance_denominator(batch, old_T, "sequence")
    assert of_tokens is not None
    assert of_sequences is not None
    assert (old_T - of_tokens).tolist() == pytest.approx([0.5, -0.2, 0.1], abs=1e-6)
    assert (old_T - of_sequences).tolist() == pytest.approx([0.3, 0.3, 0.1], abs=1e-6)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_importance_correction_weighs_the_gradient(
    make_policy: MakePolicy, make_rollouts: MakeRollouts, importance: Any
) -> None:
    """Every token half as likely under the sampler as under the trainer: all ratios are 2, or more, so the cap decides."""
    policy, batch = make_policy(), pack(make_rollouts(LENGTHS))
    advantage_T = torch.linspace(-1, 1, int(batch.cu_responses_S1[-1]))
    old_T = policy.token_logprobs(batch, 10_000)
    batch = dataclasses.replace(batch, sampler_logprob_T=old_T - math.log(2.0))

    def gradient(**how: Any) -> torch.Tensor:
        return gradients(
            policy.parameters(),
            lambda optimizer: improve_policy(
                policy, optimizer, batch, advantage_T, policy_update(**how), old_logprob_T=old_T, seed=0
            ),
        )

    plain = gradient()
    corrected = gradient(importance=importance, importance_cap=1.5)
    assert torch.allclose(corrected, 1.5 * plain, rtol=1e-4, atol=1e-7)


def test_a_kl_to_the_reference_pulls_the_policy_back(make_policy: MakePolicy, make_rollouts: MakeRollouts) -> None:
    batch = pack(make_rollouts(LENGTHS))
    distances = {}
    for kl_coef in (0.0, 100.0):
        policy = make_policy()
        reference = policy.frozen_copy()
        assert reference.parameters() == []
        optimizer = Optimizer(policy.parameters(), lr=1e-3)
        advantage_T = torch.linspace(-1, 1, int(batch.cu_responses_S1[-1]))
        old_T, ref_T = policy.token_logprobs(batch, 10_000), reference.token_logprobs(batch, 10_000)
        how = policy_update(epochs=8, loss="reinforce", kl_coef=kl_coef)
        metrics = improve_policy(
            policy, optimizer, batch, advantage_T, how, old_logprob_T=old_T, ref_logprob_T=ref_T, seed=0
        )
        assert metrics["actor/kl_loss"] > 0
        distances[kl_coef] = float((policy.token_logprobs(batch, 10_000) - ref_T).abs().mean())
        assert torch.equal(reference.token_logprobs(batch, 10_000), ref_T), "the reference does not move"
    assert distances[100.0] < 0.5 * distances[0.0]
