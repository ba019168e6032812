"""Operations and seconds of a plan, by numbers a person can check."""

import pytest
from tempo_em.loading import resolve
from tempo_em.plan import Plan, make_plan
from tempo_em.plan.layout import make_layout
from tempo_em.plan.machine import GPUS, machine_named
from tempo_em.plan.roofline import attention_flops, forward_flops, head_flops
from tempo_kernels import cost

CONFIG = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
BLOCK = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64


def plan(
    *settings: tuple[str, object], gpu: str = "h100", per_node: int = 8, nodes: int = 1, window: int | None = None
):
    source = {"jsonl": "some.jsonl"}
    fields = {
        "micro_batch_tokens": 32,
        "model": {"create": {**CONFIG, "sliding_window": window}, "dtype": "bfloat16"},
        "data": {"labelled": source, "unlabelled": source},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 24},
        "em": {"rollouts": 64, "group_size": 8, "labelled_group_size": 8},
        "estep": {"epochs": 1, "minibatches": 1},
        "mstep": {"minibatches": 2},
    }
    return make_plan(resolve("it", fields, list(settings)).recipe, gpu=gpu, per_node=per_node, nodes=nodes)


def seconds(planned: Plan, phase: str) -> dict[str, float]:
    return next(time for time in planned.times if time.name == phase).seconds


def flops(planned: Plan, phase: str) -> float:
    return next(time for time in planned.times if time.name == phase).flops


@pytest.mark.parametrize("window", [None, 5, 100])
def test_attention_counts_the_tokens_that_each_token_looks_at(window: int | None) -> None:
    layout = plan(window=window).layout
    # a token at position p looks at p tokens before it, or as many as the window holds; its own half counts nothing
    looked_at = sum(min(p + 0.5, window or 32) for p in range(32))
    exact = 4 * 64 * 2 * looked_at
    assert attention_flops(layout, 0, 32) == pytest.approx(exact, rel=0.05)
    assert attention_flops(layout, 0, 8) + attention_flops(layout, 8, 32) == attention_flops(layout, 0, 32)


def test_a_forward_pass_has_two_operations_for_each_weight_and_token() -> None:
    layout = plan().layout
    assert forward_flops(layout) == 2 * 2 * BLOCK * 32 + 4 * 64 * 2 * 32 * 32 / 2
    assert head_flops(layout) == 2 * 100 * 64 * 24


def test_updates_cost_three_forwards_and_a_fourth_with_full_checkpointing() -> None:
    plain, full = plan(), plan(("model.activation_checkpointing", "full"))
    row = forward_flops(plain.layout)
    assert flops(plain, "critic update") == 32 * 3 * row
    assert flops(full, "critic update") == 32 * 4 * row
    assert flops(plain, "policy update") == 64 * (3 * row + 4 * head_flops(plain.layout))


def test_adapters_save_the_gradients_of_weights() -> None:
    assert flops(plan(("model.lora.rank", 2)), "critic update") == 32 * 2 * forward_flops(plan().layout)


def test_a_sharded_gradient_travels_once_a_micro_batch_and_a_whole_one_once_a_step() -> None:
    one_row = ("micro_batch_tokens", 32)  # 32 rows a step on 8 ranks: 4 micro-batches
    whole, sharded = plan(one_row), plan(one_row, ("parallel.accumulate", "sharded"))
    network, rate = whole.layout.policy, 450e9 * 0.7
    gathered = 2 * 4 * 2 * 2 * network.size  # steps, micro-batches, forward and backward, bytes
    step = 4 * network.size
    assert seconds(whole, "policy update")["links"] == pytest.approx(7 / 8 * (gathered + 2 * step) / rate)
    assert seconds(sharded, "policy update")["links"] == pytest.approx(7 / 8 * (gathered + 8 * step) / rate)


def test_replicas_keep_gathering_inside_a_node() -> None:
    spread, replicated = plan(nodes=2), plan(("parallel.replicas", 2), nodes=2)
    network = spread.layout.policy
    assert seconds(spread, "log-probs")["network"] > 0
    assert "network" not in seconds(replicated, "log-probs")
    # two steps, each adding up the shards of 8 ranks with those of the other replica: 2 (r - 1) / r of a gradient
    crossing = 2 * 2 * (1 / 2) * 4 * network.size
    assert seconds(replicated, "policy update")["network"] == pytest.approx(crossing / (8 * 50e9 * 0.7))


def test_sampling_reads_weights_and_cache_for_every_token() -> None:
    planned = plan()
    sampler = planned.sampling
    assert (sampler.tensor_parallel, sampler.servers, sampler.running) == (1, 8, 8)
    weights, per_token = 2 * planned.layout.shape.total, 2 * 2 * 2 * 32
    read = 24 * (weights + 8 * (8 + 12) * per_token)
    assert seconds(planned, "rollout")["memory"] == pytest.approx(read / (3.35e12 * 0.7))


def test_a_phase_is_as_slow_as_its_slowest_part() -> None:
    planned = plan()
    assert planned.seconds == sum(max(time.seconds.values()) for time in planned.times)
    assert planned.slowest.total == max(time.total for time in planned.times)


def test_the_gpus_agree_with_the_kernels_table() -> None:
    for gpu in cost.GPUS:
        ours = GPUS[gpu.name.lower()]
        assert (ours.flops, ours.bandwidth) == pytest.approx((gpu.flops, gpu.bandwidth), rel=0.01)


def test_processes_of_one_computer_share_its_memory_and_cores() -> None:
    one, four = machine_named("cpu", processes=1), machine_named("cpu", processes=4)
    assert four.memory == one.memory / 4
    assert four.usable < one.usable / 4  # each has an interpreter of its own


def test_a_layout_divides_rows_over_ranks_and_micro_batches() -> None:
    layout = make_layout(plan().layout.recipe, machine_named("h100", processes=2), 2, 1)
    update = layout.policy_update()
    # 64 rows in 2 steps over 2 ranks: 16 each, one of 32 tokens at a time
    assert (update.num_rows, update.num_steps, update.micro_batches, update.micro_rows) == (64, 2, 16, 1)
    assert layout.critic_update().micro_batches == 16


def test_ranks_without_rows_do_not_make_a_step_quicker() -> None:
    # 32 rows a step: 64 ranks have one row or none, and so have 32
    assert seconds(plan(nodes=8), "policy update")["compute"] == seconds(plan(nodes=4), "policy update")["compute"]


def test_a_critic_on_the_policys_trunk_goes_forward_only() -> None:
    shared = plan(("critic.backbone", "shared"))
    assert flops(shared, "critic update") == 32 * forward_flops(shared.layout)
    assert seconds(shared, "values")["links"] == pytest.approx(seconds(plan(), "log-probs")["links"])
