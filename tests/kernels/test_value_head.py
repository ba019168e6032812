"""The value head and its loss against numbers worked out by hand and float64 loops over sequences."""

import math

import pytest
import torch
from tempo_kernels import value_loss, value_of, value_score
from torch import Tensor
from torch.testing import assert_close

LENGTHS = [[1], [1, 0, 3], [0, 5, 0, 2], [33, 1, 64]]


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(score_N: Tensor, *args, **options) -> list[float]:
    score_N = score_N.clone().requires_grad_()
    value_loss(score_N, *args, **options).total.backward()
    assert score_N.grad is not None
    return score_N.grad.tolist()


def test_a_score_is_a_dot_product_plus_bias():
    hidden_ND = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert value_score(hidden_ND, torch.tensor([3.0, 4.0]), torch.tensor([0.5])).tolist() == [11.5, -3.5]


def test_gradients_of_the_score_match_finite_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 5), (5,), (1,)]]
    assert torch.autograd.gradcheck(value_score, inputs)


@pytest.mark.parametrize(
    ("dtype", "want"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_have_at_least_float32(dtype: torch.dtype, want: torch.dtype):
    assert value_score(torch.ones(2, 3, dtype=dtype), torch.ones(3), torch.zeros(1)).dtype == want


def test_half_precision_hidden_states_do_not_round_the_score():
    # 1 + 2^-8 needs one digit more than bf16 has.
    hidden_ND = torch.tensor([[1.0, 2**-8]], dtype=torch.bfloat16)
    weight_D, bias = torch.ones(2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    assert value_score(hidden_ND, weight_D, bias).item() == 1 + 2**-8


def test_no_positions_have_no_scores():
    assert value_score(torch.zeros(0, 4), torch.ones(4), torch.ones(1)).tolist() == []


def test_a_head_of_another_hidden_size_is_answered_with_both():
    with pytest.raises(ValueError, match="hidden size is 3, the value head wants 4"):
        value_score(torch.zeros(2, 3), torch.zeros(4), torch.zeros(1))


def test_a_linear_value_is_its_score():
    assert value_of(torch.tensor([-3.0, 2.0]), "linear").tolist() == [-3, 2]


def test_a_sigmoid_value_is_a_probability():
    assert value_of(f64(0.0, math.log(3), -1000.0), "sigmoid").tolist() == pytest.approx([0.5, 0.75, 0.0])


def test_mse_by_hand():
    score_N, return_N, weight_N = f64(0.5, -1.0, 2.0), f64(1.0, 1.0, 2.0), f64(0.5, 0.25, 0.25)
    assert value_loss(score_N, return_N, weight_N).total.item() == pytest.approx(0.5 * 0.125 + 0.25 * 2)
    assert gradient(score_N, return_N, weight_N) == pytest.approx([-0.25, -0.5, 0.0])


def test_bce_is_the_log_likelihood_of_the_outcome():
    score_N, return_N, weight_N = f64(0.3, -2.0, 1.5), f64(1.0, 0.0, 0.25), f64(0.2, 0.3, 0.5)
    want, slopes = 0.0, []
    for score, target, weight in zip(score_N.tolist(), return_N.tolist(), weight_N.tolist(), strict=True):
        p = 1 / (1 + math.exp(-score))
        want -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p))
        slopes.append(weight * (p - target))
    assert value_loss(score_N, return_N, weight_N, head="sigmoid", loss="bce").total.item() == pytest.approx(want)
    assert gradient(score_N, return_N, weight_N, head="sigmoid", loss="bce") == pytest.approx(slopes)


def test_bce_of_a_certain_mistake_is_finite():
    loss = value_loss(
        torch.tensor([1000.0, -1000.0]), torch.tensor([0.0, 1.0]), torch.ones(2), head="sigmoid", loss="bce"
    )
    assert loss.total.item() == 2000


def test_mse_of_a_sigmoid_head_acts_on_the_probability():
    score_N, return_N, weight_N = f64(math.log(3)), f64(1.0), f64(2.0)
    assert value_loss(score_N, return_N, weight_N, head="sigmoid").total.item() == pytest.approx(2 * 0.5 * 0.0625)
    # w (p - R) p (1 - p)
    assert gradient(score_N, return_N, weight_N, head="sigmoid") == pytest.approx([2 * -0.25 * 0.75 * 0.25])


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.05, 1.0, 0.45125, -0.95),  # moved less than 0.1
        (0.5, 1.0, 0.405, 0.0),  # towards the target and beyond the range: (0.1 - 1)^2 / 2 is larger
        (0.5, 0.0, 0.125, 0.5),  # away from the target: its own loss is larger
        (-0.5, -1.0, 0.405, 0.0),
    ],
)
def test_token_clip_stops_a_value_that_moved_far_enough_towards_its_target(value, target, loss, slope):
    options = {"clip": "token", "clip_range": 0.1, "old_value_N": f64(0.0)}
    assert value_loss(f64(value), f64(target), f64(1.0), **options).total.item() == pytest.approx(loss)
    assert gradient(f64(value), f64(target), f64(1.0), **options) == pytest.approx([slope])


