"""Run folders as a run would leave them, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tempo_em.loading import load_recipe

HOSTILE = "<script>alert(1)</script></textarea><img src=x onerror=alert(1)>\"'&\x00\u202e\ud800"


def evaluation(label: str, accuracy: float, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"step": 1, "evaluation": label, "timing_s/evaluation": 0.5}
    for name in ("unlabelled", "heldout"):
        row |= {f"val-core/{name}/acc/{metric}": accuracy for metric in ("mean@8", "pass@1", "pass@8", "maj@8")}
        row |= {f"val-aux/{name}/{metric}": 2.0 for metric in ("distinct_answers", "entropy")}
        critic = {"auroc": 0.9, "brier": 0.1, "ece": 0.05, "overvaluation": 0.02}
        row |= {f"val-aux/{name}/critic/{metric}": value for metric, value in critic.items()} if label != "base" else {}
    return row | more


def iteration(i: int, **more: Any) -> dict[str, Any]:
    return {
        "step": i, "stage": "em", "iteration": i, "critic/score/mean": 0.3, "critic/rewards/unlabelled": 0.4,
        "critic/auroc_fresh": 0.9, "actor/entropy": 1.0, "actor/grad_norm": 0.5, "tokens/generated": 100,
        "tokens/trained_policy": 50, "timing_s/rollout": 1.0, "timing_s/m_step": 0.5, "timing_s/step": 2.0,
        "rollout/mismatch_kl": 1e-9, "rollout/ess_sequence": 0.999, "alarm/auroc": float(i == 2), **more,
    }  # fmt: skip


def sample(label: str, prompt: str = "1 2 =", **more: Any) -> dict[str, Any]:
    return {"evaluation": label, "set": "unlabelled", "prompt": prompt, "response": "+1 -2", **more}


BINS = [[4, 0.1, 0.0], [4, 0.9, 1.0]]
ROWS = [
    evaluation("base", 0.1),
    evaluation("start", 0.2, reliability={"unlabelled": BINS}),
    iteration(1),
    iteration(2),
    evaluation("em/2", 0.3, reliability={"unlabelled": BINS}),
    iteration(3),
    iteration(4),
    evaluation("final", 0.5, reliability={"unlabelled": BINS}),
]
SAMPLES = [
    sample(label, right=label == "final", terminal=0.5, tokens=["+1", " -2"], values=[0.2, 0.4, 0.5])
    for label in ("start", "final")
]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run("a", "seed=1", rows=[...], samples=[...], finished=False): a folder of that name."""

    def write(
        name: str,
        *settings: str,
        rows: list[dict[str, Any]] = ROWS,
        samples: list[dict[str, Any]] = SAMPLES,
        finished: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(load_recipe("tiny", list(settings)).to_yaml())
        for file, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in lines))
        if finished:
            (folder / "summary.json").write_text(json.dumps({"seconds": {"evaluation": 3.0}}))
        return folder

    return write


@pytest.fixture
def hostile_run(write_run: Callable[..., Path]) -> Path:
    """Whatever a model, a data set or a file can say says something a browser would run."""
    rows = [{**row, f"val-core/{HOSTILE}/acc/mean@8": 0.5, f"alarm/{HOSTILE}": 1.0} for row in ROWS]
    rows.append(iteration(5, **{f"timing_s/{HOSTILE}": 1.0, "timing_s/rollout": HOSTILE}))
    samples = [
        sample(label, HOSTILE, response=HOSTILE, right=HOSTILE, tokens=[HOSTILE, HOSTILE], values=[0.1, HOSTILE, 0.7])
        for label in ("start", "final", HOSTILE)
    ]
    folder = write_run("<b>run", rows=rows, samples=[*samples, *({**row, "set": HOSTILE} for row in samples)])
    (folder / "environment.json").write_text(json.dumps({HOSTILE: [HOSTILE], "argv": ["--set", HOSTILE]}))
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("note: '<script>alert(1)</script>'  # <script>alert(1)</script>\n")
    return folder
