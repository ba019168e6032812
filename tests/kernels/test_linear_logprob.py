"""linear_logprob against log-probabilities computed token by token in float64, in every mode."""

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tempo_kernels import TokenStats, linear_logprob
from tempo_kernels.linear_logprob import Cut, cut, linear_logprob_reference
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = importlib.import_module("tempo_kernels.linear_logprob")  # the name in the package is the function
SIZES = [(1, 1, 1), (1, 3, 5), (7, 4, 11), (130, 8, 33)]
OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.5, "softcap": 3.0}]


@pytest.fixture(autouse=True)
def blocks_may_have_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens are enough for NOBUF to cut them."""
    monkeypatch.setattr(MODULE, "MIN_ROWS", 1)


def inputs(T: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64)
    return hidden_TD, head_VD, bias_V, torch.randint(V, (T,), generator=generator)


def definition(hidden_TD, head_VD, bias_V, target_T, temperature=1.0, softcap=None) -> TokenStats:
    """Token by token from the formulas."""
    rows = []
    for hidden_D, target in zip(hidden_TD, target_T.tolist(), strict=True):
        logit_V = (head_VD * hidden_D).sum(1) + bias_V
        if softcap is not None:
            logit_V = softcap * (logit_V / softcap).tanh()
        logit_V = logit_V / temperature
        probability_V = logit_V.exp() / logit_V.exp().sum()
        entropy = -(probability_V * probability_V.log()).sum()
        is_top1 = logit_V[target] == logit_V.max()
        rows.append((probability_V[target].log(), entropy, logit_V.exp().sum().log(), is_top1))
    return TokenStats(*(torch.stack(column) for column in zip(*rows, strict=True)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows_at_a_time", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_logprob_matches_its_definition_forward(size, options, rows_at_a_time):
    hidden_TD, head_VD, bias_V, target_T = inputs(*size)
    budget = {} if rows_at_a_time is None else {"max_bytes": 4 * len(head_VD) * rows_at_a_time}
    got = linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V, **options, **budget)
    for one, other in zip(got, definition(hidden_TD, head_VD, bias_V, target_T, **options), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("rows_at_a_time", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 5), (7, 4, 11), (20, 8, 33)], ids=str)
def test_linear_logprob_matches_its_definition_backward(size, options, rows_at_a_time):
    hidden_TD, head_VD, bias_V, target_T = inputs(*size)
    budget = {} if rows_at_a_time is None else {"max_bytes": 4 * len(head_VD) * rows_at_a_time}
    slope_T, slope_entropy_T, slope_sum_T = torch.randn(3, len(hidden_TD), dtype=torch.float64)

    def gradients(stats_of) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden_TD, head_VD, bias_V)]
        stats = stats_of(*leaves)
        total_T = stats.logprob_T * slope_T + stats.entropy_T * slope_entropy_T + stats.logsumexp_T * slope_sum_T
        return torch.autograd.grad(total_T.sum(), leaves)

    got = gradients(lambda h, w, b: linear_logprob(h, w, target_T, bias=b, **options, **budget))
    want = gradients(lambda h, w, b: definition(h, w, b, target_T, **options))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_gradients_in_chunks_match_finite_differences():
    hidden_TD, head_VD, bias_V, target_T = inputs(5, 2, 3)
    leaves = [x.requires_grad_() for x in (hidden_TD, head_VD, bias_V)]

    def stats(hidden_TD, head_VD, bias_V):
        options = {"temperature": 0.8, "softcap": 4.0, "max_bytes": 4 * 3 * 2}
        return linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V, **options)[:3]

    assert torch.autograd.gradcheck(stats, leaves)


def logits(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that give exactly these logits."""
    head_VD = torch.eye(len(rows[0]), dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64), head_VD


