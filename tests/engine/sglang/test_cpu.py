"""What is put in the place of SGLang's own on machines without an accelerator, and when."""

import struct
import sys
from importlib.metadata import entry_points

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tempo_engine.sglang import cpu

# Seed, data and MurmurHash3_x86_32 of them, as published for the reference implementation.
PUBLISHED = [
    (0, b"", 0x00000000),
    (1, b"", 0x514E28B7),
    (0xFFFFFFFF, b"", 0x81F16F39),
    (0, b"\xff\xff\xff\xff", 0x76293B50),
    (0, b"\x21\x43\x65\x87", 0xF55B516B),
    (0x5082EDEE, b"\x21\x43\x65\x87", 0x2362F9DE),
    (0x9747B28C, b"aaaa", 0x5A97808A),
    (0x9747B28C, b"abcd", 0xF0478627),
    (0x9747B28C, "\u03c0".encode() * 8, 0xD58063C1),  # 16 bytes
    (0x9747B28C, b"a" * 256, 0x37405BDC),
]
seeds = st.integers(-(2**63), 2**63 - 1)
positions = st.integers(0, 2**31 - 1)
columns = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 (Appleby 2011) of whole words."""
    mask, h = 0xFFFFFFFF, seed

    def rotate(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & mask

    for (word,) in struct.iter_unpack("<I", data):
        word = rotate(word * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        h = (rotate(h ^ word, 13) * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@pytest.mark.parametrize(("seed", "data", "value"), PUBLISHED)
def test_the_hash_that_we_compare_with_is_murmur_3(seed: int, data: bytes, value: int) -> None:
    assert murmur3(data, seed) == value


@settings(max_examples=200, deadline=None)
@given(seed=seeds, position=positions, column=columns)
@example(seed=0, position=0, column=[0])
@example(seed=-1, position=2**31 - 1, column=[0, 2**31 - 1])
def test_seeds_positions_and_columns_are_hashed_as_16_bytes(seed: int, position: int, column: list[int]) -> None:
    found = cpu.murmur_hash32(torch.tensor([seed]), torch.tensor([position]), torch.tensor(column))
    assert found.dtype == torch.uint32
    assert found.tolist() == [[murmur3(struct.pack("<qII", seed, position, c)) for c in column]]


def test_seeds_may_be_unsigned() -> None:
    seed, at = torch.tensor([2**64 - 1, 5], dtype=torch.uint64), torch.tensor([3, 4], dtype=torch.int32)
    found = cpu.murmur_hash32(seed, at, torch.tensor([7, 8, 9], dtype=torch.int32))
    assert found.tolist() == [
        [murmur3(struct.pack("<QII", s, p, c)) for c in (7, 8, 9)] for s, p in ((2**64 - 1, 3), (5, 4))
    ]


@pytest.mark.parametrize("begin", [cpu.activate, cpu.register_hooks])
def test_another_release_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch, begin: object) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "VERSION", "0.4.9")
    assert callable(begin)
    with pytest.raises(RuntimeError, match=r"made for sglang 0\.4\.9, found 0\.5\.23; run `make sglang-cpu`"):
        begin()


def test_nothing_happens_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "VERSION", "any other, even")
    before = set(sys.modules)
    assert cpu.activate() is None
    cpu.register_hooks()
    assert not {name for name in set(sys.modules) - before if name.startswith(("sglang", "torchvision"))}


def test_sglang_finds_both_functions_by_its_entry_points() -> None:
    found = {group: entry_points(group=f"sglang.srt.{group}")["tempo_cpu"].load() for group in ("platforms", "plugins")}
    assert found == {"platforms": cpu.activate, "plugins": cpu.register_hooks}


def test_there_is_one_class_to_ask_for() -> None:
    with pytest.raises(AttributeError):
        _ = cpu.GpuPlatform
