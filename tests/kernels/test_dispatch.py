"""Who runs an op, and how launches are made."""

import pytest
import torch
from tempo_kernels import dispatch
from tempo_kernels.dispatch import INTERPRETER, Target, launch, recorded, target_of, use_triton

X = torch.zeros(3)


def test_on_a_cpu_pytorch_runs_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TEMPO_KERNELS", raising=False)
    assert not use_triton(X)


@pytest.mark.parametrize(("choice", "expected"), [("auto", False), ("torch", False), ("triton", True)])
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, choice: str, expected: bool):
    monkeypatch.setenv("TEMPO_KERNELS", choice)
    assert use_triton(X) == expected


def test_an_unknown_choice_is_answered_with_the_choices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEMPO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be auto, triton or torch, got 'cuda'"):
        use_triton(X)


def test_float64_always_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEMPO_KERNELS", "triton")
    assert not use_triton(X.double())
    with recorded(Target("cuda", 90)):
        assert not use_triton(X.double())


def test_triton_on_a_cpu_without_its_interpreter_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEMPO_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="tensor on cpu: set TRITON_INTERPRET=1"):
        use_triton(X)


def test_asking_for_triton_where_there_is_none_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEMPO_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed: install it, or set TEMPO_KERNELS=torch"):
        use_triton(X)


class Kernel:
    """Stands in for a compiled kernel: it remembers what it was called with."""

    arg_names = ("x_ptr", "length", "BLOCK")

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


def test_a_launch_runs_the_kernel_on_a_flat_grid():
    kernel = Kernel()
    launch(kernel, 7, X, 3, BLOCK=4, num_warps=8)
    assert kernel.calls == [((7,), (X, 3), {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, "BLOCK": 4})]


def test_nothing_is_launched_for_no_programs():
    kernel = Kernel()
    launch(kernel, 0, X, 3, BLOCK=4)
    assert not kernel.calls


def test_recorded_launches_are_written_down_and_not_run():
    kernel = Kernel()
    with recorded(Target("cuda", 90)) as launches:
        assert use_triton(X)
        assert target_of(X) == Target("cuda", 90)
        launch(kernel, 7, X, 3, BLOCK=4, num_warps=8)
    assert not kernel.calls
    assert launches == [(kernel, {"x_ptr": X, "length": 3}, {"BLOCK": 4}, 8, 2)]
    assert target_of(X) == INTERPRETER
