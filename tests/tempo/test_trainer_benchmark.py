"""benchmarks/trainer.py: that all sides do equal work, and that it would be noticed if they did not."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("trainer")


@pytest.fixture
def sides(bench: Any) -> Any:
    return importlib.import_module("trainer_sides")


@pytest.mark.parametrize("update", ["policy", "critic"])
def test_engine_and_plain_trainers_get_the_same_loss_and_gradients(bench: Any, sides: Any, update: str) -> None:
    work = sides.Work(bench.qwen3(64, 2, 97), [40, 8, 17, 5, 29, 4], 64)
    found = bench.differences(work, update, {side: sides.trainer(side, update, work) for side in sides.SIDES})
    assert max(found.values()) < 1e-5
    assert found["padded"] == 0


def test_plain_trainers_take_rows_as_they_come_or_by_length(sides: Any) -> None:
    work = sides.Work({}, [8, 4, 6, 4], 16)
    assert sides.micro_batches(work, "padded") == [[0, 1], [2, 3]]
    assert sides.micro_batches(work, "sorted") == [[0, 2], [1, 3]]


def test_the_difference_is_the_largest_of_all_tensors_relative_to_their_norms(bench: Any) -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    assert bench.largest_difference(
        {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([101.0])}, truth
    ) == pytest.approx(0.1)
    assert bench.largest_difference({"a": truth["a"]}, truth) == math.inf
    assert math.isnan(bench.largest_difference({"a": truth["a"], "b": torch.tensor([math.nan])}, truth))


@pytest.mark.parametrize("error", [1e-4, math.nan])
def test_wrong_gradients_are_not_timed_and_fail_the_command(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float
) -> None:
    monkeypatch.setattr(bench, "trainer", lambda side, update, work: None)
    monkeypatch.setattr(bench, "differences", lambda *_: {"engine": error, "padded": 0.0, "sorted": 0.0})
    monkeypatch.setattr(bench, "LIMITS", {"float32": 1e-5, "bfloat16": 1e-5})
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--quick", "--case", "mixed"])
    assert bench.main() == 1
    assert "wrong" in capsys.readouterr().out
