"""The kernels of linear_logprob, in Triton's interpreter, against float64: values, gradients, bits."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tempo_kernels import linear_logprob
from tempo_kernels.dispatch import INTERPRETER, Target
from tempo_kernels.linear_logprob import linear_logprob_reference
from tempo_kernels.linear_logprob_triton import PART_COLUMNS, tile_for
from torch import Tensor

pytestmark = pytest.mark.usefixtures("triton_runs_it")

TILE = tile_for(INTERPRETER, torch.float32, is_plain=True).columns
STORE, NOBUF = 2**30, 0


@pytest.fixture(autouse=True)
def blocks_may_have_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens are enough for NOBUF to cut them."""
    monkeypatch.setattr(importlib.import_module("tempo_kernels.linear_logprob"), "MIN_ROWS", 3)


def slab(T: int, itemsize: int = 4) -> int:
    """The budget of one narrow slab."""
    return T * 512 * itemsize


def run(op: Any, inputs: list[Tensor | None], slopes: Tensor, **options: Any) -> list[Tensor]:
    """Statistics, then the gradients of hidden, head and bias under the given upstream gradients."""
    *weights, target_T = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in weights]
    hidden_TD, head_VD, bias = leaves
    stats = op(hidden_TD, head_VD, target_T, bias=bias, **options)
    terms = [(slope_T.to(x.dtype) * x).sum() for slope_T, x in zip(slopes, stats[:3], strict=True)]
    gradients = torch.autograd.grad(torch.stack(terms).sum(), [x for x in leaves if x is not None])
    return [*(x.detach() for x in stats), *gradients]


def check(
    T: int, D: int, V: int, *, dtype=torch.float32, scale=3.0, shift: float | None = None, slopes=None, **options
):
    """No further from the float64 definition than twice what eager PyTorch is, with targets in the first and last column."""
    generator = torch.Generator().manual_seed(T * V)
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype)
    head_VD = (torch.randn(V, D, generator=generator) * scale / D**0.5).to(dtype)
    bias_V = None if shift is None else (torch.randn(V, generator=generator) + shift).to(dtype)
    target_T = torch.randint(options.get("vocab_size", V), (T,), generator=generator)
    target_T[0], target_T[-1] = 0, options.get("vocab_size", V) - 1
    slopes = torch.randn(3, T, generator=generator) if slopes is None else slopes
    inputs = [hidden_TD, head_VD, bias_V, target_T]
    definition = {name: value for name, value in options.items() if name != "max_bytes"}
    truth = run(
        linear_logprob_reference,
        [x.double() if x is not None and x.is_floating_point() else x for x in inputs],
        slopes,
        **definition,
    )
    eager = run(linear_logprob_reference, inputs, slopes, **definition)
    got = run(linear_logprob, inputs, slopes, **options)
    for true, other, one in zip(truth, eager, got, strict=True):
        error, allowed = (float((x.double() - true.double()).abs().max()) for x in (one, other))
        assert error <= 2 * allowed + 3e-6 * max(1.0, float(true.double().abs().max()))
    return got


