"""The schedule by hand, and an optimiser that clips, guards, and goes on from its state bit for bit."""

import math

import pytest
import torch
from tempo_engine.optim import SCHEDULE_FLOOR, Optimizer, schedule_factor
from torch import Tensor, nn


def factors(steps: list[int], **options) -> list[float]:
    return [schedule_factor(step, **options) for step in steps]


def test_warm_up_climbs_in_equal_steps_to_the_peak():
    assert factors([0, 1, 2, 3, 4], warmup=4, schedule="constant", total=10) == [0.25, 0.5, 0.75, 1, 1]


def test_a_constant_schedule_stays_at_the_peak():
    assert factors([0, 9, 10**6], warmup=0, schedule="constant", total=10) == [1, 1, 1]


def test_a_linear_schedule_falls_evenly_to_a_twentieth():
    got = factors([0, 5, 10], warmup=0, schedule="linear", total=10)
    assert got == pytest.approx([1, 0.525, 0.05])


def test_a_cosine_schedule_falls_along_a_cosine_to_a_twentieth():
    quarter = 0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2
    got = factors([0, 2, 4, 8], warmup=0, schedule="cosine", total=8)
    assert got == pytest.approx([1, quarter, 0.525, 0.05])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_starts_after_warm_up(schedule):
    got = factors([1, 2, 6, 10], warmup=2, schedule=schedule, total=10)
    assert got == pytest.approx([1, 1, 0.525, 0.05])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_stays_on_its_floor_beyond_the_last_step(schedule):
    assert factors([10, 11, 1000], warmup=0, schedule=schedule, total=10) == pytest.approx([SCHEDULE_FLOOR] * 3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (5, 5), (9, 3), (0, 1)])
def test_factors_lie_between_0_and_1_for_any_lengths(schedule, warmup: int, total: int):
    assert all(0 < factor <= 1 for factor in factors(list(range(20)), warmup=warmup, schedule=schedule, total=total))


@pytest.fixture
def matrix() -> nn.Parameter:
    return nn.Parameter(torch.tensor([[3.0, -4.0]]))


@pytest.fixture
def vector() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, 2.0]))


def test_the_first_step_moves_every_weight_by_the_learning_rate(matrix: nn.Parameter):
    # AdamW's first step is lr g / |g|.
    matrix.grad = torch.tensor([[0.25, -0.5]])
    Optimizer([("w", matrix)], lr=0.01).step()
    assert matrix.tolist()[0] == pytest.approx([2.99, -3.99], abs=1e-6)


def test_the_factor_scales_the_learning_rate_of_its_step(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.01, factor=lambda step: [0.0, 1.0][step])
    matrix.grad = torch.ones(1, 2)
    optimizer.step()
    assert matrix.tolist() == [[3.0, -4.0]]
    matrix.grad = torch.ones(1, 2)
    optimizer.step()
    assert matrix.tolist()[0] == pytest.approx([2.99, -4.01], abs=1e-6)


def test_a_long_gradient_is_clipped_and_its_true_norm_returned(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.01, betas=(0.9, 0.999), max_grad_norm=1.0)
    matrix.grad = torch.tensor([[3.0, 4.0]])
    assert optimizer.step() == pytest.approx(5)
    # The first moment is a tenth of the gradient the optimiser saw: (0.6, 0.8).
    assert optimizer.state()["w/exp_avg"].tolist()[0] == pytest.approx([0.06, 0.08], rel=1e-4)


def test_a_short_gradient_is_not_lengthened(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.01, max_grad_norm=1.0)
    matrix.grad = torch.tensor([[0.3, 0.4]])
    assert optimizer.step() == pytest.approx(0.5)
    assert optimizer.state()["w/exp_avg"].tolist()[0] == pytest.approx([0.03, 0.04])


def test_the_norm_is_that_of_all_parameters_together(matrix: nn.Parameter, vector: nn.Parameter):
    matrix.grad, vector.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0, 0.0])
    assert Optimizer([("w", matrix), ("b", vector)], lr=0.01).step() == pytest.approx(7)


def test_gradients_are_cleared_after_a_step(matrix: nn.Parameter):
    matrix.grad = torch.ones(1, 2)
    Optimizer([("w", matrix)], lr=0.01).step()
    assert matrix.grad is None


