"""Checksums that a server must report, against bytes joined by hand."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.sglang.receipt import Receipt, checksum
from torch import Tensor

BLOCK = "model.layers.0"
PARTS = ("q_proj", "k_proj", "v_proj")


def sha(*parts: Tensor) -> str:
    """First 8 bytes of SHA-256 of the parts' bytes one after the other."""
    data = b"".join(bytes(part.contiguous().view(torch.uint8).flatten().tolist()) for part in parts)
    return hashlib.sha256(data).hexdigest()[:16]


def receipt_of(weights: dict[str, Tensor]) -> Receipt:
    receipt = Receipt()
    for name, weight in weights.items():
        receipt.add(name, weight)
    return receipt


def small_model(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Weights by their names in a file: grouped queries with biases, a vocabulary of 50."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (50, 4),
        **{f"{BLOCK}.self_attn.{n}.weight": (rows, 4) for n, rows in zip(PARTS, (8, 2, 2), strict=True)},
        **{f"{BLOCK}.self_attn.{n}.bias": (rows,) for n, rows in zip(PARTS, (8, 2, 2), strict=True)},
        f"{BLOCK}.self_attn.q_norm.weight": (4,),
        f"{BLOCK}.self_attn.o_proj.weight": (4, 8),
        f"{BLOCK}.mlp.gate_proj.weight": (6, 4),
        f"{BLOCK}.mlp.up_proj.weight": (6, 4),
        f"{BLOCK}.mlp.down_proj.weight": (4, 6),
        "model.norm.weight": (4,),
        "lm_head.weight": (50, 4),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def as_a_server_keeps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights joined and padded, written out name by name."""
    kept = {n: x for n, x in weights.items() if not any(f".{p}_proj." in n for p in ("q", "k", "v", "gate", "up"))}
    for leaf in ("weight", "bias"):
        parts = [weights[f"{BLOCK}.self_attn.{part}.{leaf}"] for part in PARTS]
        kept[f"{BLOCK}.self_attn.qkv_proj.{leaf}"] = torch.cat(parts)
    kept[f"{BLOCK}.mlp.gate_up_proj.weight"] = torch.cat(
        [weights[f"{BLOCK}.mlp.gate_proj.weight"], weights[f"{BLOCK}.mlp.up_proj.weight"]]
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept[name] = torch.zeros(64, 4, dtype=weights[name].dtype)
        kept[name][:50] = weights[name]
    return kept


def test_a_checksum_is_the_first_8_bytes_of_sha_256() -> None:
    abc = torch.tensor([97, 98, 99], dtype=torch.uint8)
    assert checksum(abc) == "ba7816bf8f01cfea"  # of "abc", FIPS 180-4
    assert checksum(torch.zeros(0)) == "e3b0c44298fc1c14"  # of nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_is_of_the_values_in_order_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    x = torch.arange(12.0).view(3, 4).to(dtype)
    assert checksum(x) == checksum(torch.nn.Parameter(x)) == sha(x)
    assert checksum(x.T) == sha(x.T.contiguous()) != sha(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_server_with_the_same_weights_matches_in_every_tensor(dtype: torch.dtype) -> None:
    weights = small_model(dtype=dtype)
    receipt, kept = receipt_of(weights), as_a_server_keeps(weights)
    assert receipt.expected == {name: sha(x) for name, x in kept.items()}
    assert receipt.covers(receipt.expected)
    assert receipt.differing(receipt.expected) == []


def test_parts_are_joined_in_the_servers_order_whatever_order_they_come_in() -> None:
    q, k, v, gate, up = (torch.full((2, 2), float(i)) for i in range(5))
    names = (*PARTS, "gate_proj", "up_proj")
    backwards = reversed(list(zip(names, (q, k, v, gate, up), strict=True)))
    receipt = receipt_of({f"{BLOCK}.{name}.weight": x for name, x in backwards})
    assert receipt.expected == {f"{BLOCK}.qkv_proj.weight": sha(q, k, v), f"{BLOCK}.gate_up_proj.weight": sha(gate, up)}


def test_biases_are_joined_apart_from_weights() -> None:
    bias = torch.arange(3.0)
    receipt = receipt_of({f"{BLOCK}.{part}.bias": bias + i for i, part in enumerate(PARTS)})
    assert receipt.expected == {f"{BLOCK}.qkv_proj.bias": sha(bias, bias + 1, bias + 2)}


@pytest.mark.parametrize(("rows", "padded"), [(50, 64), (64, 64), (65, 128), (1, 64)])
def test_the_vocabulary_is_padded_with_zeros_to_a_multiple_of_64(rows: int, padded: int) -> None:
    weight = torch.ones(rows, 2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = receipt_of({name: weight}).expected
        assert expected == {name: sha(weight, torch.zeros(padded - rows, 2))}


def test_only_the_vocabulary_is_padded() -> None:
    weight = torch.ones(50, 2)
    assert receipt_of({"model.norm.weight": weight}).expected == {"model.norm.weight": sha(weight)}


def test_a_server_with_other_tensors_is_not_covered() -> None:
    weights = small_model()
    receipt = receipt_of(weights)
    expected = receipt.expected
    assert not receipt.covers({**expected, "model.rotary.inv_freq": "0" * 16})
    assert not receipt.covers({name: value for name, value in expected.items() if name != "lm_head.weight"})
    assert not receipt_of({n: x for n, x in weights.items() if "v_proj.weight" not in n}).covers(
        {name: value for name, value in expected.items() if "qkv_proj.weight" not in name}
    ), "a part without its companions"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_flipped_bit_is_named(data: st.DataObject, dtype: torch.dtype) -> None:
    weights = small_model(dtype=dtype)
    receipt, kept = receipt_of(weights), as_a_server_keeps(weights)
    name = data.draw(st.sampled_from(sorted(kept)))
    damaged = kept[name].clone()
    memory = damaged.view(torch.uint8).view(-1)
    memory[data.draw(st.integers(0, len(memory) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    checksums = {n: sha(damaged if n == name else x) for n, x in kept.items()}
    assert receipt.covers(checksums)
    assert receipt.differing(checksums) == [name]
