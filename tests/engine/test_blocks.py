from collections.abc import Callable
from typing import Any

import pytest
import torch
from tempo_engine import blocks
from tempo_engine.blocks import BlockOptions, blocks_of, is_kept
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.samplers.local import LocalSampler
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = pack([Rollout(Prompt("p", "", (3, 4)), [5, 6, 7], [-1.0] * 3, (), False, "")])
MakePolicy = Callable[..., Policy]


def backward_products(policy: Policy) -> int:
    """Matrix products in the backward pass of one batch."""

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.products += func.name().startswith(("aten::mm", "aten::addmm", "aten::bmm"))
            return func(*args, **(kwargs or {}))

    loss = policy.token_stats(BATCH).logprob_T.sum()
    with Count():
        loss.backward()
    return Count.products


def test_the_blocks_are_those_the_architecture_names(make_policy: MakePolicy) -> None:
    assert [type(block).__name__ for block in blocks_of(make_policy("qwen3").model)] == ["Qwen3DecoderLayer"] * 2


def test_full_checkpointing_computes_products_again_and_selective_does_not(make_policy: MakePolicy) -> None:
    off, selective, full = (
        backward_products(make_policy(blocks=BlockOptions(activation_checkpointing=mode)))
        for mode in ("off", "selective", "full")
    )
    assert selective == off
    assert full == off + 2 * 6  # q, k, v, o, gate and up of two blocks; what down gives, no gradient needs


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("aten::mm", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("flash_attn::_flash_attn_varlen_forward", True),
        ("aten::_grouped_mm", True),
        ("aten::silu", False),
        ("aten::mul.Tensor", False),
    ],
)
def test_selective_checkpointing_keeps_products_and_attention(name: str, kept: bool) -> None:
    assert is_kept(name) == kept


def test_blocks_are_compiled_for_training_and_not_for_decoding(
    monkeypatch: pytest.MonkeyPatch, make_policy: MakePolicy
) -> None:
    calls = {"compiled": 0}

    def compile(forward: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls["compiled"] += 1
            return forward(*args, **kwargs)

        return compiled

    monkeypatch.setattr(blocks.torch, "compile", compile)
    policy = make_policy(blocks=BlockOptions(compile=True))
    at_first = calls["compiled"]
    policy.token_stats(BATCH)
    assert calls["compiled"] == at_first + 2
    sampler = LocalSampler(stop_ids=[1], decode=str, max_new_tokens=4)
    sampler.load(policy)
    sampler.sample([Prompt("p", "", (3, 4))], 2, key="k")
    assert calls["compiled"] == at_first + 2


def test_a_float64_model_computes_norms_and_softmax_in_float64(make_policy: MakePolicy) -> None:
    """Seven digits are lost wherever transformers goes through float32: a change of 1e-12 in the input would drown."""
    policy = make_policy(dtype="float64")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        embedded = policy.trunk.get_input_embeddings()(ids)  # pyright: ignore[reportCallIssue]
        nearby = embedded.clone()
        nearby[0, 0, 0] += 1e-12
        change = (
            policy.trunk(inputs_embeds=nearby).last_hidden_state
            - policy.trunk(inputs_embeds=embedded).last_hidden_state
        )
    assert 1e-14 < float(change.abs().max()) < 1e-9
