"""Kill real processes, resume, and find the same weights bit for bit."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tempo_engine.checkpoint import list_checkpoints, load_tensors, names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS = ("--set", "cold_start.steps=60", "--set", "evaluation.samples=2", "--set", "em.iterations=6")
ON_TWO_RANKS = ("--nproc", "2")
SPLIT = ("--set", "micro_batch_tokens=100", "--set", "model.activation_checkpointing=full")


def command(run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tempo_em", "train", "tiny", *SETTINGS, "--run-dir", str(run_dir), *more]


def finish(run_dir: Path, *more: str) -> None:
    result = subprocess.run(command(run_dir, *more), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def start(run_dir: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(run_dir, "--resume", "auto", *more),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_until(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if what():
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"the run ended with {process.wait()} before it came to this point")


def newest_step(run_dir: Path) -> int:
    done = list_checkpoints(run_dir / "checkpoints")
    return int(done[-1].name.removeprefix("step-")) if done else 0


def stop_after(run_dir: Path, step: int, number: signal.Signals, *more: str) -> int:
    """Start (or resume) the run, send the signal when the checkpoint of `step` is there; returns the exit code."""
    process = start(run_dir, *more)
    wait_until(process, lambda: newest_step(run_dir) >= step)
    process.send_signal(number)
    return process.wait(timeout=60)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and every rank: they are its children, in sessions of their own."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors = {name: torch.empty(shape, dtype=torch.float64) for name, shape in names(newest).items()}
    assert load_tensors(newest, tensors) == tensors.keys()
    return tensors


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


def test_two_ranks_killed_at_ten_random_points_end_with_the_same_bits(tmp_path: Path) -> None:
    """Some of the points are between generation and update, some in the middle of a save, the others anywhere."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    finish(whole, *ON_TWO_RANKS)
    rng = random.Random(0)
    waiting = run_dir / "rollouts.json"

    def just_sampled() -> bool:
        return waiting.exists() and waiting.stat().st_mtime_ns > begun

    def in_a_save() -> bool:
        return any((run_dir / "checkpoints").glob(".writing-*/*"))

    def somewhere() -> bool:
        return newest_step(run_dir) > before

    points = [just_sampled] * 3 + [in_a_save] * 3 + [somewhere] * 4
    rng.shuffle(points)
    for point in [somewhere, *points[1:]]:  # the first start has nothing to resume
        begun, before = time.time_ns(), newest_step(run_dir)
        process = start(run_dir, *ON_TWO_RANKS)
        wait_until(process, point)
        time.sleep(rng.uniform(0, 0.3) if point is somewhere else 0)
        kill_all(process)
        assert newest_step(run_dir) < 13, "the run was over before its last kill"
    finish(run_dir, "--resume", *ON_TWO_RANKS)
    assert_same_run(run_dir, whole)


def test_killed_between_generation_and_update_the_rollouts_are_not_sampled_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    waiting = run_dir / "rollouts.json"
    wait_until(process, lambda: waiting.exists() and json.loads(waiting.read_text().split("\n")[1])["key"] == "em/0")
    process.kill()
    process.wait()
    text = waiting.read_text().split("\n")[1]
    assert newest_step(run_dir) == 6, "the update was over before the kill"
    marked = text.replace('"num_tokens": ', '"num_tokens": 900000')  # a trace that sampling again would not leave
    waiting.write_text(f"{hashlib.sha256(marked.encode()).hexdigest()}\n{marked}")
    finish(run_dir, "--resume")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    generated = [row["tokens/generated"] for row in rows if row.get("stage") == "em"]
    assert [count > 900_000 for count in generated] == [True] + [False] * 5


def test_two_ranks_stopped_by_sigterm_and_resumed_by_one_end_with_the_same_weights(tmp_path: Path) -> None:
    """In float64, where another order of additions shows in the last digits only; and with other micro-batches, recomputation."""
    exact = ("--set", "model.dtype=float64", "--set", "em.iterations=5", "--set", "evaluation.every=0")
    whole, mixed, split = tmp_path / "one", tmp_path / "two then one", tmp_path / "two"
    finish(whole, *exact)
    assert stop_after(mixed, 9, signal.SIGTERM, *exact, *ON_TWO_RANKS) == 143
    rows = [json.loads(line) for line in (mixed / "metrics.jsonl").read_text().splitlines()]
    assert newest_step(mixed) == rows[-1]["step"], "what was trained is saved"
    finish(mixed, "--resume", *exact)
    finish(split, *exact, *ON_TWO_RANKS, *SPLIT)
    expected = final_tensors(whole)
    for run_dir in (mixed, split):
        ours = final_tensors(run_dir)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (ours[name] - tensor).abs().max() <= 1e-9 * tensor.abs().max(), (run_dir.name, name)


def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert stop_after(run_dir, 4, signal.SIGINT) == 130
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert newest_step(run_dir) == rows[-1]["step"], "what was trained is saved"


def test_a_damaged_newest_checkpoint_costs_one_iteration_not_the_run(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop_after(run_dir, 9, signal.SIGKILL)
    newest = next(list_checkpoints(run_dir / "checkpoints")[-1].glob("*.safetensors"))
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
