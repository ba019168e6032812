"""TensorBoard for real; wandb and trackio through modules that record what they are asked."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tempo_em.commands import train_command
from tempo_em.recipe import TrackingRecipe
from tempo_em.sinks import Sinks, TensorBoard, check_installed, run_id
from tempo_em.train import Training
from tempo_engine.errors import UserError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Train = Callable[..., Training]


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def in_metrics_file(training: Training, name: str) -> list[tuple[int, Any]]:
    rows = [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], pytest.approx(row[name])) for row in rows if row.get(name) is not None]


def recorder(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A module of this name with `init`, whose run records its calls."""
    calls: list[tuple[str, Any]] = []

    def init(**how: Any) -> Any:
        calls.append(("init", how))
        return SimpleNamespace(
            log=lambda metrics, step: calls.append(("log", (step, metrics))),
            finish=lambda: calls.append(("finish", None)),
        )

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, __spec__=SimpleNamespace()))  # pyright: ignore[reportArgumentType]
    return calls


def test_tensorboard_gets_the_numbers_of_the_metrics_file(train: Train) -> None:
    training = train("tracking.sinks=[tensorboard]")
    for name in ("critic/score/mean", "actor/entropy", "val-core/unlabelled/acc/mean@4"):
        assert scalars(training.run_dir, name) == in_metrics_file(training, name) != []


def test_after_a_resume_tensorboard_forgets_what_was_written_of_later_steps(tmp_path: Path) -> None:
    for step, value in ((0, 1.0), (2, 5.0)):  # killed after step 4, resumed from step 2
        sink = TensorBoard()
        sink.begin({}, tmp_path, step)
        for later in (step + 1, step + 2, step + 3)[: 4 - step]:
            sink.write(later, {"x": value + later})
        sink.close()
    assert scalars(tmp_path, "x") == [(1, 2.0), (2, 3.0), (3, 8.0), (4, 9.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_recipe_and_metrics_and_the_same_run_after_a_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorder(name, monkeypatch)
    how = TrackingRecipe(sinks=[name], project="p")  # pyright: ignore[reportArgumentType]
    for step in (0, 3):
        sinks = Sinks(how, pytest.fail)
        sinks.begin({"seed": 1}, tmp_path, step)
        row = {"step": step, "iteration": 1, "stage": "em", "a": 0.5, "b": None, "c": float("nan"), "r": {"s": []}}
        sinks.write(step, row)
        sinks.close()
    assert [call for call, _ in calls] == ["init", "log", "finish"] * 2
    assert [what for call, what in calls if call == "log"] == [(0, {"a": 0.5}), (3, {"a": 0.5})]
    first, second = (how for call, how in calls if call == "init")
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("p", {"seed": 1}, "allow")
    assert run_id(tmp_path) in (first.get("id") or first["name"])


def test_a_sink_that_fails_is_told_once_and_stops_nothing(
    prepare: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(metrics: Any, step: int) -> None:
        raise OSError("the server is gone. Traceback follows")

    recorder("wandb", monkeypatch)
    sys.modules["wandb"].init = lambda **how: SimpleNamespace(log=fail, finish=lambda: None)  # pyright: ignore[reportAttributeAccessIssue]
    training = prepare("tracking.sinks=[wandb, tensorboard]")
    training.run()
    said = "tracking by wandb fails, metrics.jsonl has everything: the server is gone\n"
    assert capsys.readouterr().out.count(said) == 1
    assert (training.run_dir / "summary.json").is_file()
    assert scalars(training.run_dir, "actor/entropy") == in_metrics_file(training, "actor/entropy")


def test_a_sink_that_cannot_begin_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # pyright: ignore[reportArgumentType]
    notes: list[str] = []
    sinks = Sinks(TrackingRecipe(sinks=["wandb"]), notes.append)
    sinks.begin({}, tmp_path, 0)
    sinks.write(1, {"a": 1.0})
    sinks.close()
    assert len(notes) == 1


def test_a_missing_package_is_named_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempo_em.sinks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tempo-engine\[trackio\]'"):
        check_installed(TrackingRecipe(sinks=["trackio"]))
    monkeypatch.setattr("tempo_em.sinks.find_spec", lambda name: ModuleSpec(name, None))  # a folder wandb/
    run_dir = tmp_path / "run"
    assert train_command("tiny", ["tracking.sinks=[wandb]"], None, run_dir, None, False) == 2
    assert "tempo-engine[wandb]" in capsys.readouterr().err
    assert not run_dir.exists()


def test_other_ranks_have_no_sinks(tmp_path: Path) -> None:
    sinks = Sinks(None, pytest.fail)
    sinks.begin({}, tmp_path, 0)
    sinks.write(1, {"a": 1.0})
    sinks.close()
    assert list(tmp_path.iterdir()) == []
