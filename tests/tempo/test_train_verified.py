"""Runs on question files whose answers are judged by something else than comparing strings."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tempo_em.train import Training
from tempo_engine.errors import Halted
from tempo_engine.verify.expression import Expression
from torch import Tensor

Train = Callable[..., Training]
Weights = Callable[[Training], dict[str, Tensor]]

# A fresh model of bytes, which says anything at all.
SMALL = (
    "cold_start.steps=0", "initialisation.critic_warmup=1", "initialisation.rlvr=0",
    "model.create.max_position_embeddings=64", "rollout.max_prompt_tokens=16", "em.rollouts=32",
)  # fmt: skip
CODE = """
calls = []

def even(completions, hidden, **columns):
    calls.append(hidden)
    return [h * (0.5 + 0.5 * (len(c) % 2)) for c, h in zip(completions, hidden)]

def fails(completions, **columns):
    raise ValueError("no")
"""


@pytest.fixture(autouse=True)
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_rewards.py").write_text(CODE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("tiny_rewards", None)


def file(folder: Path, name: str, first: int, hidden: float, answer: str) -> Path:
    path = folder / name
    rows = [{"prompt": f"{i} + 1 =", "answer": answer, "hidden": hidden} for i in range(first, first + 16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data(folder: Path, verifier: str, *, hidden: float = 1.0, answer: str = r"\frac{1}{2}") -> tuple[str, ...]:
    labelled, unlabelled = file(folder, "a.jsonl", 0, 1.0, answer), file(folder, "b.jsonl", 16, hidden, answer)
    return (
        *SMALL,
        f"data.labelled={{jsonl: {labelled}, extract: whole, verifier: {verifier}}}",
        f"data.unlabelled={{jsonl: {unlabelled}, extract: whole, verifier: {verifier}}}",
    )


FUNCTION = "{function: 'tiny_rewards:even'}"


def test_a_function_may_give_fractions(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = train(*data(tmp_path, FUNCTION))
    assert "reward function tiny_rewards:even: called as in TRL" in capsys.readouterr().out
    scores = [row["critic/score/mean"] for row in training.metrics.rows() if "critic/score/mean" in row]
    assert scores
    assert all(0.5 <= score <= 1.0 for score in scores)
    audit = training.evaluations["final"]["unlabelled"]
    assert 0.5 <= audit["mean@4"] <= 1.0
    assert audit["pass@1"] == pytest.approx(2 * audit["mean@4"] - 1), "1 counts as right, 0.5 does not"


def test_columns_of_unlabelled_questions_reach_no_weight(train: Train, weights: Weights, tmp_path: Path) -> None:
    """Their hidden column decides everything that the function says of them: it is audited by, and not trained on."""
    honest = train(*data(tmp_path, FUNCTION))
    deceived = train(*data(tmp_path, FUNCTION, hidden=0.0))
    first, second = weights(honest), weights(deceived)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        deceived.evaluations["final"]["unlabelled"]["mean@4"]
        == 0.0
        < honest.evaluations["final"]["unlabelled"]["mean@4"]
    )


def test_the_oracle_may_ask_a_function(train: Train, weights: Weights, tmp_path: Path) -> None:
    honest = train("method=oracle", *data(tmp_path, FUNCTION))
    deceived = train("method=oracle", *data(tmp_path, FUNCTION, hidden=0.0))
    first, second = weights(honest), weights(deceived)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_comparisons_are_counted_and_workers_end_with_the_run(train: Train, tmp_path: Path) -> None:
    training = train(*data(tmp_path, "expression"))
    rows = [row for row in training.metrics.rows() if "stage" in row]
    names = {"verify/compared", "verify/cached", "verify/timeouts", "verify/crashes"}
    assert all(names <= row.keys() for row in rows)
    verifiers = [v for v in training.parts.verifiers if isinstance(v, Expression)]
    assert len(verifiers) == 2
    assert verifiers[0].pool is verifiers[1].pool
    assert verifiers[0].pool.workers == []


def test_runs_that_compare_strings_count_nothing(train: Train, tmp_path: Path) -> None:
    rows = train(*data(tmp_path, "int", answer="7")).metrics.rows()
    assert not any(name.startswith("verify/") for row in rows for name in row)


def test_a_function_that_fails_halts_the_run_which_can_go_on(prepare: Train, tmp_path: Path) -> None:
    training = prepare(*data(tmp_path, "{function: 'tiny_rewards:fails'}"), "evaluation.every=0")
    with pytest.raises(Halted, match="tiny_rewards:fails raised ValueError: no on") as stop:
        training.run()
    assert "go on with --resume" in stop.value.__notes__[0]
