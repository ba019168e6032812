"""gather_logprob against log-probabilities computed token by token in float64."""

import math

import pytest
import torch
from tempo_kernels import linear_logprob
from tempo_kernels.logprob import TokenStats, gather_logprob, gather_logprob_reference
from torch import Tensor
from torch.testing import assert_close


def inputs(T: int, V: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(T, V, dtype=torch.float64), torch.randint(V, (T,))


def definition(logits_TV: Tensor, target_T: Tensor, temperature_T: Tensor) -> TokenStats:
    """Token by token from the formulas."""
    rows = []
    for logit_V, target, temperature in zip(logits_TV, target_T.tolist(), temperature_T, strict=True):
        x_V = logit_V / temperature
        probability_V = x_V.exp() / x_V.exp().sum()
        entropy = -(probability_V * probability_V.log()).sum()
        rows.append((probability_V[target].log(), entropy, x_V.exp().sum().log(), x_V[target] == x_V.max()))
    return TokenStats(*(torch.stack(column) for column in zip(*rows, strict=True)))  # pyright: ignore[reportArgumentType]


def gradient(stats_of, logits_TV: Tensor, slope_MT: Tensor) -> Tensor:
    logits_TV = logits_TV.clone().requires_grad_()
    stats = stats_of(logits_TV * 1)
    total_T = sum(slope_T * x_T for slope_T, x_T in zip(slope_MT, stats[:3], strict=True))
    return torch.autograd.grad(total_T.sum(), logits_TV)[0]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 11), (130, 33)], ids=str)
def test_gather_logprob_matches_its_definition_forward_and_backward(size, is_in_place):
    (logits_TV, target_T), temperature_T = inputs(*size), torch.rand(size[0], dtype=torch.float64) + 0.5
    options = {"temperature": temperature_T, "in_place_backward": is_in_place}
    want = definition(logits_TV, target_T, temperature_T)
    for got in (
        gather_logprob(logits_TV, target_T, **options),
        gather_logprob_reference(logits_TV, target_T, temperature=temperature_T),
    ):
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)
    slope_MT = torch.randn(3, size[0], dtype=torch.float64)
    slope_MT[:, ::3] = 0
    assert_close(
        gradient(lambda z: gather_logprob(z, target_T, **options), logits_TV, slope_MT),
        gradient(lambda z: definition(z, target_T, temperature_T), logits_TV, slope_MT),
    )


def test_gradients_match_finite_differences():
    logits_TV, target_T = inputs(4, 5)

    def stats(logits_TV: Tensor) -> tuple[Tensor, ...]:
        return gather_logprob(logits_TV, target_T, temperature=0.8, vocab_size=5)[:3]

    assert torch.autograd.gradcheck(stats, logits_TV.requires_grad_())


