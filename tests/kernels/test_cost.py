"""The costs of the ops, with numbers a person can check."""

from typing import Any

import pytest
from tempo_kernels import cost
from tempo_kernels.cost import H100, Cost

QWEN3_8B: dict[str, Any] = {"T": 8192, "D": 4096, "V": 151936}


def test_one_product_of_qwen3_8b_takes_an_h100_ten_milliseconds():
    forward = cost.linear_logprob_forward(**QWEN3_8B)
    assert forward.flops == 2 * 8192 * 4096 * 151936
    assert H100.floor_ms(forward) == pytest.approx(10.3, abs=0.05)


@pytest.mark.parametrize(("mode", "products"), [("STORE", 3), ("SLAB", 4), ("NOBUF", 4)])
def test_store_saves_one_product_of_four(mode, products: int):
    both = cost.linear_logprob_forward(**QWEN3_8B, mode=mode) + cost.linear_logprob_backward(**QWEN3_8B, mode=mode)
    assert both.flops == products * 2 * 8192 * 4096 * 151936


def test_store_keeps_all_logits_and_nobuf_next_to_nothing():
    memory = {
        mode: cost.linear_logprob_backward(**QWEN3_8B, mode=mode, max_bytes=2**24).memory for mode in ("SLAB", "NOBUF")
    }
    memory["STORE"] = cost.linear_logprob_forward(**QWEN3_8B, mode="STORE").memory
    assert memory["STORE"] > 2 * 8192 * 151936
    assert memory["NOBUF"] <= memory["SLAB"] < memory["STORE"] / 10


def test_a_transfer_that_outlasts_the_arithmetic_sets_the_floor():
    assert H100.floor_ms(Cost(flops=989e9, bytes_moved=3.35e9 * 5, memory=0)) == pytest.approx(5.0)
    assert H100.floor_ms(Cost(flops=989e9 * 7, bytes_moved=3.35e9 * 5, memory=0)) == pytest.approx(7.0)


def test_costs_of_passes_add_up_and_memory_is_that_of_the_larger():
    assert Cost(1, 2, 30) + Cost(10, 20, 3) == Cost(11, 22, 30)


@pytest.mark.parametrize("least", [cost.value_head_forward(8192, 4096), cost.value_head_backward(8192, 4096)])
def test_the_value_head_needs_about_twenty_microseconds(least: Cost):
    assert H100.floor_ms(least) == pytest.approx(0.0215, rel=0.1)