def sequence_clip(old_value_N: Tensor, lengths: list[int], clip_range: float = 0.1) -> dict:
    options = {"clip": "sequence_mean", "clip_range": clip_range}
    return {**options, "old_value_N": old_value_N, "cu_seqlens_S1": cu(lengths)}


def test_sequence_clip_by_hand():
    # Moves 0.3 and 0.5, mean 0.4: the shift is -0.3, so the clipped values are 0.0 and 0.2.
    score_N, return_N, weight_N = f64(0.3, 0.5), f64(1.0, 1.0), f64(0.5, 0.5)
    options = sequence_clip(f64(0.0, 0.0), [2])
    assert value_loss(score_N, return_N, weight_N, **options).total.item() == pytest.approx(0.5 * (0.5 + 0.32))
    # Weighted errors -0.5 and -0.4, less their mean -0.45.
    assert gradient(score_N, return_N, weight_N, **options) == pytest.approx([-0.05, 0.05])


def test_sequence_clip_equals_plain_mse_while_the_mean_moves_less_than_the_range():
    # Single moves reach 0.4, their means 0.1 and -0.05 do not pass 0.1.
    old_value_N, move_N = torch.randn(5, dtype=torch.float64), f64(0.4, -0.3, 0.2, -0.25, 0.15)
    return_N, weight_N, lengths = f64(1, 1, 1, -1, -1), f64(0.1, 0.2, 0.3, 0.3, 0.1), [3, 0, 2]
    options = sequence_clip(old_value_N, lengths, clip_range=0.1 + 1e-12)
    score_N = old_value_N + move_N
    clipped, plain = value_loss(score_N, return_N, weight_N, **options), value_loss(score_N, return_N, weight_N)
    assert_close(clipped.total, plain.total)
    assert gradient(score_N, return_N, weight_N, **options) == pytest.approx(gradient(score_N, return_N, weight_N))


def test_sequence_clip_takes_the_larger_loss_of_each_token():
    # Moves 0.9 and 0.1, mean 0.5, shift -0.4, clipped 0.5 and -0.3; the target is 0.6, so each branch wins once:
    # (0.3)^2 against (0.1)^2, and (0.5)^2 against (0.9)^2.
    score_N, return_N, weight_N = f64(0.9, 0.1), f64(0.6, 0.6), f64(1.0, 1.0)
    options = sequence_clip(f64(0.0, 0.0), [2])
    assert value_loss(score_N, return_N, weight_N, **options).total.item() == pytest.approx(0.5 * (0.09 + 0.81))
    # The plain branch gives 0.3 to the first; the clipped one -0.9, of which half is taken back from each.
    assert gradient(score_N, return_N, weight_N, **options) == pytest.approx([0.3 + 0.45, -0.45])


def test_where_the_clipped_branch_wins_the_gradient_is_centred_within_the_sequence():
    score_N = f64(0.4, 0.3, 0.6, -0.5, -0.4, -0.9)
    return_N, weight_N = f64(1, 1, 1, -1, -1, -1), torch.rand(6, dtype=torch.float64)
    slopes = gradient(score_N, return_N, weight_N, **sequence_clip(torch.zeros(6).double(), [3, 3]))
    assert any(abs(slope) > 1e-3 for slope in slopes)
    assert sum(slopes[:3]) == pytest.approx(0)
    assert sum(slopes[3:]) == pytest.approx(0)


def test_sequence_clip_stops_a_sequence_of_one_token():
    assert gradient(f64(0.5), f64(1.0), f64(1.0), **sequence_clip(f64(0.0), [1])) == pytest.approx([0.0])


def test_sequence_clip_of_one_sequence_does_not_touch_another():
    old_value_N, return_N, weight_N = torch.zeros(4).double(), torch.ones(4).double(), torch.ones(4).double()
    options = sequence_clip(old_value_N, [2, 2])
    quiet = gradient(f64(0.05, 0.02, 0.01, 0.01), return_N, weight_N, **options)
    loud = gradient(f64(0.05, 0.02, 5.0, 9.0), return_N, weight_N, **options)
    assert loud[:2] == quiet[:2]


