"""Tiny runs in-process: recipes by settings, weights as plain tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tempo_em.console import PlainDisplay
from tempo_em.loading import load_recipe
from tempo_em.run_folder import START_MUST_SHARE
from tempo_em.train import Training

FAST = (
    "em.iterations=2", "evaluation.every=0", "evaluation.samples=4", "checkpoint.every=0", "checkpoint.export=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe up to the start of its EM loop: a policy that is right now and then, a fitted critic."""
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("started") / "run"
    resolved = load_recipe("tiny", [*FAST, "em.iterations=0"])
    Training(resolved, run_dir, PlainDisplay(), resume=False).run()
    return run_dir


@pytest.fixture
def prepare(tmp_path: Path, started: Path) -> Callable[..., Training]:
    """prepare("method=ttrl", ...): a run of the tiny recipe with these settings, at the start of its EM loop where the settings
    allow that, else before its (shortened) cold start."""
    count = 0

    def make(*settings: str) -> Training:
        nonlocal count
        count += 1
        origin = load_recipe("tiny", [*FAST, *settings]).origin
        is_fresh = any(source != "file" and path.startswith(START_MUST_SHARE) for path, source in origin.items())
        resolved = load_recipe("tiny", [*FAST, *(("cold_start.steps=20",) if is_fresh else ()), *settings])
        start_from = None if is_fresh else started
        return Training(resolved, tmp_path / f"run{count}", PlainDisplay(), resume=False, start_from=start_from)

    return make


@pytest.fixture
def train(prepare: Callable[..., Training]) -> Callable[..., Training]:
    """train("method=ttrl", ...): the same, run to its end."""

    def run(*settings: str) -> Training:
        training = prepare(*settings)
        training.run()
        return training

    return run


@pytest.fixture
def weights() -> Callable[[Training], dict[str, torch.Tensor]]:
    def read(training: Training) -> dict[str, torch.Tensor]:
        named = training.loop.policy.parameters()
        if training.loop.critic:
            named = [*named, *((f"critic.{name}", p) for name, p in training.loop.critic.parameters())]
        return {name: p.detach().clone() for name, p in named}

    return read