def test_two_tokens_by_hand():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4.
    logits_TV = torch.tensor([[0.0, math.log(3)]] * 2)
    stats = gather_logprob(logits_TV, torch.tensor([0, 1]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert stats.logprob_T.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert stats.entropy_T.tolist() == pytest.approx([entropy, entropy])
    assert stats.logsumexp_T.tolist() == pytest.approx([math.log(4)] * 2)
    assert stats.is_top1_T.tolist() == [False, True]


def test_it_agrees_with_the_op_that_makes_the_logits():
    hidden_TD, head_VD, target_T = torch.randn(9, 6), torch.randn(20, 6), torch.randint(20, (9,))
    for one, other in zip(
        gather_logprob(hidden_TD @ head_VD.T, target_T), linear_logprob(hidden_TD, head_VD, target_T), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_have_float32_statistics_and_a_gradient_in_their_dtype(dtype):
    logits_TV, target_T = inputs(5, 7)
    logits_TV = logits_TV.to(dtype).requires_grad_()
    stats = gather_logprob(logits_TV, target_T)
    assert_close(stats.logprob_T, logits_TV.detach().float().log_softmax(-1).gather(1, target_T[:, None])[:, 0])
    stats.logprob_T.sum().backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.dtype == dtype


def test_padded_columns_have_no_probability_and_no_gradient():
    logits_TV, target_T = inputs(6, 5)
    padded_TV = torch.cat([logits_TV, torch.full((6, 3), 1e4)], 1).requires_grad_()
    for is_in_place in (False, True):
        stats = gather_logprob(padded_TV * 1, target_T, vocab_size=5, in_place_backward=is_in_place)
        assert_close(stats.logprob_T, gather_logprob(logits_TV, target_T).logprob_T)
        (slope_TV,) = torch.autograd.grad(stats.logprob_T.sum(), padded_TV)
        assert (slope_TV[:, 5:] == 0).all()
        assert slope_TV[:, :5].abs().sum() > 0


def test_logits_of_minus_infinity_have_probability_0_and_finite_neighbours():
    logits_TV = torch.tensor([[0.0, -math.inf, math.log(3)]], requires_grad=True)
    stats = gather_logprob(logits_TV, torch.tensor([2]))
    assert stats.entropy_T.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    (slope_TV,) = torch.autograd.grad((stats.logprob_T + stats.entropy_T).sum(), logits_TV)
    assert slope_TV.isfinite().all()
    assert slope_TV[0, 1] == 0


@pytest.mark.parametrize("is_in_place", [False, True])
def test_rows_without_upstream_gradient_get_zeros_whatever_their_logits_hold(is_in_place):
    logits_TV, target_T = inputs(3, 4)
    logits_TV[1] = math.nan
    slope_MT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    slope_TV = gradient(
        lambda z: gather_logprob(z, target_T, in_place_backward=is_in_place),
        logits_TV,
        slope_MT,
    )
    assert slope_TV[1].tolist() == [0, 0, 0, 0]
    assert slope_TV.isfinite().all()


def test_rows_may_be_strided_and_columns_too():
    logits_TV, target_T = inputs(8, 6)
    want = gather_logprob(logits_TV, target_T)
    wide_TV = torch.cat([logits_TV, logits_TV], 1)[:, :6]
    for strided_TV in (wide_TV, logits_TV.T.contiguous().T):
        for one, other in zip(gather_logprob(strided_TV, target_T, in_place_backward=True), want, strict=True):
            assert_close(one, other)


def test_in_place_the_gradient_takes_the_memory_of_the_logits():
    logits_TV, target_T = inputs(4, 5)
    computed_TV = logits_TV.requires_grad_() * 1
    taken = []
    computed_TV.register_hook(lambda slope_TV: taken.append(slope_TV.data_ptr()))
    gather_logprob(computed_TV, target_T, in_place_backward=True).logprob_T.sum().backward()
    assert taken == [computed_TV.data_ptr()]
    assert_close(computed_TV.detach(), logits_TV.grad)


def test_in_place_a_second_backward_says_why_it_cannot_work():
    logits_TV, target_T = inputs(4, 5)
    total = gather_logprob(logits_TV.requires_grad_() * 1, target_T, in_place_backward=True).logprob_T.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by its first backward pass"):
        total.backward()


def test_in_place_an_op_that_needs_its_own_logits_again_is_told_so():
    logits_TV, target_T = inputs(4, 5)
    total = gather_logprob(logits_TV.requires_grad_().tanh(), target_T, in_place_backward=True).logprob_T.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_place_a_leaf_is_refused():
    logits_TV, target_T = inputs(4, 5)
    with pytest.raises(ValueError, match="leaf requiring grad"):
        gather_logprob(logits_TV.requires_grad_(), target_T, in_place_backward=True)


def test_in_place_rows_that_share_memory_are_refused():
    logits_TV, target_T = inputs(1, 5)
    with pytest.raises(ValueError, match="rows that share no memory"):
        gather_logprob(logits_TV.expand(3, 5), target_T.expand(3), in_place_backward=True)


def test_no_tokens_have_no_statistics_and_no_gradient():
    logits_TV, target_T = inputs(0, 5)
    stats = gather_logprob(logits_TV.requires_grad_() * 1, target_T, in_place_backward=True)
    assert [x.tolist() for x in stats] == [[], [], [], []]
    stats.logprob_T.sum().backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_TV": torch.zeros(2, 3, 4)}, "want logits"),
        ({"logits_TV": torch.zeros(2, 3, dtype=torch.long)}, "want logits"),
        ({"target_T": torch.zeros(3, dtype=torch.long)}, "one integer target per row"),
        ({"target_T": torch.zeros(2)}, "one integer target per row"),
        ({"target_T": torch.tensor([0, 3])}, r"within 0..2, got \[3\]"),
        ({"target_T": torch.tensor([-100, 0])}, "got .-100"),
        ({"target_T": torch.tensor([0, 2]), "vocab_size": 2}, r"within 0..1, got \[2\]"),
        ({"vocab_size": 4}, "within 1..3"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, "one temperature"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    arguments = {"logits_TV": torch.zeros(2, 3), "target_T": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        gather_logprob(arguments.pop("logits_TV"), arguments.pop("target_T"), **arguments)
