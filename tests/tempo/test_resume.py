"""Kill a real process, resume, and find the same weights bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tempo_engine.checkpoint import list_checkpoints

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS = ("--set", "cold_start.steps=60", "--set", "evaluation.samples=2", "--set", "em.iterations=6")


def command(run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tempo_em", "train", "tiny", *SETTINGS, "--run-dir", str(run_dir), *more]


def finish(run_dir: Path, *more: str) -> None:
    result = subprocess.run(command(run_dir, *more), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def stop_after(run_dir: Path, step: int, number: signal.Signals) -> int:
    """Start (or resume) the run, send the signal when the checkpoint of `step` is there; returns the exit code."""
    process = subprocess.Popen(
        command(run_dir, "--resume", "auto"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        done = list_checkpoints(run_dir / "checkpoints")
        if done and int(done[-1].name.removeprefix("step-")) >= step:
            process.send_signal(number)
            return process.wait(timeout=60)
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"the run ended with {process.wait()} before step {step}")


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run_dir / "checkpoints")[-1] / "tensors.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(run_dir)
    return run_dir


def assert_same_run(run_dir: Path, whole: Path) -> None:
    ours, theirs = final_tensors(run_dir), final_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "weights or optimiser states differ"
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (run_dir, whole)]
    for mine, other in zip(*rows, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith(("timing_s/", "perf/"))} == {
            k: v for k, v in other.items() if not k.startswith(("timing_s/", "perf/"))
        }
    summaries = [json.loads((d / "summary.json").read_text()) for d in (run_dir, whole)]
    assert summaries[0]["stages"] == summaries[1]["stages"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]


def test_killed_at_every_stage_and_resumed_gives_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    """Steps 1-3 are the cold start, 4-5 the critic's warm-up, 6 RLVR, 7-12 the EM loop."""
    run_dir = tmp_path / "run"
    for step in (2, 4, 6, 8, 11):
        assert stop_after(run_dir, step, signal.SIGKILL) == -signal.SIGKILL
    finish(run_dir, "--resume")
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_code(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir = tmp_path / "run"
    assert stop_after(run_dir, 7, number) == code
    finish(run_dir, "--resume", "auto")
    assert_same_run(run_dir, uninterrupted)


def test_a_damaged_newest_checkpoint_costs_one_iteration_not_the_run(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop_after(run_dir, 9, signal.SIGKILL)
    newest = list_checkpoints(run_dir / "checkpoints")[-1] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    finish(run_dir, "--resume", "auto")
    assert_same_run(run_dir, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_begins_again(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text((uninterrupted / "recipe.yaml").read_text())
    (run_dir / "metrics.jsonl").write_text('{"half": "a line')
    finish(run_dir, "--resume", "auto")
    assert_same_run(run_dir, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    before = final_tensors(uninterrupted)
    finish(uninterrupted, "--resume", "auto")
    after = final_tensors(uninterrupted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = (uninterrupted / "metrics.jsonl").read_text().splitlines()
    assert sum('"final"' in row for row in rows) == 1
