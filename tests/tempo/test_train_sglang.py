"""Whole runs with a real SGLang server, as a user starts them, and what happens to them when something dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Groups of 2 labelled and 8 unlabelled responses, 64 in all, as in the recipe.
RECIPE = ["tiny-sglang", "--set", "evaluation.every=0", "--set", "evaluation.samples=2", "--set", "cold_start.steps=20"]


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tempo_em", "train", *RECIPE, *arguments, "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(run: subprocess.Popen[str]) -> str:
    try:
        output, _ = run.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    assert run.returncode == 0, output
    return output


def rows(run_dir: Path, stage: str = "em") -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in found if row.get("stage") == stage]


def wait_for_row(run: subprocess.Popen[str], run_dir: Path, number: int) -> None:
    while len(rows(run_dir)) < number:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)


def servers_of(run_dir: Path) -> list[psutil.Process]:
    """SGLang's processes of this run: the one that its settings were given to, and what that started."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        is_server = "sglang.launch_server" in command and not any("guardian" in word for word in command)
        if is_server and str(run_dir) in " ".join(command) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found += [process, *process.children(recursive=True)]
    return found


def rollouts_waiting(run_dir: Path) -> tuple[str, dict[str, Any]]:
    _, _, text = (run_dir / "rollouts.json").read_text().partition("\n")
    waiting = json.loads(text)
    return waiting["key"], waiting["sampled"]


def test_a_run_survives_five_killed_servers_and_a_stopped_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    patience = ["rollout.sglang.health_seconds=8", "rollout.sglang.update_minutes=0.2"]
    settings = ["em.iterations=8", "checkpoint.every=4", *patience]
    run = start(run_dir, *(f"--set={setting}" for setting in settings))
    sampled: dict[str, dict[str, Any]] = {}
    for number in range(1, 7):
        wait_for_row(run, run_dir, number)
        victims = servers_of(run_dir)
        # The first process takes requests, the second computes: one is killed, once the other is stopped.
        if number == 3:
            victims[1].send_signal(signal.SIGSTOP)
        else:
            victims[0].send_signal(signal.SIGKILL)
        key, rollouts = rollouts_waiting(run_dir)
        sampled[key] = rollouts
    finish(run)
    found = rows(run_dir)
    assert [row["iteration"] for row in found] == list(range(1, 9))
    assert [row["rollout/responses"] for row in found] == [64] * 8
    assert [row["rollout/staleness_max"] for row in found] == [0.0] * 8
    assert max(row["rollout/server_restarts"] for row in found) == 6
    assert max(row["rollout/logprob_diff_max"] for row in found) < 1e-4
    assert len(sampled) >= 5
    for rollouts in sampled.values():
        assert set(Counter(r["prompt"]["id"] for r in rollouts["labelled"]).values()) == {2}
        assert set(Counter(r["prompt"]["id"] for r in rollouts["unlabelled"]).values()) == {8}
        versions = {version for r in rollouts["labelled"] + rollouts["unlabelled"] for version, _ in r["versions"]}
        assert len(versions) == 1
    assert servers_of(run_dir) == []


def test_no_server_outlives_a_killed_run_which_then_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["--set=em.iterations=3", "--set=checkpoint.every=1"]
    run = start(run_dir, *settings)
    wait_for_row(run, run_dir, 2)
    assert servers_of(run_dir)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 15
    while servers_of(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "resuming from" in finish(start(run_dir, *settings, "--resume"))
    assert [row["iteration"] for row in rows(run_dir)] == [1, 2, 3]
    assert (run_dir / "summary.json").is_file()


def test_a_run_samples_ahead_within_its_bound_and_corrects_for_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [
        "em.iterations=5",
        "rollout.ahead=1",
        "rollout.partial=true",
        "mstep.importance=token",
        "rollout.sglang.replicas=2",
    ]
    finish(start(run_dir, *(f"--set={setting}" for setting in settings)))
    found = rows(run_dir)
    assert [row["rollout/responses"] for row in found] == [64] * 5
    assert found[0]["rollout/staleness_max"] == 0
    assert {row["rollout/staleness_max"] for row in found[1:]} == {1.0}
    assert all("actor/ess" in row for row in found)


def test_two_ranks_share_a_server(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["--set=em.iterations=2", "--set=rollout.sglang.sync=distributed"]
    finish(start(run_dir, *settings, "--nproc", "2"))
    found = rows(run_dir)
    assert [row["rollout/responses"] for row in found] == [64] * 2
    assert max(row["rollout/logprob_diff_max"] for row in found) < 1e-4
    assert servers_of(run_dir) == []