@pytest.mark.parametrize("head", ["linear", "sigmoid"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sequence_clip_matches_its_definition_forward_and_backward(lengths: list[int], head):
    generator = torch.Generator().manual_seed(sum(lengths))
    score_N, old_value_N, weight_N = torch.randn(3, sum(lengths), generator=generator, dtype=torch.float64)
    weight_N = weight_N.abs()
    return_N = torch.tensor([i % 2 for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.float64)
    total, slopes = 0.0, []
    for i in range(len(lengths)):
        own = slice(int(cu(lengths)[i]), int(cu(lengths)[i + 1]))
        score, old, target, weight = (x[own].tolist() for x in (score_N, old_value_N, return_N, weight_N))
        value = [1 / (1 + math.exp(-s)) for s in score] if head == "sigmoid" else score
        per_score = [v * (1 - v) for v in value] if head == "sigmoid" else [1.0] * len(value)
        mean = sum(v - o for v, o in zip(value, old, strict=True)) / max(len(value), 1)
        shift = min(max(mean, -0.1), 0.1) - mean
        per_value = [0.0] * len(value)
        for t, (v, r, w) in enumerate(zip(value, target, weight, strict=True)):
            plain, clipped = 0.5 * (v - r) ** 2, 0.5 * (v + shift - r) ** 2
            total += w * max(plain, clipped)
            if clipped > plain:
                per_value[t] += w * (v + shift - r)
                # Beyond the range the shift falls by 1 / T for every unit a value rises.
                per_value = [p - w * (v + shift - r) / len(value) for p in per_value]
            else:
                per_value[t] += w * (v - r)
        slopes += [p * d for p, d in zip(per_value, per_score, strict=True)]
    options = {"head": head, **sequence_clip(old_value_N, lengths)}
    assert value_loss(score_N, return_N, weight_N, **options).total.item() == pytest.approx(total)
    assert gradient(score_N, return_N, weight_N, **options) == pytest.approx(slopes)


@pytest.mark.parametrize("clip", ["none", "token", "sequence_mean"])
@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_gradients_of_mse_match_finite_differences(head, clip):
    score_N = f64(0.4, 0.3, 0.6, -0.5, -0.4, -0.9).requires_grad_()
    options = {**sequence_clip(torch.full((6,), 0.23).double(), [3, 1, 2]), "clip": clip, "head": head}
    return_N, weight_N = f64(1, 1, 1, 0, 1, 1), f64(0.1, 0.2, 0.3, 0.2, 0.1, 0.1)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, return_N, weight_N, **options).total, (score_N,))


def test_gradients_of_bce_match_finite_differences():
    score_N = torch.randn(4, dtype=torch.float64, requires_grad=True)
    return_N, weight_N = f64(0, 1, 0.5, 1), f64(0.1, 0.2, 0.3, 0.4)
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, return_N, weight_N, head="sigmoid", loss="bce").total, (score_N,)
    )


def test_a_token_without_weight_has_exactly_no_gradient():
    slopes = gradient(f64(0.5, 0.5), f64(1, -1), f64(1, 0))
    assert slopes[1] == 0


def test_micro_batches_of_whole_sequences_add_up_to_the_minibatch():
    score_N, old_value_N, return_N, weight_N = torch.randn(4, 8, dtype=torch.float64)
    both = value_loss(score_N, return_N, weight_N, **sequence_clip(old_value_N, [3, 1, 4]))
    first = value_loss(score_N[:4], return_N[:4], weight_N[:4], **sequence_clip(old_value_N[:4], [3, 1]))
    second = value_loss(score_N[4:], return_N[4:], weight_N[4:], **sequence_clip(old_value_N[4:], [4]))
    assert_close(first.total + second.total, both.total)
    for name, metric in both.metrics.items():
        assert_close(first.metrics[name] + second.metrics[name], metric)


def test_metrics_are_means_under_the_weights_and_carry_no_gradient():
    score_N = f64(0.0, 2.0).requires_grad_()
    loss = value_loss(score_N, f64(1.0, 1.0), f64(0.25, 0.75))
    assert loss.metrics["critic/vf_loss"].item() == pytest.approx(0.5)
    assert loss.metrics["critic/vpred_mean"].item() == pytest.approx(1.5)
    assert loss.metrics["critic/abs_error"].item() == pytest.approx(1.0)
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def test_no_positions_lose_nothing():
    empty = torch.zeros(0)
    assert value_loss(empty, empty, empty, **sequence_clip(empty, [0])).total == 0


@pytest.mark.parametrize("options", [{"head": "linear"}, {"head": "sigmoid", "clip": "token"}])
def test_bce_wants_a_sigmoid_head_and_no_clip(options):
    with pytest.raises(ValueError, match="bce wants a sigmoid head and no value clip"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), loss="bce", **options)


@pytest.mark.parametrize("clip", ["token", "sequence_mean"])
def test_a_clip_wants_the_old_values(clip):
    with pytest.raises(ValueError, match=f"value clip '{clip}' needs old_value_N"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), clip=clip)


def test_a_sequence_clip_wants_the_boundaries():
    with pytest.raises(ValueError, match="'sequence_mean' needs cu_seqlens_S1"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), clip="sequence_mean", old_value_N=torch.zeros(1))


@pytest.mark.parametrize("option", ["head", "loss", "clip"])
def test_an_unknown_head_loss_or_clip_is_refused(option: str):
    options = {**sequence_clip(torch.zeros(1), [1]), option: "unheard-of"}
    with pytest.raises(ValueError, match="unheard-of"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), **options)


def test_autocast_does_not_round_values():
    hidden_ND, weight_D = torch.randn(5, 64), torch.randn(64)
    plain = value_score(hidden_ND, weight_D, torch.zeros(()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value_score(hidden_ND, weight_D, torch.zeros(())), plain)