def test_a_parameter_without_gradient_stays(matrix: nn.Parameter, vector: nn.Parameter):
    vector.grad = torch.ones(2)
    Optimizer([("w", matrix), ("b", vector)], lr=0.01, weight_decay=0.5).step()
    assert matrix.tolist() == [[3.0, -4.0]]


def test_matrices_decay(matrix: nn.Parameter):
    matrix.grad = torch.zeros(1, 2)
    Optimizer([("w", matrix)], lr=0.1, weight_decay=0.5).step()
    assert matrix.tolist()[0] == pytest.approx([3 * 0.95, -4 * 0.95])


def test_vectors_do_not_decay(matrix: nn.Parameter, vector: nn.Parameter):
    matrix.grad, vector.grad = torch.zeros(1, 2), torch.zeros(2)
    Optimizer([("w", matrix), ("b", vector)], lr=0.1, weight_decay=0.5).step()
    assert vector.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_every_weight_as_it_was(matrix, vector, poison: float):
    optimizer = Optimizer([("w", matrix), ("b", vector)], lr=0.1, weight_decay=0.5)
    matrix.grad, vector.grad = torch.tensor([[1.0, poison]]), torch.ones(2)
    assert not math.isfinite(optimizer.step())
    assert matrix.tolist() == [[3.0, -4.0]]
    assert vector.tolist() == [1.0, 2.0]


def test_a_skipped_step_is_counted_and_its_gradient_dropped(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.1)
    matrix.grad = torch.full((1, 2), math.nan)
    optimizer.step()
    assert (optimizer.num_steps, optimizer.num_skipped) == (1, 1)
    assert matrix.grad is None


def test_a_skipped_step_leaves_the_moments_as_they_were(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.1)
    matrix.grad = torch.ones(1, 2)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state().items() if name != "num_steps"}
    matrix.grad = torch.full((1, 2), math.inf)
    optimizer.step()
    assert all(torch.equal(optimizer.state()[name], value) for name, value in before.items())


def test_a_finite_step_after_a_skipped_one_is_taken(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.01)
    for value in (math.nan, 1.0):
        matrix.grad = torch.full((1, 2), value)
        optimizer.step()
    assert matrix.tolist()[0] == pytest.approx([2.99, -4.01], abs=1e-6)


def model_and_optimizer() -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    options = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5, "factor": lambda step: 1 / (1 + step)}
    return model, Optimizer(list(model.named_parameters()), **options)


def train(model: nn.Linear, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) ** 2).sum() * (math.nan if step == 1 else 1.0)  # step 1 is skipped
        loss.backward()
        optimizer.step()


def weights(model: nn.Linear) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_goes_on_bit_for_bit_from_a_state():
    straight, its_optimizer = model_and_optimizer()
    train(straight, its_optimizer, range(6))

    first, first_optimizer = model_and_optimizer()
    train(first, first_optimizer, range(3))
    state = {name: value.clone() for name, value in first_optimizer.state().items()}
    resumed, resumed_optimizer = model_and_optimizer()
    resumed.load_state_dict(first.state_dict())
    resumed_optimizer.load_state(state)
    train(resumed, resumed_optimizer, range(3, 6))

    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    assert (resumed_optimizer.num_steps, resumed_optimizer.num_skipped) == (6, 1)


def test_a_state_before_the_first_step_can_be_taken_and_loaded():
    straight, its_optimizer = model_and_optimizer()
    resumed, resumed_optimizer = model_and_optimizer()
    resumed_optimizer.load_state(its_optimizer.state())
    train(straight, its_optimizer, range(3))
    train(resumed, resumed_optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def test_a_state_can_be_read_into_blank_room():
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    room = model_and_optimizer()[1].blank_state()
    assert {name: tensor.shape for name, tensor in room.items()} == {
        name: tensor.shape for name, tensor in optimizer.state().items()
    }


def test_loading_a_fresh_state_forgets_the_moments():
    _, fresh_optimizer = model_and_optimizer()
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    optimizer.load_state(fresh_optimizer.state())
    assert optimizer.state().keys() == fresh_optimizer.state().keys()


def test_skipped_steps_are_counted_in_a_row_until_one_is_finite(matrix: nn.Parameter):
    optimizer = Optimizer([("w", matrix)], lr=0.01)
    counts = []
    for value in (math.nan, math.inf, 1.0, math.nan):
        matrix.grad = torch.full((1, 2), value)
        optimizer.step()
        counts.append(optimizer.skipped_in_a_row)
    assert counts == [1, 2, 0, 1]