@pytest.mark.parametrize("max_bytes", [STORE, slab(127), slab(127) // 2], ids=["STORE", "SLAB", "NOBUF"])
@pytest.mark.parametrize("V", [TILE - 1, TILE, TILE + 1, 1152])
def test_kernels_match_the_definition_around_a_tile(V: int, max_bytes: int):
    check(127, 96, V, max_bytes=max_bytes)


@pytest.mark.parametrize("T", [1, 127, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [STORE, slab(129)], ids=["STORE", "SLAB"])
def test_kernels_match_the_definition_in_every_dtype(T: int, dtype: torch.dtype, max_bytes: int):
    check(T, 96, 1152, dtype=dtype, max_bytes=max_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_the_definition_for_a_hidden_size_of_many_steps(dtype: torch.dtype):
    check(3, 576, PART_COLUMNS + 1, dtype=dtype, max_bytes=NOBUF)


@pytest.mark.parametrize("max_bytes", [STORE, 2**20], ids=["STORE", "SLAB"])
def test_kernels_match_the_definition_for_a_large_vocabulary(max_bytes: int):
    check(2, 64, 50257, dtype=torch.bfloat16, max_bytes=max_bytes)


@pytest.mark.parametrize("shift", [-120.0, -20.0, 0.0, 50.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0], ids=["flat", "usual", "peaked"])
def test_kernels_match_the_definition_wherever_the_logits_are(shift: float, scale: float):
    check(5, 16, TILE + 128, shift=shift, scale=scale, max_bytes=STORE)
    check(5, 16, TILE + 128, shift=shift, scale=scale, max_bytes=slab(5))


@pytest.mark.parametrize("max_bytes", [STORE, slab(9)], ids=["STORE", "SLAB"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 4.0},
        {"softcap": 30.0, "temperature": 0.6},
        {"vocab_size": TILE + 1},
        {"vocab_size": 3, "softcap": 2.0},
        {"temperature": torch.linspace(0.3, 2.0, 9)},
    ],
    ids=lambda options: ", ".join(options),
)
def test_kernels_match_the_definition_with_options(options: dict[str, Any], max_bytes: int):
    check(9, 32, TILE + 130, shift=1.0, max_bytes=max_bytes, **options)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["log-prob", "entropy", "logsumexp"])
@pytest.mark.parametrize("max_bytes", [STORE, slab(7)], ids=["STORE", "SLAB"])
def test_each_statistic_alone_has_the_right_gradient(which: int, max_bytes: int):
    slopes = torch.zeros(3, 7)
    slopes[which] = torch.randn(7)
    check(7, 32, 700, slopes=slopes, max_bytes=max_bytes)


@pytest.mark.parametrize("max_bytes", [STORE, slab(9), NOBUF], ids=["STORE", "SLAB", "NOBUF"])
def test_masked_rows_are_dropped_from_the_backward_pass(max_bytes: int):
    slopes = torch.randn(3, 9)
    slopes[:, [0, 2, 3, 8]] = 0
    got = check(9, 32, 700, slopes=slopes, max_bytes=max_bytes)
    assert (got[4][[0, 2, 3, 8]] == 0).all()


@pytest.mark.parametrize("max_bytes", [STORE, NOBUF], ids=["STORE", "NOBUF"])
def test_all_rows_masked_gives_zero_gradients(max_bytes: int):
    got = check(4, 16, 300, slopes=torch.zeros(3, 4), max_bytes=max_bytes)
    assert all((gradient == 0).all() for gradient in got[4:])


def test_no_tokens_have_no_statistics():
    stats = linear_logprob(torch.zeros(0, 4), torch.randn(3, 4), torch.zeros(0, dtype=torch.int64))
    assert [len(part) for part in stats] == [0, 0, 0, 0]


def test_strided_rows_and_misaligned_targets_are_read_as_they_lie():
    hidden_TD, head_VD = torch.randn(6, 48), torch.randn(200, 48)
    target_T = torch.arange(7)[1:]
    got = linear_logprob(hidden_TD[:, 3:35], head_VD[:, 5:37], target_T)
    want = linear_logprob(hidden_TD[:, 3:35].contiguous(), head_VD[:, 5:37].contiguous(), target_T.clone())
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_an_unchecked_target_outside_the_vocabulary_has_a_logprob_of_nan():
    stats = linear_logprob(torch.zeros(2, 16), torch.zeros(7, 16), torch.tensor([0, 7]), check_target=False)
    assert stats.logprob_T.isnan().tolist() == [False, True]
    assert stats.is_top1_T.tolist() == [True, False]


def test_a_nan_in_one_row_stays_in_that_row():
    hidden_TD = torch.randn(3, 16)
    hidden_TD[1, 5] = torch.nan
    stats = linear_logprob(hidden_TD, torch.randn(200, 16), torch.tensor([0, 1, 2]))
    for part in stats[:3]:
        assert part.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("max_bytes", [STORE, slab(7), NOBUF], ids=["STORE", "SLAB", "NOBUF"])
def test_a_vocabulary_of_one_column_more_than_a_slab(max_bytes: int):
    check(7, 16, 513, max_bytes=max_bytes)
    check(7, 16, 1, max_bytes=max_bytes)


def test_a_forbidden_part_and_a_tiny_temperature_stay_finite():
    hidden_TD, head_VD = torch.randn(2, 16), torch.randn(2 * PART_COLUMNS, 16)
    bias = torch.zeros(2 * PART_COLUMNS)
    bias[:PART_COLUMNS] = -torch.inf
    stats = linear_logprob(hidden_TD, head_VD, torch.tensor([PART_COLUMNS, 200]), bias=bias, temperature=1e-9)
    assert stats.entropy_T.isfinite().all()
    assert stats.logprob_T.isfinite().all()


def test_rows_cut_by_launch_have_the_same_statistics(monkeypatch: pytest.MonkeyPatch):
    inputs = [torch.randn(300, 16), torch.randn(200, 16), None, torch.arange(300) % 200]
    slopes = torch.randn(3, 300)
    whole = run(linear_logprob, inputs, slopes, max_bytes=NOBUF + 300 * 1024)
    monkeypatch.setattr("tempo_kernels.linear_logprob_triton.FORWARD_ROWS", 128)
    for one, other in zip(whole, run(linear_logprob, inputs, slopes, max_bytes=NOBUF + 300 * 1024), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_bytes", [STORE, slab(140)], ids=["STORE", "SLAB"])
def test_neither_another_run_nor_another_order_of_programs_changes_a_bit(
    max_bytes: int, in_any_order: Callable[[], None]
):
    inputs = [torch.randn(140, 16), torch.randn(3 * TILE - 5, 16), None, torch.arange(140)]
    slopes = torch.randn(3, 140)
    first = run(linear_logprob, inputs, slopes, max_bytes=max_bytes)
    second = run(linear_logprob, inputs, slopes, max_bytes=max_bytes)
    in_any_order()
    third = run(linear_logprob, inputs, slopes, max_bytes=max_bytes)
    for one, other, another in zip(first, second, third, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def test_a_token_s_statistics_do_not_depend_on_its_batch_or_on_the_mode():
    hidden_TD, head_VD, target_T = torch.randn(131, 16).bfloat16(), torch.randn(700, 16).bfloat16(), torch.arange(131)
    together = linear_logprob(hidden_TD, head_VD, target_T)
    alone = linear_logprob(hidden_TD[130:], head_VD, target_T[130:])
    kept = linear_logprob(hidden_TD[128:].requires_grad_(), head_VD, target_T[128:], max_bytes=STORE)
    for whole, one, stored in zip(together, alone, kept, strict=True):
        assert torch.equal(whole[130], one[0])
        assert torch.equal(whole[128:], stored)


def test_shifting_all_logits_changes_only_the_logsumexp():
    # Powers of two and small integers: adding 64 to them is exact.
    hidden_TD, head_VD = torch.randint(-3, 4, (5, 8)).float(), torch.randint(-3, 4, (300, 8)).float()
    bias_V, target_T = torch.zeros(300), torch.arange(5)
    plain, shifted = (linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V + shift) for shift in (0, 64))
    assert torch.equal(plain.logprob_T, shifted.logprob_T)
    assert torch.equal(plain.entropy_T, shifted.entropy_T)
    torch.testing.assert_close(plain.logsumexp_T + 64, shifted.logsumexp_T)


def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient():
    target_T = torch.arange(3)
    for hidden_needs, head_needs in itertools.product([False, True], repeat=2):
        hidden_TD, head_VD = (
            torch.randn(3, 16, requires_grad=hidden_needs),
            torch.randn(40, 16, requires_grad=head_needs),
        )
        stats = linear_logprob(hidden_TD, head_VD, target_T, max_bytes=0)
        assert stats.logprob_T.requires_grad == (hidden_needs or head_needs)
        if hidden_needs or head_needs:
            stats.logprob_T.sum().backward()
        assert (hidden_TD.grad is not None) == hidden_needs
        assert (head_VD.grad is not None) == head_needs


@pytest.mark.parametrize(
    "target", [Target("cuda", 80), Target("cuda", 89), Target("cuda", 90), Target("hip", "gfx942")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_plain", [False, True])
def test_tiles_line_up_with_parts_and_blocks_on_every_gpu(target: Target, dtype: torch.dtype, is_plain: bool):
    tile = tile_for(target, dtype, is_plain=is_plain)
    assert tile.columns in (PART_COLUMNS, 2 * PART_COLUMNS, 4 * PART_COLUMNS)
    assert 512 % tile.columns == 0
