"""Fresh float memory is NaN in every kernel test, so a lane that nobody writes cannot pass by luck; and each test is seeded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def created(*args: object, **options: object) -> Tensor:
        fresh = create(*args, **options)
        if fresh.is_floating_point():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return created


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))


@pytest.fixture(autouse=True)
def random_numbers_are_the_same_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def triton_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TEMPO_KERNELS", "triton")


@pytest.fixture
def in_any_order(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, programs of a launch run in a random order; the interpreter's own is one after the other."""
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def shuffled(x: int, y: int, z: int) -> None:
        size = builder.grid_dim[0]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
        set_grid_idx(order[x], y, z)

    return lambda: monkeypatch.setattr(builder, "set_grid_idx", shuffled)
