"""Predicted memory against what autograd keeps and what the allocator hands out; and by numbers a person can check."""

from typing import Any

import pytest
import torch
from tempo_em.loading import load_recipe, resolve
from tempo_em.plan import head, memory
from tempo_em.plan.activations import block_activations
from tempo_em.plan.layout import Layout, make_layout
from tempo_em.plan.machine import machine_named
from tempo_em.plan.shape import FAMILIES, shape_of
from tempo_em.recipe import Recipe
from tempo_engine.blocks import BlockOptions, tune_blocks
from tempo_kernels import linear_logprob
from tempo_kernels.bench.measure import peak_memory
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
        config = AutoConfig.for_model(model_type, **SMALL, num_hidden_layers=num_layers, eos_token_id=None, pad_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        return kept_by_autograd(model.eval())

    shape = shape_of({"model_type": model_type, **SMALL, "num_hidden_layers": 1}, "it")
    derived = block_activations(
        shape, compute=dtype.itemsize, attention=attention, checkpointing="off", row_tokens=TOKENS
    ).kept
    # each norm also keeps one number a token
    assert (kept(4) - kept(2)) / 2 / ROWS / TOKENS == pytest.approx(derived, rel=0.01)


def test_full_checkpointing_keeps_a_blocks_input_only() -> None:
    config = AutoConfig.for_model("llama", **SMALL, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tune_blocks(model, BlockOptions(activation_checkpointing="full"))
    shape = shape_of({"model_type": "llama", **SMALL, "num_hidden_layers": 3}, "it")
    derived = block_activations(shape, compute=4, attention="sdpa", checkpointing="full", row_tokens=TOKENS)
    assert derived.kept == 4 * 64
    _, unchecked = peak_memory(lambda: {"loss": model.base_model(torch.zeros(ROWS, TOKENS, dtype=torch.int64))[0]}, torch.device("cpu"))
    everything = block_activations(shape, compute=4, attention="sdpa", checkpointing="off", row_tokens=TOKENS).kept
    assert unchecked < ROWS * TOKENS * 3 * everything / 2


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocab_size", [100, 32000, 151936])
@pytest.mark.parametrize("num_tokens", [1, 768, 16384, 100_000])
def test_logits_are_cut_as_the_op_cuts_them(num_tokens: int, vocab_size: int, itemsize: int, is_gpu: bool) -> None:
    most = -(-vocab_size // linear_logprob.MIN_COLUMNS) * linear_logprob.MIN_COLUMNS
    most = most if is_gpu else min(most, linear_logprob.CPU_COLUMNS)
    budget = linear_logprob.GPU_MAX_BYTES if is_gpu else linear_logprob.CPU_MAX_BYTES
    theirs = linear_logprob.cut(num_tokens, vocab_size, itemsize, budget, most)
    assert tuple(head.cut(num_tokens, vocab_size, itemsize, is_gpu=is_gpu)) == tuple(theirs)