def test_two_tokens_by_hand():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4.
    stats = linear_logprob(*logits([0.0, math.log(3)], [0.0, math.log(3)]), torch.tensor([0, 1]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert stats.logprob_T.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert stats.entropy_T.tolist() == pytest.approx([entropy, entropy])
    assert stats.logsumexp_T.tolist() == pytest.approx([math.log(4)] * 2)
    assert stats.is_top1_T.tolist() == [False, True]


def test_temperature_divides_the_logits():
    stats = linear_logprob(*logits([0.0, 2 * math.log(3)]), torch.tensor([1]), temperature=2.0)
    assert stats.logprob_T.item() == pytest.approx(math.log(0.75))


def test_softcap_comes_before_temperature():
    # 10 tanh(1e6 / 10) = 10, then 10 / 5 = 2.
    stats = linear_logprob(*logits([0.0, 1e6]), torch.tensor([0]), temperature=5.0, softcap=10.0)
    assert stats.logprob_T.item() == pytest.approx(-math.log(1 + math.exp(2)))


def test_the_bias_is_capped_with_the_logits():
    bias_V = torch.tensor([0.0, 1e6], dtype=torch.float64)
    stats = linear_logprob(*logits([0.0, 0.0]), torch.tensor([0]), bias=bias_V, softcap=2.0)
    assert stats.logprob_T.item() == pytest.approx(-math.log(1 + math.exp(2)))


def test_a_vocabulary_of_one_leaves_no_choice():
    stats = linear_logprob(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.int64))
    assert_close(stats.logprob_T, torch.zeros(3))
    assert_close(stats.entropy_T, torch.zeros(3), atol=1e-6, rtol=0)
    assert stats.is_top1_T.all()


def test_equal_logits_have_the_entropy_of_a_uniform_choice():
    stats = linear_logprob(torch.zeros(1, 2), torch.randn(50, 2), torch.tensor([7]))
    assert stats.entropy_T.item() == pytest.approx(math.log(50), rel=1e-5)


def test_huge_logits_stay_finite():
    stats = linear_logprob(*logits([1e4, -1e4, 0.0]), torch.tensor([1]))
    assert stats.logprob_T.item() == -2e4
    assert stats.entropy_T.item() == pytest.approx(0)


@pytest.mark.parametrize("max_bytes", [0, 1, 10**9])
def test_no_tokens_have_no_statistics(max_bytes: int):
    empty_T = torch.zeros(0, dtype=torch.int64)
    stats = linear_logprob(torch.zeros(0, 4), torch.randn(3, 4), empty_T, max_bytes=max_bytes)
    assert [len(part) for part in stats] == [0, 0, 0, 0]


@pytest.mark.parametrize("max_bytes", [1, 10**9])
def test_half_precision_hidden_states_give_float32_statistics(max_bytes: int):
    hidden_TD, head_VD, bias_V, target_T = (x.bfloat16() if x.is_floating_point() else x for x in inputs(3, 4, 5))
    stats = linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V, max_bytes=max_bytes)
    assert [part.dtype for part in stats] == [torch.float32] * 3 + [torch.bool]


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        # 100 tokens, a vocabulary of 2000, 4 bytes a logit: 800,000 bytes in all, 204,800 in a slab of 512 columns.
        (800_000, Cut(is_stored=True, num_rows=100, num_columns=2048)),
        (799_999, Cut(is_stored=False, num_rows=100, num_columns=1536)),
        (204_800, Cut(is_stored=False, num_rows=100, num_columns=512)),
        (204_799, Cut(is_stored=False, num_rows=99, num_columns=512)),
        (0, Cut(is_stored=False, num_rows=1, num_columns=512)),
    ],
)
def test_the_byte_budget_chooses_between_store_slab_and_nobuf(max_bytes: int, expected: Cut):
    assert cut(100, 2000, 4, max_bytes, 2048) == expected


def test_a_block_has_rows_enough_for_a_matrix_product_whatever_the_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "MIN_ROWS", 256)
    assert cut(8192, 151936, 2, 0, 8192) == Cut(is_stored=False, num_rows=256, num_columns=512)
    assert cut(100, 151936, 2, 0, 8192) == Cut(is_stored=False, num_rows=100, num_columns=512)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(1, 10_000),
    vocab_size=st.integers(1, 200_000),
    max_bytes=st.integers(0, 2**32),
    bytes_each=st.sampled_from([2, 4, 8]),
)
def test_a_block_never_exceeds_the_budget_unless_it_is_the_smallest(num_tokens, vocab_size, max_bytes, bytes_each):
    is_stored, rows, columns = cut(num_tokens, vocab_size, bytes_each, max_bytes, 8192)
    assert 1 <= rows <= num_tokens
    assert columns % 512 == 0
    assert is_stored == (num_tokens * vocab_size * bytes_each <= max_bytes)
    if not is_stored:
        assert rows * columns * bytes_each <= max_bytes or (rows, columns) == (1, 512)


