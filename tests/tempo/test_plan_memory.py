"""Predicted memory against what autograd keeps and what the allocator hands out; and by numbers a person can check."""

from typing import Any

import pytest
import torch
from tempo_em.build import build
from tempo_em.loading import load_recipe, parse_setting, resolve
from tempo_em.plan import head, memory
from tempo_em.plan.activations import block_activations
from tempo_em.plan.layout import Layout, make_layout
from tempo_em.plan.machine import machine_named
from tempo_em.plan.sampling import sampling
from tempo_em.plan.shape import FAMILIES, shape_of
from tempo_em.recipe import Recipe
from tempo_engine.adapters import Lora, add_adapters
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.updates import fit_critic, improve_policy
from tempo_kernels.bench.measure import peak_memory
from tempo_kernels.linear_logprob import CPU_COLUMNS, CPU_MAX_BYTES, GPU_MAX_BYTES, MIN_COLUMNS, cut
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": 128,
}  # fmt: skip
DENSE = [name for name, family in FAMILIES.items() if not family.experts and not family.qkv_bias]
ROWS, TOKENS = 2, 96


def kept_by_autograd(model: Any) -> int:
    """Bytes of the tensors that a forward pass of the trunk keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # holding it keeps the address from being used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.base_model(input_ids=torch.zeros(ROWS, TOKENS, dtype=torch.int64), use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DENSE)
def test_a_block_keeps_as_many_bytes_as_derived(model_type: str, dtype: torch.dtype, attention: Any) -> None:
    def kept(num_layers: int) -> int:
        config = AutoConfig.for_model(
            model_type, **SMALL, num_hidden_layers=num_layers, eos_token_id=None, pad_token_id=None
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        return kept_by_autograd(model.eval())

    shape = shape_of({"model_type": model_type, **SMALL, "num_hidden_layers": 1}, "it")
    derived = block_activations(
        shape, compute=dtype.itemsize, attention=attention, checkpointing="off", row_tokens=TOKENS
    ).kept
    # four layers have all kinds of them: what all layers share is there already
    assert (kept(8) - kept(4)) / 4 / ROWS / TOKENS == derived


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3"])
def test_a_block_with_adapters_keeps_less(model_type: str, dtype: torch.dtype, targets: Any) -> None:
    def kept(num_layers: int) -> int:
        config = AutoConfig.for_model(
            model_type, **SMALL, num_hidden_layers=num_layers, eos_token_id=None, pad_token_id=None
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        add_adapters(model, Lora(rank=4, alpha=8, targets=targets))
        return kept_by_autograd(model.to(dtype))

    shape = shape_of({"model_type": model_type, **SMALL, "num_hidden_layers": 1}, "it")
    derived = block_activations(
        shape, compute=dtype.itemsize, attention="sdpa", checkpointing="off", row_tokens=TOKENS,
        adapted=shape.adapted(targets), rank=4,
    ).kept  # fmt: skip
    assert (kept(8) - kept(4)) / 4 / ROWS / TOKENS == derived


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab_size", [100, 32000, 151936])
@pytest.mark.parametrize("num_tokens", [1, 768, 16384, 100_000])
def test_logits_are_cut_as_the_op_cuts_them(num_tokens: int, vocab_size: int, itemsize: int, is_gpu: bool) -> None:
    most = -(-vocab_size // MIN_COLUMNS) * MIN_COLUMNS
    most, budget = (most, GPU_MAX_BYTES) if is_gpu else (min(most, CPU_COLUMNS), CPU_MAX_BYTES)
    theirs = cut(num_tokens, vocab_size, itemsize, budget, most)
    assert tuple(head.cut(num_tokens, vocab_size, itemsize, is_gpu=is_gpu)) == tuple(theirs)


MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128,
}  # fmt: skip


def recipe(*settings: str) -> Recipe:
    """16 labelled and 16 unlabelled rows of 32 + 96 tokens, 4 of them in a micro-batch; more than a million parameters."""
    source = {"generator": "sums", "count": 32}
    fields = {
        "micro_batch_tokens": 512,
        "model": {"create": MODEL},
        "data": {"labelled": source, "unlabelled": source},
        "rollout": {"max_prompt_tokens": 32, "max_new_tokens": 96},
        "em": {"rollouts": 32, "group_size": 4, "labelled_group_size": 4},
        "estep": {"epochs": 1, "minibatches": 1},
        "mstep": {"minibatches": 2},
    }
    return resolve("planned", fields, [parse_setting(setting) for setting in settings]).recipe


def layout(*settings: str, gpu: str = "cpu", per_node: int = 1, nodes: int = 1) -> Layout:
    return make_layout(recipe(*settings), machine_named(gpu, processes=per_node), per_node, nodes)


BLOCK = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 128
TRUNK = 1000 * 128 + 4 * BLOCK + 128
TOTAL = TRUNK + 1000 * 128


@pytest.mark.parametrize(
    "setting",
    [
        "model.attention=sdpa",
        "model.attention=eager",
        "model.activation_checkpointing=full",
        "mstep.minibatches=8",
        "model.lora.rank=4",
    ],
)
def test_a_real_iteration_needs_the_memory_that_was_planned(setting: str) -> None:
    planned = layout(setting)
    loop = build(planned.recipe).loop
    assert loop.critic is not None
    assert loop.critic_optimizer is not None
    rollouts = [Rollout(Prompt(str(i), "", (5,) * 32), [7] * 96, [-5.0] * 96, (), True, "") for i in range(32)]
    labelled, everything = pack(rollouts[:16]), pack(rollouts)
    advantage_T = torch.linspace(-1, 1, 32 * 96)

    def fit() -> dict[str, torch.Tensor]:
        assert loop.critic is not None
        assert loop.critic_optimizer is not None
        fit_critic(loop.critic, loop.critic_optimizer, labelled, torch.ones(16), loop.critic_update, seed=0)
        return {}

    def improve() -> dict[str, torch.Tensor]:
        old_logprob_T, how = everything.sampler_logprob_T, loop.policy_update
        improve_policy(
            loop.policy, loop.policy_optimizer, everything, advantage_T, how, old_logprob_T=old_logprob_T, seed=0
        )
        return {}

    held = sum(memory.resident(planned).values())
    phases = {phase.name: phase.peak.total - held for phase in memory.phases(planned)}
    for name, run in (("critic update", fit), ("policy update", improve)):
        run()  # the first step makes AdamW's moments
        _, measured = peak_memory(run, torch.device("cpu"))
        assert phases[name] == pytest.approx(measured, rel=0.1), name


def test_one_process_holds_whole_weights_and_moments() -> None:
    trained = TOTAL + TRUNK + 129  # policy, the critic's trunk, its head
    assert memory.resident(layout()) == {"weights": 4 * trained, "optimiser": 8 * trained}


def test_a_reference_and_float64_cost_what_they_weigh() -> None:
    held = memory.resident(layout("mstep.kl_coef=0.1", "model.dtype=float64"))
    assert held["reference"] == 8 * TOTAL
    assert held["optimiser"] == 2 * held["weights"] == 16 * (TOTAL + TRUNK + 129)


def test_shards_divide_weights_and_moments_within_a_replica() -> None:
    whole, spread = layout(), layout("parallel.replicas=2", per_node=8)
    assert spread.num_shards == 4
    for item, size in memory.resident(whole).items():
        assert memory.resident(spread)[item] == pytest.approx(
            size / 4, rel=0.01
        )  # the value head is not worth dividing


def test_bfloat16_keeps_weights_in_float32_and_gathers_half_of_that() -> None:
    planned = layout("model.dtype=bfloat16")
    assert memory.resident(planned) == memory.resident(layout())
    assert (
        memory.gathered(planned, planned.policy) == 2 * TOTAL
    )  # one process frees nothing between forward and backward


def test_many_processes_gather_the_rest_and_two_groups() -> None:
    planned = layout("model.dtype=bfloat16", per_node=2)
    assert memory.gathered(planned, planned.policy) == 2 * ((1000 * 128 + 128) + 2 * BLOCK)
    kept = layout("model.dtype=bfloat16", "parallel.reshard_after_forward=false", per_node=2)
    assert memory.gathered(kept, kept.policy) == 2 * (TOTAL + BLOCK)


def gradients(planned: Layout, moment: str) -> float:
    update = next(phase for phase in memory.phases(planned) if phase.name == "policy update")
    return next(m.items["gradients"] for m in update.moments if m.name == moment)


def test_whole_accumulation_keeps_a_whole_gradient_and_sharded_a_share_of_it() -> None:
    several = ("micro_batch_tokens=128",)  # one row: 8 rows a rank and step are as many micro-batches
    head = 4 * (1000 * 128 + 128)
    assert gradients(layout(*several, per_node=2), "head") == 4 * TOTAL + head
    assert gradients(layout(*several, "parallel.accumulate=sharded", per_node=2), "head") == 4 * TOTAL / 2 + head
    assert gradients(layout("micro_batch_tokens=4096", per_node=2), "head") == head
    assert gradients(layout(*several, per_node=2), "step") == 4 * TOTAL / 2


def test_offload_leaves_nothing_on_the_device_between_uses() -> None:
    planned = layout("model.dtype=bfloat16", "parallel.offload=true", gpu="h100", per_node=2)
    assert memory.resident(planned) == {}
    assert sum(memory.held_shards(planned).values()) == pytest.approx(12 * (TOTAL + TRUNK) / 2, rel=0.01)
    assert gradients(planned, "step") == 0


def test_adapters_alone_have_gradients_and_moments() -> None:
    planned = layout("model.lora.rank=2")
    adapters = 4 * 2 * ((128 + 128) * 2 + (128 + 64) * 2 + (128 + 384) * 3)
    assert planned.policy.trained == adapters
    held = memory.resident(planned)
    assert held["optimiser"] == 8 * (2 * adapters + 129)
    assert held["weights"] == 4 * (TOTAL + TRUNK + 2 * adapters + 129)


def test_a_voting_method_has_no_critic_and_a_shared_one_only_a_head() -> None:
    assert memory.resident(layout("method=ttrl"))["weights"] == 4 * TOTAL
    assert memory.resident(layout("critic.backbone=shared"))["weights"] == 4 * (TOTAL + 129)


def test_the_cache_of_a_real_model_is_what_its_config_says() -> None:
    # Qwen3-8B: keys and values x 36 layers x 8 heads x 128 numbers x 2 bytes
    real = load_recipe("qwen3-8b-aime", []).recipe
    planned = make_layout(real, machine_named("h100", processes=8), 8, 1)
    served = sampling(planned)
    assert served.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2 == 147_456
    group = 8 * 18_432 * 147_456
    assert served.memory.peak.items["KV cache"] == group / served.tensor_parallel
    assert served.running * 18_432 * 147_456 <= planned.machine.usable * served.tensor_parallel


def test_servers_span_more_gpus_when_a_group_would_not_fit_on_one() -> None:
    real = load_recipe("qwen3-8b-aime", []).recipe
    assert sampling(make_layout(real, machine_named("h100", processes=8), 8, 1)).tensor_parallel == 1
    large = load_recipe("mistral-large-aime", []).recipe
    assert sampling(make_layout(large, machine_named("h100", processes=8), 8, 64)).tensor_parallel == 8


def test_the_local_sampler_decodes_no_more_rows_than_it_has() -> None:
    assert sampling(layout()).running == 16
    assert sampling(layout("rollout.max_running=8")).running == 8
    assert sampling(layout("rollout.max_running=1")).running == 4  # at least one group
    assert sampling(layout(per_node=4)).running == 4
    cache = sampling(layout("rollout.max_running=8")).memory.moments[1].items["KV cache"]
    # 8 rows of 128 tokens: keys and values of 4 layers, one layer's keys again, and both for all 4 heads
    assert cache == 8 * 128 * 4 * (2 * 4 * 64 + 64 + 2 * 128)
