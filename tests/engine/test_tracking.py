"""Metrics added up over micro-batches and averaged over steps; and a file that a resume cuts back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tempo_engine.tracking import Accumulator, Clock, MetricsFile


def test_micro_batches_add_up_within_a_step():
    metrics = Accumulator()
    metrics.add({"loss": 0.25})
    metrics.add({"loss": 0.5})
    metrics.end_step({})
    assert metrics.means() == {"loss": 0.75}


def test_steps_are_averaged():
    metrics = Accumulator()
    for micro_batches, norm in (([1.0, 2.0], 4.0), ([5.0], 10.0)):
        for value in micro_batches:
            metrics.add({"loss": value})
        metrics.end_step({"norm": norm})
    assert metrics.means() == {"loss": 4.0, "norm": 7.0}


def test_of_names_ending_in_max_the_largest_counts():
    metrics = Accumulator()
    for values in ([1.0, -3.0], [2.0, 0.5]):
        for value in values:
            metrics.add({"ratio_max": value})
        metrics.end_step({})
    assert metrics.means() == {"ratio_max": 2.0}


def test_the_largest_of_negative_numbers_is_negative():
    metrics = Accumulator()
    metrics.add({"logprob_max": -3.0})
    metrics.add({"logprob_max": -2.0})
    assert metrics.means() == {"logprob_max": -2.0}


def test_a_max_given_at_the_end_of_a_step_is_a_max_too():
    metrics = Accumulator()
    metrics.end_step({"norm_max": 3.0})
    metrics.end_step({"norm_max": 1.0})
    assert metrics.means() == {"norm_max": 3.0}


def test_tensors_become_numbers():
    metrics = Accumulator()
    metrics.add({"loss": torch.tensor(0.5), "ratio_max": torch.tensor(2.0)})
    metrics.add({"loss": torch.tensor(0.25), "ratio_max": torch.tensor(1.0)})
    metrics.end_step({})
    assert metrics.means() == {"loss": 0.75, "ratio_max": 2.0}
    assert {type(value) for value in metrics.means().values()} == {float}


def test_the_tensors_given_are_not_changed():
    loss = torch.tensor(1.0)
    metrics = Accumulator()
    metrics.add({"loss": loss})
    metrics.add({"loss": loss})
    assert loss == 1


def test_without_metrics_there_are_no_means():
    assert Accumulator().means() == {}


def test_metrics_before_the_first_step_ends_are_not_divided():
    metrics = Accumulator()
    metrics.add({"loss": 3.0})
    assert metrics.means() == {"loss": 3.0}


def test_a_clock_announces_the_phase_it_enters():
    heard = []
    clock = Clock(heard.append)
    with clock.time("outer"), clock.time("inner"):
        pass
    assert heard == ["outer", "inner"]


def test_a_clock_counts_a_phase_that_fails():
    clock = Clock()
    with pytest.raises(RuntimeError), clock.time("sample"):
        raise RuntimeError
    assert set(clock.total) == {"sample"}


def test_a_lap_starts_anew_while_the_total_goes_on():
    clock = Clock()
    with clock.time("sample"):
        pass
    assert set(clock.lap()) == {"sample"}
    with clock.time("pack"):
        pass
    assert set(clock.lap()) == {"pack"}
    assert clock.lap() == {}
    assert set(clock.total) == {"sample", "pack"}


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_rows_are_read_as_they_were_written(file: MetricsFile):
    rows = [{"step": 1, "loss": 0.5, "phase": "E"}, {"step": 2, "note": "caf\u00e9\u2028\n"}]
    for row in rows:
        file.write(row)
    assert file.rows() == rows
    assert len(file.path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_metric_that_does_not_exist_is_null(file: MetricsFile, value: float):
    file.write({"auroc": value})
    assert file.rows() == [{"auroc": None}]


def test_every_line_is_strict_json(file: MetricsFile):
    file.write({"step": 3, "auroc": math.nan, "loss": np.float64(0.5)})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(file.path.read_text(), parse_constant=refuse) == {"step": 3, "auroc": None, "loss": 0.5}


def test_a_file_that_does_not_exist_has_no_rows_and_no_size(file: MetricsFile):
    assert file.rows() == []
    assert file.size == 0


def test_a_cut_takes_back_what_was_written_since(file: MetricsFile):
    file.write({"step": 1})
    size = file.size
    file.write({"step": 2})
    file.cut(size)
    file.write({"step": 2, "again": True})
    assert file.rows() == [{"step": 1}, {"step": 2, "again": True}]


def test_a_cut_takes_back_half_a_line(file: MetricsFile):
    file.write({"step": 1})
    size = file.size
    with file.path.open("a") as broken_off:
        broken_off.write('{"ste')
    file.cut(size)
    assert file.rows() == [{"step": 1}]


def test_a_cut_to_0_leaves_nothing(file: MetricsFile):
    file.write({"step": 1})
    file.cut(0)
    assert file.rows() == []


def test_a_cut_where_there_is_no_file_makes_none(file: MetricsFile):
    file.cut(0)
    assert not file.path.exists()


def test_a_cut_beyond_the_end_changes_nothing(file: MetricsFile):
    file.write({"step": 1})
    file.cut(file.size + 10)
    assert file.rows() == [{"step": 1}]