@pytest.mark.parametrize("max_bytes", [2**30, 2**17, 0])
@pytest.mark.parametrize("has_backward", [False, True])
def test_logits_beyond_the_budget_are_never_allocated(max_bytes: int, has_backward: bool):
    T, D, V = 64, 8, 5000
    hidden_TD, head_VD = torch.randn(T, D, requires_grad=has_backward), torch.randn(V, D, requires_grad=has_backward)
    with Largest() as largest:
        stats = linear_logprob(hidden_TD, head_VD, torch.zeros(T, dtype=torch.int64), max_bytes=max_bytes)
        if has_backward:
            (stats.logprob_T + stats.entropy_T).sum().backward()
    all_bytes = 4 * T * V if has_backward else 4 * T * 5120
    allowed = min(all_bytes, max(max_bytes, 4 * 512))
    scratch = 2 * allowed
    assert largest.num_bytes <= max(allowed, scratch, head_VD.nbytes)


class Largest(TorchDispatchMode):
    """Watches for the largest tensor that any operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.num_bytes = max(self.num_bytes, x.nbytes)
        return result


def gradients_of(max_bytes: int, *, precise: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Everything the op gives for 70 tokens and a vocabulary of 1300, forward and backward."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD, head_VD = (torch.randn(size, 24, generator=generator).to(dtype).requires_grad_() for size in (70, 1300))
    target_T = torch.randint(1300, (70,), generator=generator)
    stats = linear_logprob(hidden_TD, head_VD, target_T, max_bytes=max_bytes, precise=precise)
    (stats.logprob_T.sum() - 0.3 * stats.entropy_T.sum() + (stats.logsumexp_T**2).sum()).backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    return [*(x.detach() for x in stats), hidden_TD.grad, head_VD.grad]


@pytest.mark.parametrize("max_bytes", [2**17, 2**14, 0])
def test_every_mode_gives_the_same_numbers(max_bytes: int):
    """To the rounding of sums: small gradients are what is left of terms as large as the largest of them."""
    for one, other in zip(gradients_of(max_bytes), gradients_of(2**30), strict=True):
        assert_close(one, other, rtol=1e-4, atol=max(2e-5, 1e-6 * float(other.double().abs().max())))


@pytest.mark.parametrize("max_bytes", [2**30, 2**17, 2**14])
def test_twice_the_same_inputs_give_the_same_bits(max_bytes: int):
    for one, other in zip(gradients_of(max_bytes), gradients_of(max_bytes), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_bytes", [2**30, 2**17])
def test_precise_logits_are_a_hundred_times_closer(max_bytes: int):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(32, 64, generator=generator).bfloat16()
    head_VD = (torch.randn(3000, 64, generator=generator) * 4 / 8).bfloat16()  # logits with a standard deviation of 4
    target_T = torch.randint(3000, (32,), generator=generator)
    truth = linear_logprob(hidden_TD.double(), head_VD.double(), target_T)

    def error(precise: bool) -> float:
        stats = linear_logprob(hidden_TD, head_VD, target_T, precise=precise, max_bytes=max_bytes)
        return float((stats.logprob_T - truth.logprob_T).abs().max())

    assert error(True) < 2e-3
    assert error(True) < error(False) / 100


def test_precise_gradients_are_no_worse():
    truth = gradients_of(2**17, dtype=torch.float64)
    plain, precise = (gradients_of(2**17, precise=p, dtype=torch.bfloat16) for p in (False, True))
    for true, one, other in zip(truth[4:], plain[4:], precise[4:], strict=True):
        assert (other - true).abs().max() <= (one - true).abs().max() * 1.1


@pytest.mark.parametrize("max_bytes", [2**30, 2**17, 0])
def test_rows_without_upstream_gradient_are_dropped(max_bytes: int):
    hidden_TD, head_VD = torch.randn(9, 4, requires_grad=True), torch.randn(600, 4, requires_grad=True)
    target_T = torch.arange(9)
    weight_T = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.5, 0.0])
    stats = linear_logprob(hidden_TD, head_VD, target_T, max_bytes=max_bytes)
    got = torch.autograd.grad((stats.logprob_T * weight_T).sum(), [hidden_TD, head_VD])
    stats = linear_logprob_reference(hidden_TD, head_VD, target_T)
    want = torch.autograd.grad((stats.logprob_T * weight_T).sum(), [hidden_TD, head_VD])
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    assert (got[0][weight_T == 0] == 0).all()


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_no_upstream_gradient_at_all_gives_zeros(max_bytes: int):
    hidden_TD, head_VD = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    stats = linear_logprob(hidden_TD, head_VD, torch.tensor([0, 6, 3]), max_bytes=max_bytes)
    for gradient in torch.autograd.grad((stats.logprob_T * 0).sum(), [hidden_TD, head_VD]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_padded_rows_of_the_head_get_no_probability_and_no_gradient(max_bytes: int):
    hidden_TD = torch.randn(5, 4, requires_grad=True)
    head_VD = torch.cat([torch.randn(6, 4), torch.full((3, 4), torch.nan)]).requires_grad_()
    target_T = torch.tensor([0, 5, 3, 3, 1])
    stats = linear_logprob(hidden_TD, head_VD, target_T, vocab_size=6, max_bytes=max_bytes)
    want = linear_logprob_reference(hidden_TD, head_VD[:6], target_T)
    assert_close(stats.logprob_T, want.logprob_T)
    (gradient,) = torch.autograd.grad(stats.logprob_T.sum(), head_VD)
    assert_close(gradient[:6], torch.autograd.grad(want.logprob_T.sum(), head_VD)[0][:6])
    assert (gradient[6:] == 0).all()


def test_each_token_may_have_its_own_temperature():
    hidden_TD, head_VD, _, target_T = inputs(5, 3, 7)
    temperature_T = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.1])
    got = linear_logprob(hidden_TD, head_VD, target_T, temperature=temperature_T)
    for row, temperature in enumerate(temperature_T.tolist()):
        one = linear_logprob(hidden_TD, head_VD, target_T, temperature=temperature)
        assert_close([x[row] for x in got], [x[row] for x in one])


def test_a_bias_of_minus_infinity_forbids_a_token():
    hidden_TD, head_VD, bias_V, target_T = inputs(4, 3, 6)
    bias_V[2] = -torch.inf
    got = linear_logprob(hidden_TD, head_VD, torch.full_like(target_T, 4), bias=bias_V)
    keep = [0, 1, 3, 4, 5]
    want = linear_logprob(hidden_TD, head_VD[keep], torch.full_like(target_T, 3), bias=bias_V[keep])
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_a_tie_for_the_most_likely_token_counts_as_a_hit():
    stats = linear_logprob(*logits([1.0, 1.0, 0.0]), torch.tensor([1]))
    assert stats.is_top1_T.tolist() == [True]


@pytest.mark.parametrize("shift", [-120.0, -20.0, 0.0, 50.0])
def test_shifting_all_logits_changes_only_the_logsumexp(shift: float):
    hidden_TD, head_VD, bias_V, target_T = inputs(6, 3, 700)
    plain = linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V)
    shifted = linear_logprob(hidden_TD, head_VD, target_T, bias=bias_V + shift)
    assert_close(shifted.logprob_T, plain.logprob_T)
    assert_close(shifted.entropy_T, plain.entropy_T)
    assert_close(shifted.logsumexp_T, plain.logsumexp_T + shift)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 1400)),
    max_bytes=st.integers(0, 2**18),
    shift=st.floats(-200, 200),
    temperature=st.floats(0.2, 3),
    seed=st.integers(0, 2**20),
)
def test_neither_the_cut_nor_a_shift_of_all_logits_changes_anything_but_the_logsumexp(
    size, max_bytes: int, shift: float, temperature: float, seed: int
):
    T, D, V = size
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    hidden_TD, head_VD, bias_V = torch.randn(T, D, **draw), torch.randn(V, D, **draw), torch.randn(V, **draw)
    target_T, slopes = torch.randint(V, (T,), generator=generator), torch.randn(2, T, **draw)

    def run(bias: Tensor, max_bytes: int) -> list[Tensor]:
        hidden, head = hidden_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()
        stats = linear_logprob(hidden, head, target_T, bias=bias, temperature=temperature, max_bytes=max_bytes)
        total = (slopes[0] * stats.logprob_T + slopes[1] * stats.entropy_T).sum()
        return [stats.logprob_T, stats.entropy_T, stats.logsumexp_T, *torch.autograd.grad(total, [hidden, head])]

    want, got = run(bias_V, 2**30), run(bias_V + shift, max_bytes)
    want[2] = want[2] + shift / temperature
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_stored_logits_serve_one_backward_pass_and_say_so():
    hidden_TD = torch.randn(3, 4, requires_grad=True)
    total = linear_logprob(hidden_TD, torch.randn(7, 4), torch.tensor([0, 1, 2])).logprob_T.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it with max_bytes=0"):
        total.backward()


def test_recomputed_logits_serve_any_number_of_backward_passes():
    hidden_TD = torch.randn(3, 4, requires_grad=True)
    total = linear_logprob(hidden_TD, torch.randn(7, 4), torch.tensor([0, 1, 2]), max_bytes=0).logprob_T.sum()
    first, second = (torch.autograd.grad(total, hidden_TD, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_hidden_states_may_be_strided():
    hidden_TD, head_VD, _, target_T = inputs(6, 4, 9)
    wide_TD = torch.cat([hidden_TD, hidden_TD], 1)[:, :4]
    assert_close(linear_logprob(wide_TD, head_VD, target_T), linear_logprob(hidden_TD, head_VD, target_T))
    assert_close(
        linear_logprob(hidden_TD.T.contiguous().T, head_VD, target_T), linear_logprob(hidden_TD, head_VD, target_T)
    )


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_is_named(target: int):
    with pytest.raises(ValueError, match=rf"within 0..6, got \[{target}\]"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, target]))


def test_an_unchecked_target_outside_the_vocabulary_has_a_logprob_of_nan():
    stats = linear_logprob(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 7]), check_target=False)
    assert stats.logprob_T.isnan().tolist() == [False, True]
    assert stats.entropy_T.isfinite().all()
    assert stats.is_top1_T.tolist() == [True, False]


def test_a_head_of_another_dtype_is_refused():
    with pytest.raises(
        ValueError, match=r"want head in the floating dtype .* of hidden \(torch.bfloat16 on cpu\), got torch.float32"
    ):
        linear_logprob(torch.zeros(2, 3).bfloat16(), torch.zeros(7, 3), torch.tensor([0, 1]))


def test_a_sharded_head_is_refused_with_what_to_do():
    class Sharded(Tensor):
        def full_tensor(self) -> Tensor:
            return self

    head_VD = torch.zeros(7, 3).as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"head is a DTensor.*inside the forward of the module that FSDP wraps"):
        linear_logprob(torch.zeros(2, 3), head_VD, torch.tensor([0, 1]))


@pytest.mark.parametrize("vocab_size", [0, 8, -1])
def test_a_vocabulary_that_the_head_does_not_have_is_refused(vocab_size: int):
    with pytest.raises(ValueError, match=rf"within 1..7, the rows of head, got {vocab_size}"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 1]), vocab_size=vocab_size)


@pytest.mark.parametrize("options", [{"bias": torch.zeros(6)}, {"temperature": torch.ones(3)}, {"max_bytes": -1}])
def test_other_shapes_and_sizes_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 1]), **options)


def test_frozen_weights_get_no_gradient_in_chunks():
    hidden_TD, head_VD, _, target_T = inputs(7, 4, 11)
    hidden_TD.requires_grad_()
    linear_logprob(hidden_TD, head_VD, target_T, max_bytes=1).logprob_T.sum().backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is None


def test_hidden_and_head_of_different_size_are_answered_with_both_shapes():
    with pytest.raises(ValueError, match=r"want hidden \[T, D\] and head \[V, D\], got \(2, 3\) and \(5, 4\)"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))


def test_batched_hidden_states_are_refused():
    with pytest.raises(ValueError, match=r"got \(1, 2, 3\) and \(5, 3\)"):
        linear_logprob(torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.int64))


def test_a_wrong_number_of_targets_is_answered_with_wanted_and_got():
    with pytest.raises(ValueError, match=r"one integer target per row of hidden \(2\).*of shape \(3,\)"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("temperature", "softcap"), [(0.0, None), (-1.0, None), (1.0, 0.0), (1.0, -2.0)])
def test_temperature_and_softcap_must_be_positive(temperature: float, softcap: float | None):
    with pytest.raises(ValueError, match=f"must be positive .*, got {temperature}, {softcap} and None"):
        linear_logprob(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), temperature=temperature, softcap=softcap
        )
